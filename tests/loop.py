"""File systems on loop devices, which only root may make."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def require_loop_devices() -> None:
    """Skip a test on a machine that cannot."""
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        pytest.skip("requires root and loop devices")
