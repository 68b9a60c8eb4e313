"""``DecoderLayer``: rows of new tokens through a whole decoder layer in one native call
(``_cy/kernels/decoder.c``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from ktk._cy import native_module
from ktk.errors import BackendError
from ktk.machine import cpu, openmp
from ktk.machine import threads as engine
from ktk.ops.components import Attention, Component, LatentAttention, Norm, RoutedExperts
from ktk.ops.linear import why_not as linear_why_not
from ktk.ops.streamed import StreamedMoE, Visit
from ktk.placement.residency.residents import TooManyExperts

MAX_COMPONENTS = 3  # of a branch
Shapes = tuple[tuple[int, int], tuple[int, int]]  # (heads, width) of keys and of values

CACHED_DTYPES = ("f", "e", "H", "b")  # of keys and values, by NumPy's dtype.char
PAGE_STEP = 16  # tokens of a page are a multiple of it, where there are several
ROW_SCALE = 4  # bytes of an int8 row behind its codes: a float32, KTK_ROW_SCALE in ktk_kernels.h


def row_width(width: int, dtype: np.dtype[Any]) -> int:
    """Elements that a key or value of so many numbers takes in the cache.

    Of int8 a row is its codes, then its scale: amax / 127 of the row, codes half to even, as of
    activations (``reference/linear.py``).
    """
    return width + ROW_SCALE if dtype == np.int8 else width


@dataclass(frozen=True, eq=False)
class Branch:
    """residual += multiplier * output_norm(sum of what the components make of norm(residual)),
    added in their order.
    """

    components: tuple[Component, ...]
    norm: Norm | None = None
    output_norm: Norm | None = None
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= len(self.components) <= MAX_COMPONENTS:
            raise ValueError(
                f"a branch of {len(self.components)} components: must have 1..{MAX_COMPONENTS}"
            )
        hidden = self.hidden_size
        for component in self.components:
            if component.hidden_size != hidden:
                raise ValueError(
                    f"a {component.kind} of hidden size {component.hidden_size} beside one of "
                    f"{hidden}"
                )
        for name in ("norm", "output_norm"):
            if (norm := getattr(self, name)) is not None:
                norm.check(name, hidden)

    @property
    def hidden_size(self) -> int:
        return self.components[0].hidden_size


@dataclass(frozen=True, eq=False)
class DecoderSpec:
    """A decoder layer: branches of a residual stream, one of which attends.

    Raises ValueError if shapes do not fit.
    """

    branches: tuple[Branch, ...]

    def __post_init__(self) -> None:
        sizes = {branch.hidden_size for branch in self.branches}
        if len(sizes) != 1:
            raise ValueError(f"branches of hidden sizes {sorted(sizes)}: must be one size")
        if sum(isinstance(c, Attention | LatentAttention) for c in self.components) != 1:
            raise ValueError("a layer must have one component that attends")

    @cached_property
    def components(self) -> tuple[Component, ...]:
        return tuple(c for branch in self.branches for c in branch.components)

    @property
    def hidden_size(self) -> int:
        return self.branches[0].hidden_size

    @cached_property
    def attention(self) -> Attention | LatentAttention:
        return next(c for c in self.components if isinstance(c, Attention | LatentAttention))

    def mapped(self, change: Callable[[Component], Component | None]) -> DecoderSpec:
        """With each component changed, or left out where ``change`` gives None;
        a branch without any is left out, too.
        """
        branches = []
        for branch in self.branches:
            changed = [change(c) for c in branch.components]
            if left := tuple(c for c in changed if c is not None):
                branches.append(replace(branch, components=left))
        return replace(self, branches=tuple(branches))

    def __deepcopy__(self, memo: dict[int, object]) -> DecoderSpec:
        return self  # nothing of it changes


class Pages:
    """Where the keys and values of one sequence lie in a layer, in pages of equally many tokens.

    keys, values : a page each, arrays (heads, page_tokens, ``row_width``) of one dtype and of the
    same strides, each row contiguous; page_tokens a multiple of 16 where there is more than one.
    float32, float16, bf16 bits as uint16, or int8. Raises ValueError. The arrays must outlive this.
    """

    def __init__(self, keys: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> None:
        if not keys or len(keys) != len(values):
            raise ValueError(
                f"{len(keys)} pages of keys, {len(values)} of values: must be as many, at least one"
            )
        self.page_tokens = keys[0].shape[1]
        if len(keys) > 1 and self.page_tokens % PAGE_STEP:
            raise ValueError(
                f"pages of {self.page_tokens} tokens: must be a multiple of {PAGE_STEP}"
            )
        self.dtype, self.num_tokens = keys[0].dtype, self.page_tokens * len(keys)
        more = row_width(0, self.dtype)
        first_of = keys[0].shape, values[0].shape
        self.shapes: Shapes = tuple((shape[0], shape[2] - more) for shape in first_of)  # type: ignore[assignment]
        if self.dtype.char not in CACHED_DTYPES:
            raise ValueError(
                f"keys and values of {self.dtype}: must be float32, float16, uint16 (bf16) or int8"
            )
        row: list[Any] = []
        self._tables = []
        for name, pages in (("keys", keys), ("values", values)):
            first = pages[0]
            for page in pages:
                if (page.shape, page.dtype, page.strides) != (
                    first.shape,
                    self.dtype,
                    first.strides,
                ):
                    raise ValueError(f"{name}: pages must have one shape, dtype and strides")
                if page.strides[2] != page.itemsize or not page.flags.writeable:
                    raise ValueError(f"{name}: each row must be contiguous and writeable")
            if first.shape[1] != self.page_tokens:
                raise ValueError(
                    f"{name}: pages of {first.shape[1]} tokens, those of keys have "
                    f"{self.page_tokens}"
                )
            table = np.array([page.ctypes.data for page in pages], np.uintp)
            self._tables.append(table)
            strides = (stride // first.itemsize for stride in first.strides[:2])
            row += [table.ctypes.data, *strides]
        # As native.DecoderLayer.forward takes it.
        self.native = (*row, self.page_tokens, self.dtype.char)

    @classmethod
    def at(
        cls,
        keys: np.ndarray,
        values: np.ndarray,
        shapes: Shapes,
        page_tokens: int,
        dtype: np.dtype,
    ) -> Pages:
        """Pages by their addresses, uintp, each contiguous (heads, page_tokens, ``row_width``).

        shapes : (heads, width) of keys and of values. page_tokens : a multiple of 16. dtype : as of
        arrays.
        """
        self = cls.__new__(cls)
        self.page_tokens, self.dtype, self.shapes = page_tokens, dtype, shapes
        self.num_tokens = page_tokens * len(keys)
        self._tables = [np.ascontiguousarray(keys), np.ascontiguousarray(values)]
        row: list[Any] = []
        for table, (_, width) in zip(self._tables, shapes, strict=True):
            stride = row_width(width, dtype)
            row += [table.ctypes.data, page_tokens * stride, stride]
        self.native = (*row, page_tokens, dtype.char)
        return self


class PageTables(tuple[Pages, ...]):
    """One sequence's pages in every layer."""

    @cached_property
    def native(self) -> Any:
        """As ``run_layers`` takes them, made once."""
        return native_module().PageTables([pages.native for pages in self])


