"""TLS without a process: what nbdkit says is bounded, and addresses with TLS are told apart."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import structlog
import trio
import trio.testing

from lhblock.device import Target
from lhblock.frontend._child import LOG_LINE_BYTES_MAX, LOG_LINES_PER_S, Messages
from lhblock.frontend.nbd import NbdUri, _tls


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        (NbdUri(export="db", host="h", tls=True), "nbds://h/db"),
        (
            NbdUri("db", "::1", 7, tls=True, user="a@b", tls_files=("tls-psk-file", "/k e&y")),
            "nbds://a%40b@[::1]:7/db?tls-psk-file=/k%20e%26y",
        ),
    ],
)
def test_uri_with_tls(uri: NbdUri, text: str) -> None:
    assert str(uri) == text


def test_clients_go_through_our_plugin_if_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "plugin.so"
    monkeypatch.setattr(_tls, "_MODULE", module)
    assert _tls.plugin_words("/s") == ["nbd", "socket=/s", "dynamic-export=true"]
    module.touch()
    assert _tls.plugin_words("/s") == [str(module), "socket=/s", "retry=0"]


def test_the_kernel_is_attached_to_an_address_without_tls() -> None:
    target = Target.of_volume("/d", "db", ["nbds://h/db", "nbd+unix:///db?socket=/d/s"])
    assert target.uri == NbdUri(export="db", socket_path="/d/s")


async def test_a_flood_of_messages_is_read_and_only_some_logged(
    autojump_clock: trio.testing.MockClock,
) -> None:
    messages = Messages("nbdkit", structlog.get_logger().warning)
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    with structlog.testing.capture_logs() as logs:
        async with (
            trio.lowlevel.FdStream(read_fd) as reader,
            trio.lowlevel.FdStream(write_fd) as writer,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(messages.drain, reader)
            await writer.send_all(b"nbdkit: error: accept: Too many open files\n" * 10_000)
            await trio.sleep(1)
            await writer.send_all(b"x" * 1_000_000 + b"\nnbdkit: nbd[1]: error: the end")
            await writer.aclose()
    assert messages.last == "nbd[1]: error: the end"
    dropped = [line for line in logs if "lines" in line]
    assert [line["lines"] for line in dropped] == [10_000 - LOG_LINES_PER_S]
    said = [line["message"] for line in logs if "message" in line]
    assert said[0] == "accept: Too many open files"
    assert len(said) == LOG_LINES_PER_S + 2
    assert max(map(len, said)) == LOG_LINE_BYTES_MAX
