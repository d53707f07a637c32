"""The top of the command line, and what becomes of every error."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from lhblock import __version__
from lhblock.cli._app import App, common_options, identity_options
from lhblock.cli._lazy import LazyGroup
from lhblock.errors import LhblockError
from lhblock.settings import debug_wanted

INTERRUPTED = 130

_COMMANDS = {
    "serve": ("lhblock.cli._serve", "serve", "Serve volumes over NBD until stopped."),
    "controller": (
        "lhblock.cli._controller",
        "controller",
        "The engine of one volume with replicas elsewhere, controlled over gRPC.",
    ),
    "replica": (
        "lhblock.cli._replicas",
        "replica",
        "Replicas of a volume: add, rm, ls, rebuild-status; or serve one.",
    ),
    "volume": ("lhblock.cli._volume", "volume", "Create, list, show, expand, remove volumes."),
    "snapshot": ("lhblock.cli._snapshot", "snapshot", "Snapshots of a volume, served or not."),
    "attach": ("lhblock.cli._attach", "attach", "Make a volume a block device of this host."),
    "detach": ("lhblock.cli._attach", "detach", "Take the block device of a volume away."),
    "mount-fuse": (
        "lhblock.cli._mount_fuse",
        "mount_fuse",
        "Show every served volume as a file in a directory.",
    ),
    "install-units": ("lhblock.cli._install_units", "install_units", "Write systemd units."),
    "scrub": ("lhblock.cli._snapshot", "scrub", "Check snapshots against their checksums."),
    "bench": ("lhblock.cli._bench", "bench", "Measure a volume's speed on this machine."),
    "info": ("lhblock.cli._info", "info", "Versions, I/O driver, kernel features."),
    "completion": ("lhblock.cli._completion", "completion", "Print a shell completion script."),
    "version": ("lhblock.cli._info", "version", "Print the version."),
}


@click.group(
    cls=LazyGroup,
    lazy=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="lhblock", message="%(prog)s %(version)s")
@identity_options
@common_options
def cli(_app: App) -> None:
    """Replicated, thin, snapshotted block volumes in user space, served over NBD.

    \b
    lhblock serve db --size 100G          create a volume and serve it
    lhblock volume ls                     what there is
    lhblock snapshot create db s1         on a served or stopped volume

    --data-dir, --json and --debug may also stand after the command. Volumes are kept in
    /var/lib/lhblock for root, in ~/.local/share/lhblock for others.

    Exit status: 0 done; 1 it failed, with one sentence on standard error; 2 wrong usage, and
    nothing was done; 130 interrupted.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 for a failure, 2 for a wrong usage."""
    _fill_standard_streams()
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def _fill_standard_streams() -> None:
    """Open ``/dev/null`` for each standard stream that the caller closed.

    Its number would go to the next file opened, an image perhaps, and what is meant for the
    stream would be written there.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for name, fd in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "r" if fd == 0 else "w", closefd=False))  # noqa: SIM115


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit status. Errors are one sentence on stderr."""
    debug = debug_wanted() or "--debug" in arguments
    try:
        result = cli.main(args=list(arguments), prog_name="lhblock", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.UsageError as error:
        return _usage(error)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except click.Abort as error:
        # click makes this of an interrupt, too.
        if isinstance(error.__cause__, KeyboardInterrupt):
            return INTERRUPTED
        return _fail("aborted; nothing was done", 1)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone. Keep the interpreter from flushing into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as raised:
        return _explain(raised, debug=debug)


def _explain(raised: Exception, *, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(raised)
    error: BaseException = raised
    if isinstance(raised, BaseExceptionGroup):
        from lhblock.instance import first_sentence

        error = first_sentence(raised)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, LhblockError):
        return _fail(str(error), error.exit_status)
    kind = type(error).__name__
    text = str(error) or "no details"
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    hint = "" if debug else "; run it again with --debug to see the trace"
    return _fail(f"unexpected {kind}: {text}{hint}", 1)


def _usage(error: click.UsageError) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return 2
    sentence = error.format_message().rstrip(".").replace("\n", " ")
    where = error.ctx.command_path if error.ctx else "lhblock"
    return _fail(f"{sentence[:1].lower()}{sentence[1:]}; see '{where} --help'", 2)


def _fail(sentence: str, status: int) -> int:
    one_line = " ".join(sentence.split())
    click.echo(f"lhblock: {one_line}", err=True)
    return status
