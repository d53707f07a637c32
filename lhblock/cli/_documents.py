"""Messages of the control service as JSON documents with stable keys."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message

from lhblock.settings import format_size


def numbers(message: Message) -> dict[str, int]:
    """Every field of a message of plain numbers, zeros included, under its own name."""
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}


def client_document(message: Any) -> dict[str, Any]:
    return {"peer": message.peer, "export": message.export, "since": message.since}


def membership_document(message: Any) -> dict[str, Any]:
    return {
        "generation": message.generation,
        "time": message.time,
        "reason": message.reason,
        "members": message.members,
        "left": message.left,
    }


def job_document(message: Any) -> dict[str, Any]:
    return {
        "id": message.id or None,
        "kind": message.kind,
        "subject": message.subject,
        "replica": message.replica or None,
        "state": message.state,
        "done_bytes": message.done_bytes,
        "total_bytes": message.total_bytes,
        "error": message.error,
    }


def snapshot_document(message: Any) -> dict[str, Any]:
    return {
        "name": message.name,
        "parent": message.parent or None,
        "children": list(message.children),
        "created": message.created,
        "removed": message.removed,
        "user_created": message.user_created,
        "labels": dict(sorted(message.labels.items())),
        "size_bytes": message.size_bytes,
        "allocated_bytes": message.allocated_bytes,
    }


def rebuild_document(message: Any) -> dict[str, Any]:
    return {
        "phase": message.phase,
        "source": message.source or None,
        "done_bytes": message.done_bytes,
        "total_bytes": message.total_bytes,
        "rate_bytes_s": message.rate_bytes_s,
        "left_s": message.left_s or None,
        "attempts": message.attempts,
        "error": message.error,
        "compares": message.compares or None,
        "why": message.why,
    }


def describe_rebuild(document: dict[str, Any]) -> str:
    """One line for people: ``copying 41 %, 180 MiB/s, 12 s left``."""
    parts = [document["phase"]]
    if document["total_bytes"]:
        parts[0] += f" {document['done_bytes'] * 100 // document['total_bytes']} %"
    if document["rate_bytes_s"]:
        parts.append(f"{format_size(document['rate_bytes_s'])}/s")
    if document["left_s"]:
        parts.append(f"{document['left_s']:.0f} s left")
    if document["compares"] == "changes":
        parts.append("only what changed")
    if document["attempts"] > 1:
        parts.append(f"attempt {document['attempts']}")
    if document["error"]:
        parts.append(document["error"])
    return ", ".join(parts)
