"""Logging: every module logs to the stdlib logger "ktk"; KTK_LOG sets its level.

ktk as a library leaves handlers to the application. The command line calls ``configure`` to write to stderr.
"""

from __future__ import annotations

import logging

from ktk import env

logger = logging.getLogger("ktk")


def configure() -> None:
    """Set the level from KTK_LOG and, unless the application has handlers, write to stderr.

    Safe to call again. Raises ValueError for an unknown KTK_LOG.
    """
    logger.setLevel(env.log_level().upper())
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("ktk %(levelname)s: %(message)s"))
        logger.addHandler(handler)
