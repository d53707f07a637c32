"""The command line on stopped volumes: results, JSON keys, one sentence per error."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog

from lhblock import __version__
from lhblock.cli._main import run


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.status == 0, self.err
        return json.loads(self.out)


@dataclass
class Cli:
    """Runs the command line in this process, on a data directory of its own."""

    data_dir: Path
    capture: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str) -> Outcome:
        self.capture.readouterr()
        status = run(["--data-dir", str(self.data_dir), *arguments])
        captured = self.capture.readouterr()
        return Outcome(status, captured.out, captured.err)

    def fails(self, status: int, *arguments: str) -> str:
        """The sentence of a command that must fail with `status` and print nothing else."""
        outcome = self(*arguments)
        assert outcome.status == status, outcome
        assert outcome.out == ""
        assert outcome.err.count("\n") == 1
        assert outcome.err.startswith("lhblock: ")
        assert "Traceback" not in outcome.err
        return outcome.err.removeprefix("lhblock: ").strip()


@pytest.fixture
def cli(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cli]:
    monkeypatch.delenv("LHBLOCK_DATA_DIR", raising=False)
    monkeypatch.delenv("LHBLOCK_DEBUG", raising=False)
    yield Cli(tmp_path / "data", capsys)
    # The commands send logs to a stream that is gone now.
    structlog.reset_defaults()


def test_version_is_printed_both_ways(cli: Cli) -> None:
    assert cli("--version").out == f"lhblock {__version__}\n"
    assert cli("version").out == f"lhblock {__version__}\n"
    assert cli("version", "--json").json == {"version": __version__}


def test_no_command_shows_the_help_and_is_wrong_usage(cli: Cli) -> None:
    assert run([]) == 2
    assert "Commands:" in cli.capture.readouterr().err
    assert "missing command" in cli.fails(2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("volume", "nonsense"),
        ("volume", "ls", "--nonsense"),
        ("volume", "create"),
        ("volume", "create", "db"),
        ("volume", "create", "db", "--size", "12x"),
        ("volume", "create", "db", "--size", "4097"),
        ("volume", "create", "x", "--size", "1M"),
        ("volume", "create", "db", "--size", "1M", "--cache", "maybe"),
        ("volume", "expand", "db", "0"),
        ("snapshot", "create", "db", "a/b"),
        ("snapshot", "create", "db", "s1", "--label", "x"),
        ("serve",),
        ("serve", "db"),
        ("serve", "db", "db", "--size", "1M"),
        ("serve", "db", "--size", "1M", "--listen", "nowhere"),
        ("serve", "db", "--size", "1M", "--queues", "0"),
        ("serve", "db", "--size", "1M", "--cache", "maybe"),
        ("serve", "db", "--size", "1M", "--driver", "epoll"),
        ("serve", "db", "--size", "1M", "--read-only"),
        ("serve", "db", "web", "--size", "1M", "--replica", "r"),
        ("completion", "tcsh"),
        ("bench", "db", "--write"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2_and_makes_nothing(cli: Cli, arguments: tuple[str, ...]) -> None:
    cli.fails(2, *arguments)
    assert not (cli.data_dir / "volumes" / "db").exists()


def test_a_volume_is_created_listed_shown_and_removed(cli: Cli) -> None:
    created = cli("volume", "create", "db", "--size", "8M", "--json").json
    assert (created["name"], created["size_bytes"], created["state"]) == ("db", 8 << 20, "stopped")
    assert cli("volume", "ls", "--json").json == {
        "data_dir": str(cli.data_dir),
        "volumes": [created],
    }
    shown = cli("volume", "info", "db", "--json").json
    assert (shown["state"], shown["serving"], shown["size_bytes"]) == ("healthy", False, 8 << 20)
    assert [item["mode"] for item in shown["replicas"]] == ["RW"]
    assert "db" in cli("volume", "ls").out
    assert cli("volume", "rm", "db", "--yes", "--json").json == {
        "removed": [{"name": "db", "kept": []}]
    }
    assert list((cli.data_dir / "volumes").iterdir()) == [cli.data_dir / "volumes" / ".lock"]


def test_an_empty_list_is_a_success(cli: Cli) -> None:
    outcome = cli("volume", "ls")
    assert (outcome.status, outcome.out) == (0, "")
    assert "no volumes" in outcome.err


def test_a_name_cannot_be_created_twice(cli: Cli) -> None:
    assert cli("volume", "create", "db", "--size", "1M").status == 0
    assert "exists already" in cli.fails(1, "volume", "create", "db", "--size", "1M")


@pytest.mark.parametrize(
    "arguments",
    [
        ("volume", "info", "db"),
        ("volume", "expand", "db", "1M"),
        ("volume", "rm", "db", "--yes"),
        ("snapshot", "ls", "db"),
        ("snapshot", "create", "db"),
        ("snapshot", "rm", "db", "s1"),
        ("snapshot", "revert", "db", "s1"),
        ("snapshot", "hash", "db", "s1"),
        ("scrub", "db"),
        ("bench", "db"),
    ],
    ids=" ".join,
)
def test_a_volume_that_is_not_there_is_a_sentence(cli: Cli, arguments: tuple[str, ...]) -> None:
    assert cli.fails(1, *arguments).startswith("volume db: there is none in ")


def test_removal_asks_and_nobody_can_answer_here(cli: Cli) -> None:
    cli("volume", "create", "db", "--size", "1M")
    assert "--yes" in cli.fails(2, "volume", "rm", "db")
    assert cli("volume", "info", "db").status == 0


def test_removal_of_several_is_refused_as_a_whole(cli: Cli) -> None:
    cli("volume", "create", "db", "--size", "1M")
    cli.fails(1, "volume", "rm", "db", "web", "--yes")
    assert cli("volume", "info", "db").status == 0


def test_a_replica_with_foreign_files_is_not_removed(cli: Cli) -> None:
    cli("volume", "create", "db", "--size", "1M")
    stranger = cli.data_dir / "volumes" / "db" / "replica" / "diary.txt"
    stranger.touch()
    assert "'diary.txt'" in cli.fails(1, "volume", "rm", "db", "--yes")
    stranger.unlink()
    assert cli("volume", "rm", "db", "--yes").status == 0


def test_replicas_stand_where_they_were_told_to(cli: Cli, tmp_path: Path) -> None:
    paths = [tmp_path / "r1", tmp_path / "r2"]
    paths[1].mkdir()
    options = [word for path in paths for word in ("--replica", str(path))]
    made = cli("volume", "create", "db", "--size", "1M", *options, "--json").json
    assert made["replicas"] == [str(path) for path in paths]
    assert cli("volume", "rm", "db", "--yes").status == 0
    assert not paths[0].exists()
    assert list(paths[1].iterdir()) == []  # it was there before


@pytest.mark.parametrize("foreign", ["file", "full", "parentless"])
def test_a_replica_that_cannot_be_made_leaves_nothing(
    cli: Cli, tmp_path: Path, foreign: str
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    if foreign == "file":
        bad.touch()
    elif foreign == "full":
        bad.mkdir()
        (bad / "photo.jpg").touch()
    else:
        bad = tmp_path / "missing" / "bad"
    sentence = cli.fails(
        1, "volume", "create", "db", "--size", "1M", "--replica", str(good), "--replica", str(bad)
    )
    assert str(bad) in sentence
    assert not good.exists()
    assert cli("volume", "ls", "--json").json["volumes"] == []


def test_an_existing_replica_is_adopted_and_survives_the_removal(cli: Cli, tmp_path: Path) -> None:
    replica = tmp_path / "r"
    cli("volume", "create", "db", "--size", "2M", "--replica", str(replica))
    (cli.data_dir / "volumes" / "db" / "volume.json").unlink()
    adopted = cli("volume", "create", "web", "--replica", str(replica), "--json").json
    assert adopted["size_bytes"] == 2 << 20
    removed = cli("volume", "rm", "web", "--yes", "--json").json
    assert removed == {"removed": [{"name": "web", "kept": [str(replica)]}]}
    assert (replica / "volume.meta").exists()


def test_an_adopted_replica_has_its_own_size(cli: Cli, tmp_path: Path) -> None:
    replica = tmp_path / "r"
    cli("volume", "create", "db", "--size", "2M", "--replica", str(replica))
    (cli.data_dir / "volumes" / "db" / "volume.json").unlink()
    sentence = cli.fails(2, "volume", "create", "web", "--size", "1M", "--replica", str(replica))
    assert "2097152 bytes" in sentence


def test_a_replica_belongs_to_one_volume(cli: Cli, tmp_path: Path) -> None:
    replica = tmp_path / "r"
    cli("volume", "create", "db", "--size", "1M", "--replica", str(replica))
    link = tmp_path / "link"
    link.symlink_to(replica)
    for path in (replica, link):
        sentence = cli.fails(2, "volume", "create", "web", "--replica", str(path))
        assert "is a replica of volume db" in sentence
    assert cli("volume", "rm", "db", "--yes").status == 0


def test_replicas_of_a_volume_are_apart(cli: Cli, tmp_path: Path) -> None:
    def create(*paths: str) -> str:
        options = [item for path in paths for item in ("--replica", str(tmp_path / path))]
        return cli.fails(2, "volume", "create", "db", "--size", "1M", *options)

    (tmp_path / "link").symlink_to("r1")
    assert "given twice" in create("r1", "link")
    assert "is inside" in create("r1", "r1/sub")
    assert "is inside" in create("r1/a/b", "r1")
    assert not (tmp_path / "r1").exists()


def test_a_damaged_record_is_listed_and_told(cli: Cli) -> None:
    cli("volume", "create", "db", "--size", "1M")
    (cli.data_dir / "volumes" / "db" / "volume.json").write_text("{")
    (row,) = cli("volume", "ls", "--json").json["volumes"]
    assert (row["state"], row["size_bytes"]) == ("damaged", None)
    assert "is damaged" in cli.fails(1, "volume", "info", "db")
    assert "is damaged" in cli.fails(1, "serve", "db")


def test_a_damaged_replica_is_a_sentence(cli: Cli) -> None:
    cli("volume", "create", "db", "--size", "1M")
    (cli.data_dir / "volumes" / "db" / "replica" / "volume.meta").write_text("{")
    assert "volume.meta" in cli.fails(1, "snapshot", "create", "db")


def test_a_stopped_volume_is_expanded(cli: Cli) -> None:
    cli("volume", "create", "db", "--size", "1M")
    assert cli("volume", "expand", "db", "3M", "--json").json == {
        "name": "db",
        "size_bytes": 3 << 20,
        "connections": 0,
    }
    assert cli("volume", "ls", "--json").json["volumes"][0]["size_bytes"] == 3 << 20
    assert cli.fails(1, "volume", "expand", "db", "1M") == (
        "volume db: it has 3 MiB and does not shrink; 1 MiB is less"
    )


def test_snapshots_of_a_stopped_volume(cli: Cli) -> None:
    cli("volume", "create", "db", "--size", "1M")
    assert cli("snapshot", "create", "db", "s1", "--label", "why=test").out == "s1\n"
    assert cli("snapshot", "create", "db", "s2", "--json").json == {"volume": "db", "name": "s2"}
    assert "already existing" in cli.fails(1, "snapshot", "create", "db", "s1")
    listed = cli("snapshot", "ls", "db", "--json").json
    assert [item["name"] for item in listed["snapshots"]] == ["s1", "s2", "volume-head"]
    assert listed["snapshots"][0] | {"created": ""} == {
        "name": "s1",
        "parent": None,
        "children": ["s2"],
        "created": "",
        "removed": False,
        "user_created": True,
        "labels": {"why": "test"},
        "size_bytes": 1 << 20,
        "allocated_bytes": 0,
    }
    assert "why=test" in cli("snapshot", "ls", "db").out
    assert cli("snapshot", "revert", "db", "s1").status == 0
    assert "s9 is not found" in cli.fails(1, "snapshot", "revert", "db", "s9")
    removed = cli("snapshot", "rm", "db", "s2", "--json").json
    assert removed == {"volume": "db", "removed": ["s2"]}
    # A stopped volume is merged before the command returns.
    listed = cli("snapshot", "ls", "db", "--json").json
    assert [item["name"] for item in listed["snapshots"]] == ["s1", "volume-head"]
    assert listed["merges_pending"] == 0


def test_hash_and_scrub_of_a_stopped_volume(cli: Cli) -> None:
    cli("volume", "create", "db", "--size", "1M")
    cli("snapshot", "create", "db", "s1")
    hashed = cli("snapshot", "hash", "db", "s1", "--json").json
    (checksum,) = hashed["checksums"]
    assert checksum["method"] == "crc64"
    assert len(checksum["checksum"]) == 16
    assert cli("scrub", "db", "--json").json == {
        "volume": "db",
        "verified": 1,
        "without_record": 0,
        "mismatches": [],
    }
    assert "cannot find snapshot s9" in cli.fails(1, "snapshot", "hash", "db", "s9")


def test_a_damaged_snapshot_is_found_and_is_status_1(cli: Cli) -> None:
    cli("volume", "create", "db", "--size", "1M")
    cli("snapshot", "create", "db", "s1")
    cli("snapshot", "hash", "db", "s1")
    replica = cli.data_dir / "volumes" / "db" / "replica"
    image = replica / "volume-snap-s1.img"
    record = replica / "volume-snap-s1.img.checksum"
    with image.open("r+b") as file:
        file.write(b"damage")
    # Damage by a disk does not change the ctime that the record names.
    from lhblock.replica import change_time_text

    document = json.loads(record.read_text())
    document["change_time"] = change_time_text(image.stat().st_ctime_ns)
    record.write_text(json.dumps(document))
    outcome = cli("scrub", "db")
    assert outcome.status == 1
    assert "damaged: s1" in outcome.out


def test_info_tells_the_driver_and_the_features(cli: Cli) -> None:
    document = cli("info", "--json").json
    assert document["driver"]["chosen"] in ("io_uring", "pool")
    assert document["driver"]["reason"]
    assert {"FIEMAP", "RWF_NOWAIT", "O_DIRECT", "nbd kernel module", "iSCSI"} == {
        item["name"] for item in document["features"]
    }
    assert not cli.data_dir.exists()
    assert "I/O driver:" in cli("info").out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_ask_lhblock(cli: Cli, shell: str) -> None:
    assert "_LHBLOCK_COMPLETE" in cli("completion", shell).out


def test_an_unexpected_error_is_one_sentence_and_debug_shows_the_trace(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lhblock.instance import Registry

    def broken(self: Registry) -> list[str]:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(Registry, "names", broken)
    sentence = cli.fails(1, "volume", "ls")
    assert "ZeroDivisionError: a defect" in sentence
    assert "--debug" in sentence
    assert "Traceback" in cli("volume", "ls", "--debug").err
    monkeypatch.setenv("LHBLOCK_DEBUG", "1")
    assert "Traceback" in cli("volume", "ls").err


def test_closed_standard_streams_are_no_files_of_ours(cli: Cli) -> None:
    command = f"{sys.executable} -m lhblock --data-dir {cli.data_dir} volume create db --size 1M"
    found = subprocess.run(
        ["/bin/sh", "-c", f"{command} <&- >&- 2>&-"], check=False, capture_output=True
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, b"", b"")
    written = [path for path in cli.data_dir.rglob("*") if path.is_file()]
    assert written
    assert not any(b"created db" in path.read_bytes() for path in written)


def test_an_interrupt_is_status_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lhblock.instance._features.machine_features", interrupt)
    outcome = cli("info")
    assert (outcome.status, outcome.out, outcome.err.strip()) == (130, "", "")


def test_a_data_directory_that_is_a_file_is_wrong_usage(cli: Cli) -> None:
    cli.data_dir.touch()
    assert "is not a directory" in cli.fails(2, "volume", "ls")


def test_replica_with_a_directory_is_the_process_and_with_a_verb_is_not(cli: Cli) -> None:
    assert "--listen" in cli("replica", "some/dir", "--help").out
    assert "--listen" in cli("replica", "./ls", "--help").out
    group = cli("replica", "--help").out
    assert "rebuild-status" in group
    assert "replica process" in group
    assert "no volume" not in cli("replica", "ls", "--help").out
    cli.fails(2, "replica", "ls")
    cli.fails(1, "replica", "ls", "nosuch")
