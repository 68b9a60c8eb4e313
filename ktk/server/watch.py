"""Live counts of which experts tokens go to, for the page: counted only while somebody looks.

Counting takes some microseconds a layer and pass. Who asks for the counts has them counted for
LEASE seconds more; then nothing hangs on the model again. While a recording runs
(``distribution.py``) its counts are shown, and nothing else is counted.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ktk.integration.transformers.expert_statistics import ExpertStatistics

LEASE = 10.0  # seconds


class ExpertWatch:
    """From one event loop.

    recording : of the same model, whoever starts and stops it calls ``release`` first; or why there
    can be none. own : another one of the same model, None where there can be none.
    """

    def __init__(
        self, recording: ExpertStatistics | str, own: ExpertStatistics | None, lease: float = LEASE
    ) -> None:
        self._recording, self._own, self._lease = recording, own, lease
        self._end: asyncio.TimerHandle | None = None

    @property
    def is_counting(self) -> bool:
        return self._end is not None

    def look(self) -> dict[str, Any]:
        """counts : of each layer with experts, uses of each expert; passes : that were counted.
        Both are since somebody began to look, or since the recording began. reason : None, or why
        there are no counts.
        """
        if isinstance(self._recording, str) or self._own is None:
            return {"layers": [], "counts": [], "passes": 0, "reason": str(self._recording)}
        if self._recording.recorder.is_recording:
            shown = self._recording.recorder
        else:
            shown = self._own.recorder
            self._extend(self._own)
        grid = shown.grid
        return {
            "layers": list(grid.moe_layers),
            "counts": shown.counts()[grid.rows].tolist(),
            "passes": shown.num_passes,
            "reason": None,
        }

    def release(self) -> None:
        """Count no more: the model's experts are somebody else's to listen to."""
        if self._end is not None and self._own is not None:
            self._end.cancel()
            self._end = None
            self._own.stop()

    def _extend(self, own: ExpertStatistics) -> None:
        if self._end is None:
            own.start()
        else:
            self._end.cancel()
        self._end = asyncio.get_running_loop().call_later(self._lease, self.release)
