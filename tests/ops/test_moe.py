"""MoE at the border: what it takes, what it refuses, what it leaves alone;
the registry and the engine.
"""

from __future__ import annotations

import logging
import os
import threading

import numpy as np
import pytest
import torch

import ktk
from ktk import backends
from ktk.backends.base import Backend, Runner
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.machine.threads import EngineLayout
from ktk.reference.moe import ExactExperts
from make.cases import assert_exact, pack_all, random_experts, random_hidden, random_routing
from make.children import run_python

# For a process whose only MoEs are these: caches of other packages may hold a server's app, and its
# model, after its tests.
ALONE = """
import gc
import pytest
import ktk
from ktk.experts.spec import MoESpec
from make.cases import pack_all, random_experts
spec = MoESpec(6, 64, 48, "int8")
packed = pack_all(spec, random_experts(spec, 1))
"""


@pytest.fixture
def packed() -> StoredExperts:
    spec = MoESpec(6, 64, 48, "int8")
    return pack_all(spec, random_experts(spec, 1))


@pytest.fixture
def moe(packed: StoredExperts) -> ktk.MoE:
    return ktk.MoE(packed)


def inputs(tokens: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return random_hidden(tokens, 64, 2), *random_routing(tokens, 2, 6, 3)


def test_numpy_and_torch_give_the_exact_model(moe: ktk.MoE) -> None:
    x, ids, weights = inputs()
    want = ExactExperts(moe.packed).forward(x, ids, weights)
    assert_exact(want, moe(x, ids, weights))
    result = moe(torch.from_numpy(x), torch.from_numpy(ids), torch.from_numpy(weights))
    assert isinstance(result, torch.Tensor)
    assert_exact(want, result.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_dtypes_come_back_as_they_went_in(moe: ktk.MoE, dtype: torch.dtype) -> None:
    x, ids, weights = map(torch.from_numpy, inputs())
    got = moe(x.to(dtype), ids, weights)
    want = ExactExperts(moe.packed).forward(
        x.to(dtype).float().numpy(), ids.numpy(), weights.numpy()
    )
    assert got.dtype == dtype
    assert torch.equal(got, torch.from_numpy(want).to(dtype))


def test_every_integer_id_type_and_float_weight_type_is_taken(moe: ktk.MoE) -> None:
    x, ids, weights = inputs()
    weights = np.float16(weights).astype(np.float32)
    want = moe(x, ids, weights)
    for dtype in (np.int8, np.uint8, np.int16, np.int32, np.uint32, np.uint64):
        assert_exact(want, moe(x, ids.astype(dtype), weights))
    for dtype in (np.float16, np.float64):
        assert_exact(want, moe(x, ids, weights.astype(dtype)))
    half = torch.from_numpy(weights).bfloat16()
    assert_exact(moe(x, ids, half.float().numpy()), moe(x, ids, half))


def test_huge_unsigned_ids_add_zero(moe: ktk.MoE) -> None:
    x, _, weights = inputs()
    assert_exact(np.zeros_like(x), moe(x, np.full((5, 2), 2**64 - 1, np.uint64), weights))


def test_zero_tokens_give_an_empty_result(moe: ktk.MoE) -> None:
    x, ids, weights = inputs(0)
    assert moe(x, ids, weights).shape == (0, 64)
    assert moe(*map(torch.from_numpy, (x, ids, weights))).shape == (0, 64)


def test_non_contiguous_inputs_give_the_same_bits(moe: ktk.MoE) -> None:
    x, ids, weights = inputs()
    wide = np.zeros((5, 128), np.float32)
    wide[:, ::2] = x
    got = moe(wide[:, ::2], np.asfortranarray(ids), torch.from_numpy(weights.T.copy()).T)
    assert_exact(moe(x, ids, weights), got)


def test_unaligned_inputs_give_the_same_bits(moe: ktk.MoE) -> None:
    def shifted(a: np.ndarray) -> np.ndarray:
        raw = np.empty(a.nbytes + 1, np.uint8)
        view = raw[1:].view(a.dtype).reshape(a.shape)
        view[:] = a
        assert not view.flags.aligned
        return view

    arrays = inputs()
    assert_exact(moe(*arrays), moe(*map(shifted, arrays)))


def test_inputs_are_left_alone_and_results_are_the_callers(moe: ktk.MoE) -> None:
    x, ids, weights = inputs()
    before = [a.copy() for a in (x, ids, weights)]
    first = moe(x, ids, weights)
    kept = first.copy()
    moe(x * 2, ids, weights)
    assert_exact(kept, first)
    for a, b in zip(before, (x, ids, weights), strict=True):
        assert_exact(a, b)


def test_the_same_expert_twice_adds_twice(moe: ktk.MoE) -> None:
    x, _, _ = inputs(1)
    twice = moe(x, np.array([[2, 2]]), np.array([[0.5, 0.25]], np.float32))
    once = moe(x, np.array([[2]]), np.array([[0.75]], np.float32))
    np.testing.assert_allclose(twice, once, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            lambda x, i, w: (x.astype(np.float64), i, w),
            TypeError,
            "hidden_states has dtype float64",
        ),
        (lambda x, i, w: (x.astype(np.int32), i, w), TypeError, "float32, float16 or bfloat16"),
        (lambda x, i, w: (x.astype(np.uint16), i, w), TypeError, "hidden_states has dtype uint16"),
        (lambda x, i, w: (x[:, :63], i, w), ValueError, r"must be \(num_tokens, 64\)"),
        (lambda x, i, w: (x[0], i, w), ValueError, r"shape \(64,\)"),
        (lambda x, i, w: (x.tolist(), i, w), TypeError, "hidden_states is a list"),
        (lambda x, i, w: (x, i.astype(np.float32), w), TypeError, "topk_ids has dtype float32"),
        (lambda x, i, w: (x, i.astype(bool), w), TypeError, "topk_ids has dtype bool"),
        (lambda x, i, w: (x, i[:4], w), ValueError, r"topk_ids has shape \(4, 2\)"),
        (lambda x, i, w: (x, i[:, :0], w[:, :0]), ValueError, "top_k at least 1"),
        (lambda x, i, w: (x, i, w[:, :1]), ValueError, "topk_weights has shape"),
        (lambda x, i, w: (x, i, w.astype(np.int64)), TypeError, "topk_weights has dtype int64"),
        (lambda x, i, w: (torch.from_numpy(x).to("meta"), i, w), ValueError, "on meta"),
        (lambda x, i, w: (torch.from_numpy(x).to_sparse(), i, w), TypeError, "must be dense"),
    ],
)
def test_wrong_arguments_are_named(moe: ktk.MoE, change, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        moe(*change(*inputs()))


def test_a_wrong_mask_or_add_is_refused(moe: ktk.MoE) -> None:
    x, ids, weights = inputs()
    for mask in (np.zeros(5, bool), np.zeros(6, np.uint8), torch.zeros(7, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"must be bool \(6,\)"):
            moe(x, ids, weights, skip=mask)
    for add in (x[:2], x.astype(np.float64)):
        with pytest.raises(ValueError, match="add is"):
            moe(x, ids, weights, add=add)


def test_from_weights_takes_torch_and_names_what_does_not_fit() -> None:
    rng = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(4, 48, 64, generator=rng) * 0.05 for _ in range(2))
    down = torch.randn(4, 64, 48, generator=rng) * 0.05
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        built = ktk.MoE.from_weights(gate.to(dtype), up.to(dtype), down.to(dtype), method="INT8")
        assert (built.spec.weight_format, built.spec.num_experts) == ("int8", 4)
        wide = ktk.MoE.from_weights(*(t.to(dtype).float() for t in (gate, up, down)), method="INT8")
        assert_exact(wide.packed.data, built.packed.data)
    for arguments, text in (
        ((gate[:3], up, down), "gate_proj has 3 experts"),
        (
            (gate, up, down.transpose(1, 2)),
            r"expert 0: down has shape \(48, 64\): must be \(64, 48\)",
        ),
        ((gate, up[0], down), "up_proj has shape"),
        ((gate, None, down), "up_proj is None"),
        ((gate[:0], up[:0], down[:0]), "no dimension may be 0"),
    ):
        with pytest.raises(ValueError, match=text):
            ktk.MoE.from_weights(*arguments)
    with pytest.raises(TypeError, match="down_proj has dtype int8"):
        ktk.MoE.from_weights(gate, up, down.to(torch.int8))
    with pytest.raises(TypeError, match="up_proj has dtype float64"):
        ktk.MoE.from_weights(gate, up.double(), down)
    gate[2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="expert 2: weights hold NaN or inf"):
        ktk.MoE.from_weights(gate, up, down)


def test_linear_checks_its_arguments(moe: ktk.MoE) -> None:
    x = random_hidden(3, 64, 1)
    with pytest.raises(ValueError, match="projection='up'"):
        moe.linear("up", x, np.zeros(3, np.int64))
    for bad_x, bad_ids in (
        (x.astype(np.float64), np.zeros(3, int)),
        (x, np.zeros(3)),
        (x, np.zeros(3, bool)),
    ):
        with pytest.raises(TypeError, match="must be float32 and an integer type"):
            moe.linear("gate_up", bad_x, bad_ids)
    with pytest.raises(ValueError, match=r"must be \(rows, 48\)"):
        moe.linear("down", x, np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"must be 0\.\.5"):
        moe.linear("gate_up", x, np.array([0, 6, 1]))


def test_threads_may_share_one_moe(moe: ktk.MoE) -> None:
    x, ids, weights = inputs(33)
    want = moe(x, ids, weights)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(50):
            try:
                assert_exact(want, moe(x, ids, weights))
            except AssertionError as error:
                wrong.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_computes_too(moe: ktk.MoE) -> None:
    x, ids, weights = inputs(9)
    want = moe(x, ids, weights)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if np.array_equal(moe(x, ids, weights), want) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert_exact(want, moe(x, ids, weights))


def test_unknown_methods_list_the_known_ones_with_reasons(packed: StoredExperts) -> None:
    with pytest.raises(ValueError, match=r"method='AMXINT5' is unknown") as caught:
        ktk.MoE(packed, method="AMXINT5")
    for row in backends.report():
        assert f"{row.name}: {row.reason or 'runs'}" in str(caught.value)


def test_a_method_for_other_weights_is_refused(packed: StoredExperts) -> None:
    for method in ("INT4", "AMXINT4"):
        with pytest.raises(ValueError, match="runs int4 weights, these are int8"):
            ktk.MoE(packed, method=method)


@pytest.mark.parametrize("row", backends.report(), ids=lambda r: r.name)
def test_a_named_backend_runs_or_says_why_not(
    row: backends.Report, packed: StoredExperts, monkeypatch
) -> None:
    monkeypatch.setenv("KTK_STRICT_BACKEND", "1")
    if backends.backends()[row.name].why_not(packed.spec) is None:
        assert ktk.MoE(packed, method=row.name.lower()).backend == row.name
        return
    with pytest.raises((ktk.BackendError, ValueError), match=r"cannot run here|runs \w+ weights"):
        ktk.MoE(packed, method=row.name)


def test_amx_weights_run_elsewhere_with_one_warning(
    packed: StoredExperts, caplog, monkeypatch
) -> None:
    amx = backends.backends()["AMXINT8"]
    monkeypatch.setattr(amx, "why_not", lambda spec=None: "no tiles")
    logger = logging.getLogger("ktk")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING, "ktk"):
        for _ in range(3):
            assert ktk.MoE(packed, method="AMXINT8").backend != "AMXINT8"
    assert [
        r.getMessage().startswith("AMXINT8 does not run here (no tiles)") for r in caplog.records
    ] == [True]


