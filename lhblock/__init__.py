"""Replicated, thin, snapshotted block volumes in user space."""

from __future__ import annotations

__version__ = "0.1.0"
