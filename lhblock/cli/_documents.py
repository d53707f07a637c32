"""Messages of the control service as JSON documents with stable keys."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message


def numbers(message: Message) -> dict[str, int]:
    """Every field of a message of plain numbers, zeros included, under its own name."""
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}


def client_document(message: Any) -> dict[str, Any]:
    return {"peer": message.peer, "export": message.export, "since": message.since}


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
