"""What makes a model fast here, each with a yes or the reason why not: for ``ktk doctor``,
the server and its chat page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ktk import backends
from ktk.integration.transformers.decoder_layers import fusion_report, some
from ktk.integration.transformers.experts import find_experts, handle_of
from ktk.machine import cpu
from ktk.machine.memory import huge_share
from ktk.ops.streamed import AnyMoE, StreamedMoE

AMX, REPACKED, HUGE_PAGES = "AMX", "repacked", "huge pages"
ALL_RESIDENT = "all experts in memory"
ENOUGH_HUGE = 0.9  # of the experts' memory: its last pages may be small ones


@dataclass(frozen=True)
class FastPath:
    """One of ``fast_paths``.

    reason : why it is not taken, None: it is. detail : how far it is, e.g. "30 of 30 layers".
    """

    name: str
    reason: str | None
    detail: str = ""

    @property
    def is_taken(self) -> bool:
        return self.reason is None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "taken": self.is_taken,
            "reason": self.reason,
            "detail": self.detail,
        }


def run_paths(model: Any, batching: str | None, native: str | None = None) -> list[FastPath]:
    """How a model that ``open_model`` opened generates; some of it shows only once it has made a
    few tokens.

    batching : why a server answers its requests one by one, None if it batches them. native : why
        torch runs the decoder layers of a batch, None if ktk does or there are none.
    """
    fused = _fused(model)
    if fused.is_taken and batching is None and native is not None:
        fused = FastPath(fused.name, f"torch runs the layers of a batch: {native}")
    return [fused, FastPath("batching", batching)]


def memory_paths(model: Any) -> list[FastPath]:
    """What runs its experts, and how they lie in memory."""
    moes = [handle.moe for _, m in find_experts(model) if (handle := handle_of(m)) is not None]
    if not moes:
        return [FastPath(name, "ktk runs no experts of it") for name in (AMX, REPACKED, HUGE_PAGES)]
    return [_amx(moes), _repacked(moes), _huge_pages(moes), *_streamed(moes)]


def _streamed(moes: list[AnyMoE]) -> list[FastPath]:
    """Nothing where all experts are in memory."""
    slots = next((moe.slots for moe in moes if isinstance(moe, StreamedMoE)), None)
    if slots is None:
        return []
    room, all_of = slots.capacity, sum(moe.spec.num_experts for moe in moes)
    reason = None if room == all_of else "expert memory is limited: others are read from the disk"
    return [FastPath(ALL_RESIDENT, reason, f"room for {room} of {all_of} experts")]


def _fused(model: Any) -> FastPath:
    layers = fusion_report(model)
    lost: dict[str, list[str]] = {}
    for name, reason in layers.items():
        if reason is not None:
            lost.setdefault(reason, []).append(name)
    taken = len(layers) - sum(map(len, lost.values()))
    reasons = [f"{some(names)}: {reason}" for reason, names in lost.items()]
    if not layers:
        reasons = ["no decoder layer was found"]
    return FastPath("fused decode", "; ".join(reasons) or None, f"{taken} of {len(layers)} layers")


def _amx(moes: list[AnyMoE]) -> FastPath:
    for moe in moes:
        if moe.kernel.startswith("amx"):
            continue
        amx = [backends.backends()[name] for name in ("AMXINT4", "AMXINT8", "AMXBF16")]
        if reason := amx[0].why_not():
            return FastPath(AMX, reason)
        if any(backend.why_not(moe.spec) is None for backend in amx):
            return FastPath(AMX, f"{moe.backend} was asked for")
        return FastPath(AMX, f"no AMX kernel runs {moe.spec.weight_format} experts")
    return FastPath(AMX, None)


def _repacked(moes: list[AnyMoE]) -> FastPath:
    in_place = 0
    for moe in moes:
        if isinstance(moe, StreamedMoE):
            if not moe.spec.is_packed:
                return FastPath(REPACKED, "experts are read from the file as tokens need them")
        elif not moe.spec.is_packed:
            matrices = moe.packed.matrices.values()
            in_place += sum(m.num_bytes for m in matrices if not m.is_repacked)
    if not in_place:
        return FastPath(REPACKED, None)
    what = f"{in_place / 1e9:.1f} GB" if in_place >= 1e8 else f"{in_place / 1e6:.1f} MB"
    text = "the file's own bytes run; KTK_REPACK=1 copies them into memory in the kernels' order"
    return FastPath(REPACKED, text, what)


def _huge_pages(moes: list[AnyMoE]) -> FastPath:
    of_layers = [
        [moe.slots.memory] if isinstance(moe, StreamedMoE) else moe.runner.weights() for moe in moes
    ]
    share = huge_share([array for arrays in of_layers for array in arrays])
    if share is None:
        return FastPath(HUGE_PAGES, "the system does not tell")
    detail = f"{share:.0%} of the experts' memory"
    if share >= ENOUGH_HUGE:
        return FastPath(HUGE_PAGES, None, detail)
    if any(moe.backend == "LLAMAFILE" for moe in moes):
        reason = "the experts are pages of the file; KTK_REPACK=1 copies them into huge pages"
    elif cpu.huge_pages()["enabled"] == "never":
        reason = "switched off: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
    else:
        reason = "the system had too few free ones when the model was loaded"
    return FastPath(HUGE_PAGES, reason, detail)
