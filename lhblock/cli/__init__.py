"""The ``lhblock`` command. Only what the top level needs is imported here."""

from __future__ import annotations

from lhblock.cli._main import main

__all__ = ["main"]
