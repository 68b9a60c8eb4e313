"""Exceptions ktk raises. Each message says what was given, what is allowed and what to do."""

from __future__ import annotations


class KtkError(Exception):
    """Base class of ktk's own errors."""


class CheckpointError(KtkError, ValueError):
    """A checkpoint is missing, malformed, truncated or does not hold what was asked for."""


class BackendError(KtkError, RuntimeError):
    """No backend (or not the one named) can run this MoE here; the message lists the reasons."""


class AwaitedInVain(BackendError):
    """An expert that was still being read when a call began could not be read; the call's output is
    to be forgotten.
    """


class EngineError(KtkError, RuntimeError):
    """The process-wide thread engine cannot serve the request (conflicting layout, fork)."""
