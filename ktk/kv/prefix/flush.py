"""A thread that saves new pages a while after they came."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from ktk.errors import CheckpointError
from ktk.log import warn_once


class Flusher:
    """Calls ``save`` so many seconds after ``wake``, until ``stop``."""

    def __init__(self, save: Callable[[], int], seconds: float) -> None:
        """save : a bound method, which this does not keep alive."""
        self._save, self._seconds = weakref.WeakMethod(save), seconds
        self._is_due, self._is_over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="ktk-kv-flush", daemon=True)
        self._thread.start()
        weakref.finalize(save.__self__, self._end)  # type: ignore[attr-defined]

    def wake(self) -> None:
        self._is_due.set()

    def stop(self) -> None:
        """No ``save`` runs or comes any more."""
        self._end()
        self._thread.join()

    def _end(self) -> None:
        self._is_over.set()
        self._is_due.set()

    def _run(self) -> None:
        while self._is_due.wait():
            if self._is_over.wait(self._seconds):
                return
            self._is_due.clear()
            save = self._save()
            if save is None:
                return
            try:
                save()
            except (OSError, CheckpointError) as error:
                warn_once("kv-flush", "KV pages are not saved, and will be tried again: %s", error)
