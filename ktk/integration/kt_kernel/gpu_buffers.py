"""One expert's weights into buffers of the GPU's ranks: what a prefill that runs on the GPU alone
reads, layer by layer.

Rank r of n has gate's and up's rows [r I/n, (r + 1) I/n), up behind gate, as w13, and down's
columns of the same numbers as w2; scales lie likewise in buffers of their own. I is the
intermediate size. Formats: ``ktk.experts.row_major``.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from functools import partial

import numpy as np

from ktk.experts.row_major import BF16, Rows, own_codes, row_major
from ktk.experts.stored import StoredExperts
from ktk.integration.kt_kernel.arguments import checked_int
from ktk.machine import queue as fifo
from ktk.machine import threads
from ktk.machine.threads import EngineLayout
from ktk.ops.streamed import AnyMoE

_BUFFERS = ("w13_weight_ptrs", "w13_scale_ptrs", "w2_weight_ptrs", "w2_scale_ptrs")


class WeightWriter:
    """The pair of calls, for a wrapper that has loaded its experts."""

    layer_idx: int

    def __init__(self) -> None:
        self._writes: deque[fifo.Ticket] = deque()

    @property
    def moe(self) -> AnyMoE:
        raise NotImplementedError

    def submit_write_weight_scale_to_buffer(
        self,
        gpu_tp_count: int,
        expert_id: int,
        w13_weight_ptrs: Sequence[int],
        w13_scale_ptrs: Sequence[int],
        w2_weight_ptrs: Sequence[int],
        w2_scale_ptrs: Sequence[int],
    ) -> None:
        """Queue one expert's copy into the ranks' buffers and return.

        Addresses are of memory that stays until the sync, one of each buffer for each rank; all
        scales' 0: the buffers are for bf16 weights, and any format is decoded. The sizes are the
        format's: nothing here can look at them.
        Raises RuntimeError before the weights are loaded, ValueError / TypeError naming the
        argument, or what these experts cannot be written as, BackendError for an absent one.
        """
        experts = self.moe.spec.num_experts
        ranks = checked_int("gpu_tp_count", gpu_tp_count)
        expert = checked_int("expert_id", expert_id, least=0)
        if expert >= experts:
            raise ValueError(f"expert_id={expert}: must be 0..{experts - 1}")
        given = (w13_weight_ptrs, w13_scale_ptrs, w2_weight_ptrs, w2_scale_ptrs)
        named = zip(_BUFFERS, given, strict=True)
        addresses = {name: _addresses(name, pointers, ranks) for name, pointers in named}
        stored = self.moe.runner.packed_expert(expert)
        place = stored.place(expert)
        form, layout = self._form(stored, addresses), threads.acquire(self)
        _check_cuts(stored, form, ranks)
        self._writes.append(fifo.submit(partial(_write, stored, place, form, addresses, layout)))

    def sync_write_weight_scale_to_buffer(self) -> None:
        """Wait until everything submitted is written.

        Raises RuntimeError if nothing is under way, else the first exception of a copy.
        """
        if not self._writes:
            raise RuntimeError("no write was submitted: nothing is under way")
        writes, self._writes = self._writes, deque()
        for ticket in writes:
            ticket.wait()
        for ticket in writes:
            ticket.take()

    def _form(self, stored: StoredExperts, addresses: dict[str, list[int]]) -> str:
        """What the buffers are for."""
        spec = stored.spec
        if not spec.has_gate or spec.has_bias:
            raise ValueError(
                f"layer {self.layer_idx} has has_gate={spec.has_gate}, has_bias={spec.has_bias}: "
                "GPU buffers are for experts with a gate and without biases"
            )
        scales = [at for name in ("w13_scale_ptrs", "w2_scale_ptrs") for at in addresses[name]]
        if not any(scales):
            return BF16
        forms = {own_codes(matrix) for matrix in stored.matrices.values()}
        if not all(scales) or None in forms or BF16 in forms or len(forms) > 1:
            raise ValueError(
                f"layer {self.layer_idx} holds {stored.types}, group_size={spec.group_size}, "
                f"rotation={spec.turns.width}: buffers with scales take fp8, or int4 in groups "
                "and not rotated; give all scales the address 0 and bf16 buffers"
            )
        form = forms.pop()
        assert form is not None
        return form


def _addresses(name: str, given: Sequence[int], ranks: int) -> list[int]:
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence) or len(given) != ranks:
        raise ValueError(f"{name}={given!r}: must be {ranks} addresses, one a rank")
    for at in given:
        if isinstance(at, bool) or not isinstance(at, (int, np.integer)):
            raise TypeError(f"{name}: address {at!r}: must be an int")
        if at < 0 or (at == 0 and "scale" not in name):
            raise ValueError(f"{name}: address {at}: must be that of a buffer")
    return [int(at) for at in given]


def _check_cuts(stored: StoredExperts, form: str, ranks: int) -> None:
    """ValueError unless every rank gets whole blocks of scales."""
    inner = stored.spec.intermediate_size
    step = 1 if form == BF16 else {"fp8": 128}.get(form, stored.down.group_size)
    if inner % ranks or (ranks > 1 and inner // ranks % step):
        raise ValueError(
            f"gpu_tp_count={ranks}: {inner} intermediate channels do not split into as many equal "
            f"parts of multiples of {step}"
        )


def _write(
    stored: StoredExperts,
    place: int,
    form: str,
    addresses: dict[str, list[int]],
    layout: EngineLayout,
) -> None:
    rows = {name: row_major(m, place, form, layout) for name, m in stored.matrices.items()}
    ranks = len(addresses["w2_weight_ptrs"])
    for rank in range(ranks):
        both = [_rows_of(rows[name], rank, ranks) for name in ("gate", "up")]
        down = _columns_of(rows["down"], rank, ranks)
        for head, parts in (("w13", both), ("w2", [down])):
            at = addresses[f"{head}_weight_ptrs"][rank], addresses[f"{head}_scale_ptrs"][rank]
            for codes, scales in parts:
                at = _copy(codes, at[0]), at[1] if scales is None else _copy(scales, at[1])


def _rows_of(rows: Rows, rank: int, ranks: int) -> tuple[np.ndarray, np.ndarray | None]:
    return _part(rows.codes, rank, ranks), _part_or_none(rows.scales, rank, ranks)


def _columns_of(rows: Rows, rank: int, ranks: int) -> tuple[np.ndarray, np.ndarray | None]:
    scales = None if rows.scales is None else rows.scales.T
    part = _part_or_none(scales, rank, ranks)
    return _part(rows.codes.T, rank, ranks).T, None if part is None else part.T


def _part(array: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    size = len(array) // ranks if ranks > 1 else len(array)
    return array[rank * size : (rank + 1) * size]


def _part_or_none(array: np.ndarray | None, rank: int, ranks: int) -> np.ndarray | None:
    return None if array is None else _part(array, rank, ranks)


def _copy(values: np.ndarray, address: int) -> int:
    """Write the rows to memory; where they end."""
    target = np.ctypeslib.as_array((ctypes.c_uint8 * values.nbytes).from_address(address))
    target.view(values.dtype).reshape(values.shape)[:] = values
    return address + values.nbytes