def test_ktk_backend_names_what_auto_takes(packed: StoredExperts, monkeypatch) -> None:
    monkeypatch.setenv("KTK_BACKEND", "NUMPY")
    assert ktk.MoE(packed).backend == "NUMPY"
    monkeypatch.setenv("KTK_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        ktk.MoE(packed)


def test_a_plugged_in_backend_is_listed_and_runs(packed: StoredExperts, monkeypatch) -> None:
    class Plug(Backend):
        name = "PLUG"

        def why_not(self, spec: MoESpec | None = None) -> str | None:
            return None

        def kernel(self, spec: MoESpec) -> str:
            return "plug"

        def load(self, packed: StoredExperts, engine: EngineLayout) -> Runner:
            return backends.backends()["NUMPY"].load(packed, engine)

    class Entry:
        name = "plug"

        def load(self) -> type[Plug]:
            return Plug

    class Broken(Entry):
        def load(self) -> type[Plug]:
            raise ImportError("no such module")

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Broken(), Entry()])
    backends.backends.cache_clear()
    try:
        assert backends.report()[-1].name == "PLUG"
        assert ktk.MoE(packed, method="plug").kernel == "plug"
    finally:
        backends.backends.cache_clear()


def test_one_process_has_one_thread_layout() -> None:
    run_python(
        """
        first = ktk.MoE(packed, num_threads=3)
        assert ktk.MoE(packed).num_threads == 3
        with pytest.raises(ktk.EngineError, match="num_threads=3"):
            ktk.MoE(packed, num_threads=2)
        del first
        gc.collect()
        assert ktk.MoE(packed, num_threads=2).num_threads == 2
        """,
        before=ALONE,
    )


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_bad_thread_counts_are_refused(packed: StoredExperts, value: object) -> None:
    with pytest.raises(ValueError, match="must be a positive int"):
        ktk.MoE(packed, num_threads=value)  # type: ignore[arg-type]


def test_impossible_numa_layouts_are_refused() -> None:
    run_python(
        """
        from ktk.machine import threads as engine

        class User:
            pass

        for arguments, text in (
            ((2, 2, (0,)), "has 1 entries"),
            ((1, 2, None), "below threadpool_count"),
            ((64, 64, None), "NUMA nodes"),
            ((1, 1, (77,)), "no node"),
        ):
            with pytest.raises(ValueError, match=text):
                engine.acquire(User(), *arguments)
        """,
        before=ALONE,
    )
