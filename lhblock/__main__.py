"""``python -m lhblock``."""

from __future__ import annotations

from lhblock.cli import main

main()
