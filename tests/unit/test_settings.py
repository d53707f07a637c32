"""Names, sizes, addresses and the data directory, as a user writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lhblock.errors import LhblockError, UsageError
from lhblock.instance import serve_settings
from lhblock.settings import (
    DataDir,
    Listen,
    check_snapshot_name,
    check_volume_name,
    data_dir,
    format_size,
    parse_labels,
    parse_listen,
    parse_size,
    parse_volume_size,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("16m", 16777216),
        ("1.5m", 1572864),
        ("4 m", 4194304),
        ("4KiB", 4096),
        ("4kb", 4096),
        ("100G", 100 << 30),
        ("2T", 2 << 40),
        ("1P", 1 << 50),
        (".5k", 512),
        ("7b", 7),
        (" 8K ", 8192),
    ],
)
def test_sizes_are_powers_of_1024(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "G", "-1G", "1x", "1e3", "1.2.3", "1 2", "0x10", "1iB", "nan", "½"]
)
def test_what_is_no_size_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(UsageError, match="invalid size"):
        parse_size(text)


def test_a_part_of_a_byte_is_refused() -> None:
    with pytest.raises(UsageError, match="whole number of bytes"):
        parse_size("1.0001k")


@pytest.mark.parametrize(
    ("text", "problem"),
    [("0", "too small"), ("4095", "too small"), ("5000", "the next one is 8192"), ("2P", "large")],
)
def test_sizes_no_volume_can_have_are_refused(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse_volume_size(text)


@pytest.mark.parametrize("name", ["db", "a.b", "A_1", "0-", "x" * 64])
def test_good_volume_names_pass(name: str) -> None:
    assert check_volume_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "a", "x" * 65, "-a", ".a", "a/b", "a b", "ä1", "db\n", "..", "nbd", "serve-12"]
)
def test_bad_volume_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="invalid volume name"):
        check_volume_name(name)


@pytest.mark.parametrize("name", ["", "a/b", "volume-head", "x" * 201, ".", "a\0", "s1\n"])
def test_bad_snapshot_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="invalid snapshot name"):
        check_snapshot_name(name)


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("127.0.0.1:0", Listen("127.0.0.1", 0)),
        (":10809", Listen("", 10809)),
        ("[::1]:5", Listen("::1", 5)),
        ("host.example:65535", Listen("host.example", 65535)),
    ],
)
def test_addresses_have_a_host_and_a_port(text: str, listen: Listen) -> None:
    assert parse_listen(text) == listen


@pytest.mark.parametrize("text", ["", "host", "host:", "h:65536", "::1", "h:-1", "h:x", "h:²"])
def test_bad_addresses_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="invalid address"):
        parse_listen(text)


def test_labels_are_pairs() -> None:
    assert parse_labels(["a=b", "c=d=e"]) == {"a": "b", "c": "d=e"}


@pytest.mark.parametrize("pairs", [["a"], ["=b"], ["a="], ["a=b", "a=c"]])
def test_bad_labels_are_refused(pairs: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_labels(pairs)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (4096, "4096 B"), (10240, "10 KiB"), (3 << 29, "1.5 GiB"), (100 << 30, "100 GiB")],
)
def test_sizes_are_shown_for_people(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


def test_the_option_wins_over_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LHBLOCK_DATA_DIR", str(tmp_path / "variable"))
    assert data_dir().path == tmp_path / "variable"
    assert data_dir(tmp_path / "option").path == tmp_path / "option"


def test_the_default_depends_on_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LHBLOCK_DATA_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert data_dir().path == Path("/var/lib/lhblock")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert data_dir().path == tmp_path / "lhblock"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert data_dir().path == tmp_path / "home" / ".local" / "share" / "lhblock"


def test_a_file_is_no_data_directory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(UsageError, match="is not a directory"):
        data_dir(path)


def test_the_data_directory_is_private(tmp_path: Path) -> None:
    where = DataDir(tmp_path / "a" / "b")
    where.prepare()
    where.prepare()
    for path in (where.path, where.volumes, where.run):
        assert path.stat().st_mode & 0o777 == 0o700


def test_a_file_in_the_way_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "volumes").touch()
    with pytest.raises(LhblockError, match="not a directory is there"):
        DataDir(tmp_path).prepare()


def test_options_win_over_variables_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LHBLOCK_QUEUES", "3")
    monkeypatch.setenv("LHBLOCK_CACHE", "none")
    found = serve_settings(queues="5", cache=None)
    assert (found.queues, found.cache, found.workers) == (5, "none", 16)


def test_a_bad_option_and_a_bad_variable_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"--queues '65': .*64"):
        serve_settings(queues="65")
    with pytest.raises(UsageError, match=r"--max-connections '0': .*1"):
        serve_settings(connections_max="0")
    with pytest.raises(UsageError, match="--cache 'writethrough'"):
        serve_settings(cache="writethrough")
    monkeypatch.setenv("LHBLOCK_WORKERS", "many")
    with pytest.raises(UsageError, match="LHBLOCK_WORKERS 'many'"):
        serve_settings()