def look_ahead(specs: Sequence[DecoderSpec]) -> None:
    """Let each layer of experts that come and go ask the router of the next one."""
    routed = [c for spec in specs for c in spec.components if isinstance(c, RoutedExperts)]
    for one, following in pairwise(routed):
        experts = one.experts
        if isinstance(experts, StreamedMoE) and experts.following is following.experts:
            experts.foresight.follow(following)


class DecoderLayer:
    """A ``DecoderSpec`` ready to run on the process-wide engine.

    BackendError if the experts' kernels are not ktk's own in C.
    """

    def __init__(self, spec: DecoderSpec, num_threads: int | None = None) -> None:
        if reason := linear_why_not():
            raise BackendError(f"ktk.ops.decoder.DecoderLayer cannot run here: {reason}")
        native: Any = native_module()
        routed = [c.experts for c in spec.components if isinstance(c, RoutedExperts)]
        self.is_streamed = any(moe.is_streamed for moe in routed)
        for moe in routed:
            if not isinstance(getattr(moe.runner, "experts", None), native.Experts):
                raise BackendError(f"{moe.backend} has no native experts to call")
        self.spec = spec
        threads = engine.acquire(self, num_threads)
        if openmp.is_pending:
            openmp.borrow(native)
        new_visit = Visit if self.is_streamed else None
        self.native = native.DecoderLayer(spec, cpu.best_isa(), threads, new_visit)

    def forward(
        self,
        hidden: np.ndarray,
        cosines: np.ndarray,
        sines: np.ndarray,
        pages: Sequence[Pages],
        sequence: Sequence[int],
        position: Sequence[int],
        chosen: np.ndarray | None = None,
    ) -> np.ndarray:
        """Write each row's key and value at its position in its sequence, and attend to those up to
        it.

        hidden : (rows, hidden_size), float32, float16 or bf16 bits as uint16. cosines, sines :
        float32 (rows, rotary.dim / 2). pages : of each sequence. sequence, position : of each row,
        an index of pages and a place among its tokens, no two rows the same. chosen : contiguous
        int64 (rows, top_k), where the experts of each are left. Returns (rows, hidden_size) in
        hidden's dtype. A row has the same bits whatever other rows, pages and threads there are.
        Raises ValueError for what does not fit.
        """
        attention, rows = self.spec.attention, len(hidden)
        wanted: dict[str, tuple[np.ndarray, tuple[int, ...], Any]] = {
            "hidden": (hidden, (rows, self.spec.hidden_size), hidden.dtype),
            "cosines": (cosines, (rows, attention.rotary.dim // 2), np.float32),
            "sines": (sines, (rows, attention.rotary.dim // 2), np.float32),
        }
        for name, (array, shape, dtype) in wanted.items():
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"{name} is {array.dtype} {array.shape}: must be {np.dtype(dtype)} {shape}"
                )
        for table in pages:
            if table.shapes != attention.cached_shapes:
                raise ValueError(
                    f"keys and values are (heads, width) {table.shapes}: must be "
                    f"{attention.cached_shapes}"
                )
        places = set(zip(sequence, position, strict=True))
        if not rows == len(sequence) == len(places):
            raise ValueError(f"{rows} rows at {len(places)} places: must be as many, at least one")
        for index, place in places:
            if not 0 <= index < len(pages) or not 0 <= place < pages[index].num_tokens:
                raise ValueError(f"sequence={index}, position={place}: has no place in the pages")
        out = np.empty_like(hidden)
        hidden, cosines, sines = (np.ascontiguousarray(a) for a in (hidden, cosines, sines))
        self.run(
            hidden.dtype,
            (hidden.ctypes.data, cosines.ctypes.data, sines.ctypes.data, out.ctypes.data),
            [table.native for table in pages],
            sequence,
            position,
            chosen,
        )
        return out

    __call__ = forward

    def run(
        self,
        dtype: np.dtype[Any],
        addresses: tuple[int, int, int, int],
        tables: list[Any],
        sequence: Sequence[int],
        position: Sequence[int],
        chosen: np.ndarray | None = None,
    ) -> None:
        """``forward`` of what the caller has checked. dtype : of hidden. addresses : of hidden,
        cosines, sines and the output. tables : ``Pages.native`` of each sequence.

        Rows that together use more experts than fit into memory go in halves: a row has the same
        bits whatever the others are.
        """
        rows, (hidden, cosines, sines, out) = len(sequence), addresses
        try:
            self.native.forward(
                dtype.char, rows, hidden, cosines, sines, tables, sequence, position, out, chosen
            )
        except TooManyExperts:
            if rows == 1:
                raise
            half = rows // 2
            row, turns = (
                self.spec.hidden_size * dtype.itemsize,
                4 * (self.spec.attention.rotary.dim // 2),
            )
            behind = (
                hidden + half * row,
                cosines + half * turns,
                sines + half * turns,
                out + half * row,
            )
            for part, own in ((slice(half), addresses), (slice(half, rows), behind)):
                left = None if chosen is None else chosen[part]
                self.run(dtype, own, tables, sequence[part], position[part], left)

    def __deepcopy__(self, memo: dict[int, object]) -> DecoderLayer:
        return self  # nothing of it changes


def run_layers(
    layers: Sequence[DecoderLayer],
    dtype: np.dtype[Any],
    hidden: int,
    turns: Sequence[tuple[int, int]],
    tables: Sequence[PageTables],
    sequence: np.ndarray,
    position: np.ndarray,
) -> None:
    """Rows through layers one after the other, in one native call; the caller has checked them.

    layers : none with experts that come and go. dtype, hidden : of the rows, and their address;
    they are overwritten. turns : of each layer (address of cosines, of sines). tables : of each
    sequence. sequence, position : of each row, contiguous int32 and int64. A row has the bits that
    ``DecoderLayer.forward`` gives it.
    """
    native: Any = native_module()
    own = [layer.native for layer in layers]
    of_sequences = [table.native for table in tables]
    native.run_layers(own, dtype.char, hidden, turns, of_sequences, sequence, position)
