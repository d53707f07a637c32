"""What commands need that are started with Longhorn's options."""

from __future__ import annotations

import click

from lhblock.errors import UsageError


class LonghornCommand(click.Command):
    """Takes ``--flag=true`` and ``--flag=false`` for options that are flags."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        flags = {
            name: option
            for option in self.params
            if isinstance(option, click.Option) and option.is_flag
            for name in option.opts
        }
        spelled = []
        for arg in args:
            name, equals, value = arg.partition("=")
            option = flags.get(name) if equals else None
            if option is None:
                spelled.append(arg)
            elif value.lower() in ("true", "t", "1"):
                spelled.append(name)
            elif value.lower() in ("false", "f", "0"):
                spelled.extend(option.secondary_opts[:1])
            else:
                raise UsageError(f"{name} {value!r}: give true or false")
        return super().parse_args(ctx, spelled)
