"""Bytes between the processes that share a layer's experts, and what happens when one is gone.

torch.distributed with gloo: over one machine's memory or a network, the same calls.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ktk import fork
from ktk.errors import EngineError

DEFAULT_TIMEOUT = 60.0


class Exchange:
    """The ranks of a process group, in all-to-all calls; one for all layers of a model.

    Making one is a collective call of all processes of torch.distributed, as are its methods of the
    group's, in the same order everywhere. From one thread at a time.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup or None
        Whose ranks take part; None: all.
    timeout : float
        Seconds after which a rank that does not answer counts as lost, in every call.

    Raises EngineError if torch.distributed has not been started. A call in which a rank is lost is
    an EngineError on all others within the timeout, and so is at once every later call.
    """

    def __init__(self, group: Any = None, timeout: float = DEFAULT_TIMEOUT) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise EngineError(
                "torch.distributed is not started: call torch.distributed.init_process_group "
                "first, or start the program with torchrun"
            )
        if not 0 < timeout < 1e6:
            raise ValueError(f"timeout={timeout}: must be seconds, more than 0")
        members = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
        self.timeout = timeout
        self.lost: str | None = None
        self._made_in = fork.process()
        limit = datetime.timedelta(seconds=timeout)
        self._group = dist.new_group(members, timeout=limit, backend="gloo")
        self.ranks = len(members)
        self.rank = dist.get_group_rank(self._group, dist.get_rank())
        self.bytes_sent = 0  # to other ranks, since this was made

    def numbers(self, own: np.ndarray) -> np.ndarray:
        """Row r of each rank's goes to rank r. own : int64 (ranks, n). Returns what came, row r
        from rank r.
        """
        found = np.empty_like(own)
        self._all_to_all(found, own, None, None)
        return found

    def swap(self, parts: Sequence[np.ndarray], sizes: Sequence[int]) -> list[np.ndarray]:
        """parts[r] goes to rank r. parts : uint8 (bytes,) each. sizes : bytes that come from each
        rank. Returns what came, uint8 (sizes[r],) from rank r.
        """
        sent = [len(part) for part in parts]
        found = np.empty(sum(sizes), np.uint8)
        self._all_to_all(found, np.concatenate(parts), list(sizes), sent)
        return np.split(found, np.cumsum(sizes)[:-1])

    def _all_to_all(
        self,
        found: np.ndarray,
        own: np.ndarray,
        sizes: list[int] | None,
        sent: list[int] | None,
    ) -> None:
        if self._made_in != fork.process():
            raise EngineError("made before fork(): the connections belong to the parent process")
        if self.lost is not None:
            raise EngineError(self.lost)
        here = own.nbytes // self.ranks if sent is None else sent[self.rank]
        self.bytes_sent += own.nbytes - here
        try:
            tensors = torch.from_numpy(found), torch.from_numpy(own)
            dist.all_to_all_single(*tensors, sizes, sent, group=self._group)
        except RuntimeError as error:
            first = str(error).partition("\n")[0]
            self.lost = (
                f"a rank of {self.ranks} is gone, or did not answer for {self.timeout:g} s; rank "
                f"{self.rank} heard: {first}. Start all ranks again"
            )
            raise EngineError(self.lost) from error
