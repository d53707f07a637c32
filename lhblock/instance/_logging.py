"""Logs of the serving process: structlog to stderr, text for people, JSON when asked."""

from __future__ import annotations

import logging
import sys

import structlog


def configure_logging(*, debug: bool = False, json: bool = False, quiet: bool = False) -> None:
    """Send every log line of the process to stderr, from now on.

    Args:
      debug: include debug lines.
      quiet: warnings and worse only.
      json: one JSON object per line instead of ``time level event key=value``.
    """
    renderer: structlog.typing.Processor
    if json:
        renderer = structlog.processors.JSONRenderer()
    elif sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer()
    else:
        renderer = structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"])
    level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    processors: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if json or not sys.stderr.isatty():
        processors.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
