"""submit_ and sync_write_weight_scale_to_buffer: each byte, by a definition of the test's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import ktk
from ktk._cy import native_module
from ktk.bench.blocks import random_matrix
from ktk.errors import BackendError
from ktk.experts.dequantise import expert_weights
from ktk.experts.formats import PANELS
from ktk.experts.spec import MoESpec
from ktk.experts.stored import CodedExpert, CodedMatrix, StoredExperts
from ktk.machine.memory import aligned_buffer
from ktk.machine.threads import EngineLayout
from ktk.ops.moe import MoE
from ktk.placement.parts import join_one, parts_of
from ktk.quantise.pack import pack_expert
from make.cases import pack_all, random_experts
from make.wrapper_cases import loaded

E, H, N = 3, 192, 256
FORMS = {"fp8": 128, "int4": 32}  # how many columns a scale is for
Pointers = tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], list[np.ndarray]]


@pytest.fixture(params=["compiled", "NumPy"], autouse=True)
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who takes panels apart."""
    if request.param == "NumPy":
        monkeypatch.setattr("ktk.experts.row_major.native_module", lambda: None)
    elif native_module() is None:
        pytest.skip("the extension is not built")
    return str(request.param)


def wrapper_of(experts: StoredExperts) -> ktk.KTMoEWrapper:
    spec = experts.spec
    shape = spec.num_experts, 2, spec.hidden_size, spec.intermediate_size
    wrapper = ktk.KTMoEWrapper(4, *shape, method="auto")
    wrapper._moe = MoE(experts)
    return wrapper


def coded(form: str, seed: int, group: int) -> list[CodedExpert]:
    """Random codes and scales, as a checkpoint has them."""
    rng = np.random.default_rng(seed)
    rows = 128 if form == "fp8" else 1

    def matrix(outs: int, ins: int) -> CodedMatrix:
        blocks = -(-outs // rows), -(-ins // group)
        scales = torch.from_numpy(rng.uniform(-2, 2, blocks)).to(torch.bfloat16)
        low, high = (0, 127) if form == "fp8" else (-8, 8)
        codes = rng.integers(low, high, (outs, ins)).astype(np.uint8 if rows > 1 else np.int8)
        return CodedMatrix(codes, scales.float().numpy(), PANELS[form], (rows, group))

    return [CodedExpert(matrix(N, H), matrix(N, H), matrix(H, N)) for _ in range(E)]


def packed(form: str, experts: list[CodedExpert], group: int) -> StoredExperts:
    spec = MoESpec(E, H, N, form, group)
    data = aligned_buffer(E * spec.layout.expert_bytes).reshape(E, -1)
    for span, expert in zip(data, experts, strict=True):
        pack_expert(spec, expert, span)
    return StoredExperts.of_panels(spec, data)


def code_bytes(matrix: CodedMatrix) -> np.ndarray:
    """Row by row; of 4 bits the byte m of a row has code 2m in its low half, code 2m+1 above."""
    if matrix.codes.dtype == np.uint8:
        return matrix.codes
    rows = (matrix.codes.astype(np.int16) + 8).tolist()
    return np.array(
        [[a | b << 4 for a, b in zip(row[0::2], row[1::2], strict=True)] for row in rows], np.uint8
    )


def scale_bytes(matrix: CodedMatrix) -> np.ndarray:
    if matrix.codes.dtype == np.uint8:
        return matrix.scales
    return torch.from_numpy(matrix.scales).to(torch.bfloat16).view(torch.int16).numpy()


def of_rank(gate: Any, up: Any, down: Any, rank: int, ranks: int) -> tuple[bytes, bytes]:
    """w13 and w2 of a rank."""
    rows = [np.array_split(half, ranks)[rank] for half in (gate, up)]
    columns = np.array_split(down, ranks, axis=1)[rank]
    return np.concatenate(rows).tobytes(), np.ascontiguousarray(columns).tobytes()


def written(wrapper: Any, expert: int, sizes: list[tuple[int, int, int, int]]) -> list[list[bytes]]:
    """What the calls write of an expert for each rank; sizes in bytes, 0: no such buffer."""
    guard = 64
    buffers = [[np.full(size + guard, 0xAB, np.uint8) for size in of_one] for of_one in sizes]
    pointers = [
        [int(b.ctypes.data) if size else 0 for b, size in zip(one, of_one, strict=True)]
        for one, of_one in zip(buffers, sizes, strict=True)
    ]
    wrapper.submit_write_weight_scale_to_buffer(
        len(sizes), expert, *map(list, zip(*pointers, strict=True))
    )
    wrapper.sync_write_weight_scale_to_buffer()
    for one in buffers:
        assert all((b[-guard:] == 0xAB).all() for b in one)
    return [[b[:-guard].tobytes() for b in one] for one in buffers]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("form", "group"), [("fp8", 128), ("int4", 32), ("int4", 64)])
def test_codes_and_scales_of_a_checkpoint_come_back_cut_for_each_rank(
    form: str, group: int, ranks: int
) -> None:
    experts = coded(form, 1, group)
    wrapper = wrapper_of(packed(form, experts, group))
    for e, expert in enumerate(experts):
        want = []
        for rank in range(ranks):
            codes = of_rank(*(code_bytes(m) for m in expert[:3]), rank, ranks)  # type: ignore[arg-type]
            scales = of_rank(*(scale_bytes(m) for m in expert[:3]), rank, ranks)  # type: ignore[arg-type]
            want.append([codes[0], scales[0], codes[1], scales[1]])
        sizes = [tuple(map(len, of_one)) for of_one in want]
        assert written(wrapper, e, sizes) == want  # type: ignore[arg-type]


