"""``lhblock completion``: a script for the shell, which asks ``lhblock`` for the words."""

from __future__ import annotations

import click

from lhblock.cli._app import App, common_options
from lhblock.cli._output import print_json

_VARIABLE = "_LHBLOCK_COMPLETE"


@click.command()
@click.argument("shell", metavar="SHELL", type=click.Choice(["bash", "zsh", "fish"]))
@common_options
def completion(app: App, shell: str) -> None:
    """Print the completion script for SHELL: bash, zsh or fish.

    \b
    bash:  lhblock completion bash > /etc/bash_completion.d/lhblock
    zsh:   lhblock completion zsh > "${fpath[1]}/_lhblock"
    fish:  lhblock completion fish > ~/.config/fish/completions/lhblock.fish
    """
    from click.shell_completion import get_completion_class

    from lhblock.cli._main import cli

    chosen = get_completion_class(shell)
    assert chosen is not None
    maker = chosen(cli, {}, "lhblock", _VARIABLE)
    # Not maker.source(): for bash it runs bash to learn its version.
    script = maker.source_template % maker.source_vars()
    if app.json:
        print_json({"shell": shell, "script": script})
    else:
        click.echo(script)
