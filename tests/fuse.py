"""FUSE, which a container may lack."""

from __future__ import annotations

import os

import pytest


def require_fuse() -> None:
    """Skip a test on a machine whose kernel or container does not offer ``/dev/fuse``."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("requires /dev/fuse")