def blocks() -> StoredExperts:
    sizes = {"gate": (N, H), "up": (N, H), "down": (H, N)}
    made = {name: random_matrix("Q8_0", E, *size, 4) for name, size in sizes.items()}
    return StoredExperts(MoESpec(E, H, N, "gguf", activation_group=64), **made)


ANY = ("bf16", "fp32", "int8", "nl4", "fp8", "int4")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", [*ANY, "gguf"])
def test_buffers_without_scales_get_any_format_rounded_to_bf16(name: str, ranks: int) -> None:
    if name == "gguf":
        experts = blocks()
    else:
        spec = MoESpec(E, H, N, name)
        experts = pack_all(spec, random_experts(spec, 2))
    wrapper = wrapper_of(experts)
    floats = expert_weights(experts, 1)
    rounded = [
        torch.from_numpy(w).to(torch.bfloat16).view(torch.int16).numpy()
        for w in (floats.gate, floats.up, floats.down)
    ]
    parts = [of_rank(*rounded, rank, ranks) for rank in range(ranks)]
    want = [[w13, b"", w2, b""] for w13, w2 in parts]
    assert written(wrapper, 1, [(len(a), 0, len(b), 0) for a, b in parts]) == want


def test_parts_on_numa_nodes_are_put_together_for_one_expert() -> None:
    spec = MoESpec(E, H, N, "int4", has_bias=True)
    whole = pack_all(spec, random_experts(spec, 3))
    order = np.array([2, -1, 0])
    parts = parts_of(whole, EngineLayout(2, 2, (0, 0), is_bound=True))
    for expert in (0, 2):
        one = join_one(spec, parts, order, expert)
        assert one.data.tobytes() == whole.data[order[expert]].tobytes()
        assert one.num_stored == 1 and one.place(expert) == 0
    with pytest.raises(BackendError, match="experts 1 are not in memory"):
        join_one(spec, parts, order, 1).place(1)


def test_several_writes_may_be_under_way() -> None:
    wrapper = wrapper_of(packed("int4", coded("int4", 1, 32), 32))
    sizes = [2 * N * H // 2, 2 * N * H // 32 * 2, N * H // 2, N * H // 32 * 2]
    alone = [written(wrapper, e, [tuple(sizes)])[0] for e in range(E)]  # type: ignore[list-item]
    buffers = [[np.empty(size, np.uint8) for size in sizes] for _ in range(E)]
    for e in range(E):
        wrapper.submit_write_weight_scale_to_buffer(1, e, *([b.ctypes.data] for b in buffers[e]))
    wrapper.sync_write_weight_scale_to_buffer()
    assert [[b.tobytes() for b in one] for one in buffers] == alone
    with pytest.raises(RuntimeError, match="nothing is under way"):
        wrapper.sync_write_weight_scale_to_buffer()


def test_what_does_not_fit_is_refused_before_a_byte_is_written() -> None:
    room = np.zeros(8 * N * H, np.uint8)
    at = int(room.ctypes.data)
    fp8 = wrapper_of(packed("fp8", coded("fp8", 1, 128), 128))
    write = fp8.submit_write_weight_scale_to_buffer
    cases: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((0, 0, [], [], [], []), ValueError, "gpu_tp_count=0"),
        ((1, E, [at], [at], [at], [at]), ValueError, "expert_id=3: must be 0..2"),
        ((1, -1, [at], [at], [at], [at]), ValueError, "expert_id=-1"),
        ((2, 0, [at], [at] * 2, [at] * 2, [at] * 2), ValueError, "w13_weight_ptrs=.*2 addresses"),
        ((1, 0, [0], [0], [at], [0]), ValueError, "w13_weight_ptrs: address 0"),
        ((1, 0, [1.5], [0], [at], [0]), TypeError, "address 1.5: must be an int"),
        ((1, 0, [at], [at], [at], [0]), ValueError, "layer 4 holds fp8.*address 0"),
        ((4, 0, *([[at] * 4] * 4)), ValueError, "gpu_tp_count=4: 256 .* multiples of 128"),
        ((3, 0, [at] * 3, [0] * 3, [at] * 3, [0] * 3), ValueError, "gpu_tp_count=3"),
    ]
    for given, error, match in cases:
        with pytest.raises(error, match=match):
            write(*given)
    spec = MoESpec(E, H, N, "nl4")
    turned = wrapper_of(pack_all(spec, random_experts(spec, 2)))
    with pytest.raises(ValueError, match="holds nl4, group_size=16, rotation=64"):
        turned.submit_write_weight_scale_to_buffer(1, 0, [at], [at], [at], [at])
    biased = MoESpec(E, H, N, "bf16", has_bias=True)
    with pytest.raises(ValueError, match="has_bias=True: GPU buffers are for experts"):
        wrapper_of(pack_all(biased, random_experts(biased, 2))).submit_write_weight_scale_to_buffer(
            1, 0, [at], [0], [at], [0]
        )
    partly = loaded(gpu_experts_mask=[1, 0, 0, 0, 0, 0], load_gpu_experts=False)
    with pytest.raises(BackendError, match="experts 0 are not in memory"):
        partly.submit_write_weight_scale_to_buffer(1, 0, [at], [0], [at], [0])
    with pytest.raises(RuntimeError, match="no weights yet"):
        ktk.KTMoEWrapper(0, E, 2, H, N).submit_write_weight_scale_to_buffer(
            1, 0, [at], [0], [at], [0]
        )
    assert not room.any()
