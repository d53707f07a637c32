"""What every command shares: the common options, and what they mean while it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lhblock.errors import UsageError
from lhblock.settings import DataDir, data_dir, debug_wanted

if TYPE_CHECKING:
    from lhblock.instance import Registry

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class App:
    """The common options of one run. They may stand before or after the command's name."""

    data_dir_option: str | None = None
    json: bool = False
    debug: bool = False
    volume_name: str = ""
    instance_name: str = ""
    engine_instance_name: str = ""

    @property
    def data_dir(self) -> DataDir:
        return data_dir(self.data_dir_option)

    @property
    def registry(self) -> Registry:
        from lhblock.instance import Registry

        return Registry(self.data_dir)

    def quiet_logs(self) -> None:
        """Send log lines of an engine opened in this process to stderr, warnings only."""
        from lhblock.instance import configure_logging

        configure_logging(debug=self.debug, json=self.json, quiet=not self.debug)


def find_app(context: click.Context) -> App:
    app = context.find_root().ensure_object(App)
    app.debug = app.debug or debug_wanted()
    return app


def _store(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    if value is not None and value is not False:
        assert parameter.name is not None
        name = "data_dir_option" if parameter.name == "data_dir" else parameter.name
        setattr(find_app(context), name, value)
    return value


def common_options(function: F) -> F:
    """Give a command ``--data-dir``, ``--json`` and ``--debug``, and an `App` as first argument."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return function(find_app(click.get_current_context()), *args, **kwargs)

    wrapped = update_wrapper(run, function)
    options = [
        click.option(
            "--data-dir",
            metavar="DIR",
            expose_value=False,
            callback=_store,
            help="Where volumes are kept.  [env: LHBLOCK_DATA_DIR]",
        ),
        click.option(
            "--json", is_flag=True, expose_value=False, callback=_store, help="Print JSON."
        ),
        click.option(
            "--debug",
            is_flag=True,
            expose_value=False,
            callback=_store,
            help="Show traces and debug logs.  [env: LHBLOCK_DEBUG]",
        ),
    ]
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]


def identity_options(function: F) -> F:
    """Names of volumes and instances, which Longhorn puts before the command."""
    options = [
        click.option(
            "--volume-name",
            metavar="NAME",
            expose_value=False,
            callback=_store,
            help="Volume that callers of this process, or the process called, must mean.",
        ),
        click.option(
            "--replica-instance-name",
            "instance_name",
            metavar="NAME",
            expose_value=False,
            callback=_store,
            help="The same for the instance of a replica.",
        ),
        click.option(
            "--engine-instance-name",
            metavar="NAME",
            expose_value=False,
            callback=_store,
            help="The same for the instance of a controller.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is lost.

    Raises:
      UsageError: nobody can be asked and ``--yes`` was not given.
      click.Abort: the answer was no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(f"{question} Nobody can be asked here; give --yes if you are sure")
    click.confirm(question, abort=True, err=True)
