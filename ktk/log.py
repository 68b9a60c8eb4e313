"""Logging: every module logs to the stdlib logger "ktk"; KTK_LOG sets its level.

ktk as a library leaves handlers to the application. The command line calls ``configure`` to write
to stderr.
"""

from __future__ import annotations

import logging

from ktk import env

logger = logging.getLogger("ktk")
_warned: set[str] = set()


def configure() -> None:
    """Set the level from KTK_LOG and, unless the application has handlers, write to stderr.

    Safe to call again. Raises ValueError for an unknown KTK_LOG.
    """
    logger.setLevel(env.log_level().upper())
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("ktk %(levelname)s: %(message)s"))
        logger.addHandler(handler)


def warn_once(what: str, message: str, *arguments: object) -> None:
    """A warning that stands for all that follow: one for each ``what`` and process.

    message : as the logger formats it.
    """
    if what not in _warned:
        _warned.add(what)
        logger.warning(message, *arguments)


def forget_warnings() -> None:
    """For tests: the next ``warn_once`` of everything warns again."""
    _warned.clear()
