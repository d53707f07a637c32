"""The keeper of an attached device; started by ``lhblock attach``."""

from __future__ import annotations

import sys

from lhblock.device._keeper import main

sys.exit(main(sys.argv[1]))
