"""Front ends: how block clients reach a volume."""

from __future__ import annotations
