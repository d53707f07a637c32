"""``lhblock install-units``: the systemd units, with the paths of this installation filled in."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

import click

from lhblock.cli._app import App, common_options
from lhblock.cli._output import note, print_json
from lhblock.errors import LhblockError

MARK: Final = (
    "# Written by 'lhblock install-units'. Changes belong in drop-ins: systemctl edit UNIT\n"
)
UNITS: Final = (
    "lhblock@.service",
    "lhblock@.socket",
    "lhblock-replica@.service",
    "lhblock-controller@.service",
    "lhblock-mount-fuse.service",
)
# The kernel's devices are root's.
SYSTEM_UNITS: Final = ("lhblock-attach@.service",)
HARDENING: Final = "hardening.inc"
SYSTEM_DIRECTORY: Final = Path("/etc/systemd/system")


@dataclass(frozen=True)
class Places:
    """What differs between the units of the system and of a user."""

    directory: Path
    settings: str
    sockets: str
    target: str
    names: tuple[str, ...]


@click.command()
@click.option("--user", is_flag=True, help="Units of this user's own systemd; no block devices.")
@click.option(
    "--dir",
    "directory",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where to write them.  [default: /etc/systemd/system, for --user ~/.config/systemd/user]",
)
@common_options
def install_units(app: App, user: bool, directory: Path | None) -> None:
    """Write the systemd units of lhblock, for this data directory and this installation.

    \b
    lhblock@VOLUME.service, .socket   serve a volume; a Unix socket in /run/lhblock
    lhblock-attach@VOLUME.service     its block device, for mounts at boot
    lhblock-replica@NAME.service      a replica for an engine elsewhere
    lhblock-controller@VOLUME.service an engine that is driven by calls
    lhblock-mount-fuse.service        every served volume as a file

    Units written before are written anew; others of these names are left alone, and it is an
    error.
    """
    places = _places(directory, user=user)
    texts = {name: unit_text(name, app, places, user=user) for name in places.names}
    for name in texts:
        _refuse_foreign(places.directory / name)
    try:
        places.directory.mkdir(parents=True, exist_ok=True)
        written = [_write(places.directory / name, text) for name, text in texts.items()]
    except OSError as error:
        raise LhblockError(f"cannot write {error.filename}: {error.strerror}") from error
    paths = [str(places.directory / name) for name in texts]
    if app.json:
        print_json({"units": paths, "changed": any(written)})
        return
    for path in paths:
        click.echo(path)
    if any(written):
        reload = "systemctl --user daemon-reload" if user else "systemctl daemon-reload"
        note(f"now run: {reload}")


def unit_text(name: str, app: App, places: Places, *, user: bool) -> str:
    """One unit with everything filled in."""
    source = resources.files("lhblock.cli").joinpath("units")
    text = source.joinpath(name).read_text()
    hardening = source.joinpath(HARDENING).read_text().rstrip()
    values = {
        # A user's systemd may not do these things.
        "@HARDENING@\n": "" if user else hardening + "\n",
        "@LHBLOCK@": " ".join(quoted(word) for word in our_command()),
        "@DATA_DIR@": quoted(f"LHBLOCK_DATA_DIR={app.data_dir.path}"),
        "@SETTINGS@": places.settings,
        "@SOCKETS@": places.sockets,
        "@TARGET@": places.target,
    }
    for key, value in values.items():
        text = text.replace(key, value)
    return MARK + text


def quoted(word: str) -> str:
    """A word as systemd reads it: specifiers and variables escaped, in quotes if need be."""
    word = word.replace("%", "%%").replace("$", "$$")
    if not any(sign in word for sign in " \t'\"\\;"):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def our_command() -> list[str]:
    """How this installation is called, by absolute paths."""
    script = Path(sys.executable).parent / "lhblock"
    if script.exists():
        return [str(script)]
    return [sys.executable, "-m", "lhblock"]


def _places(directory: Path | None, *, user: bool) -> Places:
    if user:
        config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        default, settings, sockets = config / "systemd" / "user", "%E/lhblock", "%t/lhblock"
        return Places(directory or default, settings, sockets, "default.target", UNITS)
    names = (*UNITS, *SYSTEM_UNITS)
    return Places(
        directory or SYSTEM_DIRECTORY, "/etc/lhblock", "/run/lhblock", "multi-user.target", names
    )


def _refuse_foreign(path: Path) -> None:
    try:
        found = path.read_text(errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise LhblockError(f"cannot read {path}: {error.strerror}") from error
    if not found.startswith(MARK):
        raise LhblockError(
            f"{path} was not written by lhblock; move it away, or choose another --dir"
        )


def _write(path: Path, text: str) -> bool:
    """Write a unit if it differs, in one step. True: it did."""
    if path.exists() and path.read_text(errors="replace") == text:
        return False
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.chmod(0o644)
    scratch.rename(path)
    return True
