"""The guest is put together once per run of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.guest import Guest
from tests.kernel.initramfs import base_archive
from tests.kernel.server import Server, start_server

KERNEL_DIRECTORY = Path(__file__).resolve().parents[2] / "build" / "kernel"


@pytest.fixture(scope="session")
def guest_base() -> bytes:
    """The shared part of the initramfs."""
    assert (KERNEL_DIRECTORY / "vmlinuz").exists(), "no kernel here: run `make kernel`"
    return base_archive(KERNEL_DIRECTORY / "modules")


@pytest.fixture
def guest(guest_base: bytes, tmp_path: Path) -> Guest:
    """A guest to run scripts in; each run is a fresh boot."""
    return Guest(KERNEL_DIRECTORY / "vmlinuz", guest_base, tmp_path)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A volume that is served."""
    with start_server(tmp_path / "data") as served:
        yield served
