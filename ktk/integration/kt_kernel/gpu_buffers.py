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

from ktk.errors import BackendError
from ktk.experts.row_major import BF16, RowMajor, own_codes
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
        if self.moe.is_streamed:
            raise BackendError(
                f"layer {self.layer_idx} keeps only some of its experts in memory: GPU buffers are "
                "written from all; leave out max_resident_experts, or prompts on the GPU alone "
                "(--kt-gpu-prefill-token-threshold 0)"
            )
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
    ranks = len(addresses["w2_weight_ptrs"])
    gate, up, down = (
        RowMajor(stored.matrices[name], place, form, layout) for name in ("gate", "up", "down")
    )
    for rank in range(ranks):
        at, scales_at = (addresses[f"w13_{kind}_ptrs"][rank] for kind in ("weight", "scale"))
        for half in (gate, up):
            rows = _part(half.shape[0], rank, ranks)
            at = _write_codes(half, rows, slice(0, half.row_bytes), at)
            if half.scales is not None:
                scales = half.scales[_part(len(half.scales), rank, ranks)]
                scales_at = _copy(scales, scales_at)
        columns = _part(down.row_bytes, rank, ranks)
        _write_codes(down, slice(0, down.shape[0]), columns, addresses["w2_weight_ptrs"][rank])
        if down.scales is not None:
            columns = _part(down.scales.shape[1], rank, ranks)
            _copy(down.scales[:, columns], addresses["w2_scale_ptrs"][rank])


def _part(size: int, rank: int, ranks: int) -> slice:
    """A rank's of so many rows or columns, which ranks share equally; one rank has all."""
    return slice(rank * size // ranks, (rank + 1) * size // ranks)


def _memory(address: int, num_bytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))


def _write_codes(matrix: RowMajor, rows: slice, columns: slice, address: int) -> int:
    """A part of the codes to memory; where they end."""
    shape = rows.stop - rows.start, columns.stop - columns.start
    num_bytes = shape[0] * shape[1]
    matrix.write(rows, columns, _memory(address, num_bytes).reshape(shape))
    return address + num_bytes


def _copy(values: np.ndarray, address: int) -> int:
    """Rows of scales to memory; where they end."""
    _memory(address, values.nbytes).view(values.dtype).reshape(values.shape)[:] = values
    return address + values.nbytes
