"""Dense linear layers: the exact arithmetic of panels and of blocks, whatever the batch,
the dtype and the threads.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ktk.bench.blocks import random_matrix
from ktk.errors import BackendError, EngineError
from ktk.experts.dequantise import dequantise
from ktk.experts.rows import poison_rows
from ktk.experts.stored import StoredExperts, StoredMatrix
from ktk.integration.transformers.linear import (
    KtkLinear,
    linear_of,
    replace_linears,
    share_linears,
)
from ktk.machine import cpu
from ktk.machine.memory import aligned_buffer
from ktk.ops import linear
from ktk.ops.linear import Linear
from ktk.reference.moe import ExactExperts
from make import block_cases

if linear.why_not() is not None:
    pytest.skip(str(linear.why_not()), allow_module_level=True)

FORMATS = (("int8", 0), ("int4", 32), ("int4", 128), ("bf16", None), ("fp32", None))
SIZES = ((32, 16), (96, 1), (64, 100), (576, 1537), (2048, 300))  # in, out


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exact(made: Linear, x: np.ndarray) -> np.ndarray:
    """The exact model of the same panels: the down projection of one expert."""
    layout = made.spec.layout
    data = aligned_buffer(layout.expert_bytes)[None]
    layout.panels(data[0], "down")[:] = made.panels
    model = ExactExperts(StoredExperts.of_panels(made.spec, data), cpu.best_isa() == "amxbf16")
    y = model.linear(0, "down", poison_rows(x))
    return y if made.bias is None else y + made.bias[: made.out_features]


@pytest.mark.parametrize("rotation", [0, 256, (64, 7)])
def test_a_rotation_is_the_exact_models(rotation: Any) -> None:
    made = Linear(random(40, 200), weight_format="int8", rotation=rotation)
    x = random(5, 200, seed=2)
    assert np.array_equal(made(x), exact(made, x))


@pytest.mark.parametrize(("fmt", "group"), FORMATS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward_is_the_exact_model(fmt: str, group: int | None, sizes: tuple[int, int]) -> None:
    n, m = sizes
    made = Linear(random(m, n), random(m, seed=1), weight_format=fmt, group_size=group)
    longest = random(130, n, seed=2)
    exactly = exact(made, longest)
    for rows in (1, 2, 3, 17, 65, 130):
        x, want = longest[:rows], exactly[:rows]
        got = made(x)
        if fmt in ("bf16", "fp32"):
            assert np.allclose(want, got, rtol=1e-4, atol=1e-4)
        else:
            assert np.array_equal(want, got)
        assert np.array_equal(got[-1:], made(x[-1:])), "a row has other bits alone"


# Mean error, of the mean output: activations of 8 bits, of bf16 (BF16 on AVX512-BF16), of float32.
BLOCK_ERRORS = {
    "Q8_0": 0.02,
    "Q6_K": 0.02,
    "Q5_1": 0.02,
    "Q4_0": 0.02,
    "Q4_K": 0.02,
    "IQ4_XS": 0.02,
    "Q3_K": 0.02,
    "IQ2_S": 0.02,
    "MXFP4": 0.02,
    "BF16": 0.01,
    "F16": 1e-5,
    "F32": 1e-5,
}


@pytest.mark.parametrize("kind", BLOCK_ERRORS)
@pytest.mark.parametrize("out_features", [16, 37, 528])
def test_blocks_give_the_dequantised_matrix(kind: str, out_features: int) -> None:
    matrix = random_matrix(kind, 1, out_features, 512, seed=0)
    bias = random(out_features, seed=1)
    made = Linear.of_blocks(matrix, bias)
    assert kind in made.kernel and (made.in_features, made.out_features) == (512, out_features)
    assert np.shares_memory(made.panels, matrix.data) == (out_features % 16 == 0)
    weight = dequantise(matrix, 0).astype(np.float64)
    for rows in (1, 2, 5, 33, 130):
        x = random(rows, 512, seed=rows)
        want, got = x.astype(np.float64) @ weight.T + bias, made(x)
        assert np.abs(got - want).mean() < BLOCK_ERRORS[kind] * np.abs(want - bias).mean()
        assert np.array_equal(got[-1:], made(x[-1:])), "a row has other bits alone"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K", "Q4_0"])
@pytest.mark.parametrize("group", [None, 32, 128])
def test_blocks_have_the_stated_arithmetics_bits(kind: str, group: int | None) -> None:
    matrix = random_matrix(kind, 1, 48, 768, seed=2)
    made = Linear.of_blocks(matrix, activation_group=group)
    assert made.spec.activation_group == (group or (64 if kind in ("Q8_0", "Q6_K") else 128))
    one: Any = SimpleNamespace(spec=made.spec, matrices={"down": matrix}, biases={})
    exact = block_cases.ExactBlocks(one, str(cpu.best_isa()))
    x = random(9, 768)
    assert np.array_equal(exact.linear(0, "down", x), made(x))


def test_blocks_without_a_kernel_run_as_floats(
    caplog: pytest.LogCaptureFixture,
) -> None:
    raw = np.random.default_rng(0).integers(0, 127, (1, 20, 2 * 36), dtype=np.uint8)
    raw[..., [0, 1, 2, 3, 36, 37, 38, 39]] = 0x30  # scales neither huge nor NaN
    matrix = StoredMatrix.of_rows("NVFP4", 128, raw)
    with caplog.at_level(logging.WARNING, "ktk"):
        made = Linear.of_blocks(matrix)
    assert "NVFP4 has no kernel" in caplog.text and made.kernel.endswith(("F16", "F32"))
    x = random(3, 128)
    want = x.astype(np.float64) @ dequantise(matrix, 0).astype(np.float64).T
    assert np.abs(made(x) - want).max() < 1e-5 * np.abs(want).max()


def test_wrong_blocks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="blocks of 2 experts: must be one matrix"):
        Linear.of_blocks(random_matrix("Q8_0", 2, 32, 64, 0))
    matrix = random_matrix("Q8_0", 1, 32, 64, 0)
    repacked = dataclasses.replace(matrix, is_repacked=True)
    with pytest.raises(ValueError, match="1 experts, repacked: must be"):
        Linear.of_blocks(repacked)
    with pytest.raises(ValueError, match="activation_group=48"):
        Linear.of_blocks(matrix, activation_group=48)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\): must be \(32,\)"):
        Linear.of_blocks(matrix, random(3))
    with pytest.raises(ValueError, match="decodes Q9_X"):
        StoredMatrix.of_rows("Q9_X", 64, matrix.data)
    monkeypatch.setattr(linear, "why_not", lambda: "no compiler")
    with pytest.raises(BackendError, match="no compiler"):
        Linear.of_blocks(matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_come_back_in_their_dtype(dtype: torch.dtype) -> None:
    made = Linear(torch.from_numpy(random(48, 64)).to(dtype))
    x = torch.from_numpy(random(5, 64, seed=3)).to(dtype)
    y = made(x)
    assert y.dtype == dtype and y.shape == (5, 48)
    want = torch.from_numpy(exact(made, x.float().numpy())).to(dtype)
    assert torch.equal(want, y)
    assert made(x[:0]).shape == (0, 48)


def test_a_row_with_nan_or_inf_stays_alone() -> None:
    made = Linear(random(32, 64))
    x = random(3, 64)
    x[1, 5] = np.inf
    y = made(x)
    assert not np.isfinite(y[1]).all()
    assert np.array_equal(y[[0, 2]], made(x[[0, 2]]))


def test_threads_do_not_change_a_bit() -> None:
    code = """
import sys, numpy as np
from ktk.bench.blocks import random_matrix
from ktk.ops.linear import Linear
r, threads = np.random.default_rng(0), int(sys.argv[1])
weights = r.standard_normal((700, 256), dtype=np.float32)
packed = Linear(weights, weight_format="int4", num_threads=threads)
blocks = Linear.of_blocks(random_matrix("Q5_K", 1, 700, 256, 0), num_threads=threads)
for made in (packed, blocks):
    sys.stdout.buffer.write(made(r.standard_normal((70, 256), dtype=np.float32)).tobytes())
"""
    outputs = {
        subprocess.run([sys.executable, "-c", code, str(n)], capture_output=True, check=True).stdout
        for n in (1, 2)
    }
    assert len(outputs) == 1


def test_wrong_arguments_are_named() -> None:
    w = random(16, 32)
    with pytest.raises(ValueError, match=r"weight has shape \(32,\)"):
        Linear(w[0])
    with pytest.raises(TypeError, match="weight has dtype int64"):
        Linear(np.ones((16, 32), np.int64))
    with pytest.raises(ValueError, match=r"bias has shape \(3,\): must be \(16,\)"):
        Linear(w, random(3))
    with pytest.raises(ValueError, match="format of panels"):
        Linear(w, weight_format="gguf")
    with pytest.raises(ValueError, match="NaN or inf"):
        Linear(np.full((16, 32), np.nan, np.float32))
    made = Linear(w)
    with pytest.raises(ValueError, match="32"):
        made(random(2, 16))
    with pytest.raises(EngineError, match="num_threads"):
        Linear(w, num_threads=made.num_threads + 1)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(1024, 1024)
        self.gate = torch.nn.Linear(1024, 1024, bias=False)
        self.small = torch.nn.Linear(32, 32)
        self.lm_head = torch.nn.Linear(1024, 2048, bias=False)


def test_a_models_large_linears_are_replaced_and_routers_are_not() -> None:
    model = Model().bfloat16()
    x = torch.from_numpy(random(2, 3, 1024)).bfloat16()
    want = model.q_proj(x)
    assert replace_linears(model, "int8", skip=("lm_head",)) == ["q_proj"]
    assert isinstance(model.q_proj, KtkLinear) and type(model.lm_head) is torch.nn.Linear
    assert "int8" in repr(model) and "q_proj.weight" not in model.state_dict()
    with torch.no_grad():
        got = model.q_proj(x)
    assert got.dtype == torch.bfloat16 and got.shape == want.shape
    assert (got - want).abs().mean() < 0.02 * want.abs().mean()
    with pytest.raises(RuntimeError, match="no gradient"):
        model.q_proj(x.requires_grad_())
    with pytest.raises(ValueError, match=r"lm_head.*int3"):
        replace_linears(model, "int3")


def test_where_kernels_do_not_run_layers_stay_with_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(linear, "why_not", lambda: "no compiler")
    with caplog.at_level(logging.WARNING, "ktk"):
        assert replace_linears(Model(), "int8") == []
    assert "stay with torch: no compiler" in caplog.text
    with pytest.raises(BackendError, match="no compiler"):
        Linear(random(16, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_shared_linears_run_on_the_modules_own_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {
            "a": torch.nn.Linear(256, 192),
            "b": torch.nn.Linear(192, 150, bias=False),
            "gate": torch.nn.Linear(256, 256),
        }
    ).to(dtype)
    assert share_linears(model) == ["a", "b"]
    x = torch.randn(3, 2, 256).to(dtype)

    def exact(m: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        bias = None if m.bias is None else m.bias.double()
        return torch.nn.functional.linear(x.double(), m.weight.double(), bias)

    bits = 2**-8 if dtype is torch.bfloat16 else 2**-10

    def check() -> None:
        for name, given in (("a", x), ("b", x[..., :192].contiguous())):
            y, want = model[name](given), exact(model[name], given)
            assert y.shape == want.shape
            assert y.dtype == dtype
            assert (y.double() - want).abs().max() <= bits * want.abs().max()

    check()
    a, forward = model["a"], model["a"].forward
    panels = linear_of(a).panels
    assert panels.ctypes.data == a.weight.data_ptr(), "the weights were copied"
    assert set(model.state_dict()) == {"a.weight", "a.bias", "b.weight", "gate.weight", "gate.bias"}
    a.weight.mul_(2)  # in place: seen at once
    check()
    a.weight = torch.nn.Parameter(torch.randn(192, 256).to(dtype))
    assert linear_of(a) is None
    check()
    assert linear_of(a) is forward.linear
    a.weight = torch.nn.Parameter(torch.randn(192, 256).to(dtype).T.contiguous().T)
    check()
    assert forward.is_stale, "rows that do not lie one behind the other are torch's"
    twin = copy.deepcopy(model)
    twin["b"].weight.zero_()
    assert not twin["b"](x[..., :192]).any()
    assert model["b"](x[..., :192]).any()


def test_shared_linears_have_gradients_and_leave_float32_alone() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(256, 192)})
    assert share_linears(model) == []
    model.bfloat16()
    assert share_linears(model) == ["a"]
    x = torch.randn(4, 256).bfloat16().requires_grad_()
    model["a"](x).sum().backward()
    assert torch.allclose(x.grad.float(), model["a"].weight.sum(0).float().expand(4, -1), atol=0.1)
    assert model["a"].weight.grad is not None
    assert model["a"](x.detach().float().bfloat16()).requires_grad
    model.float()
    with torch.no_grad():
        y = model["a"](x.float())
    assert torch.allclose(
        y, torch.nn.functional.linear(x.float(), model["a"].weight, model["a"].bias)
    )


@torch.no_grad()
def test_shared_linears_leave_many_bf16_rows_to_torch_unless_bits_must_be_kept() -> None:
    from ktk.integration.transformers.invariance import InvariantModel

    model = torch.nn.ModuleDict({"a": torch.nn.Linear(256, 192)}).bfloat16()
    share_linears(model)
    own, forward = model["a"].forward.own_forward, model["a"].forward
    x = torch.randn(100, 256).bfloat16()
    assert torch.equal(forward(x), own(x))
    assert torch.equal(forward(x[:16]), forward.linear(x[:16]))
    InvariantModel(model)
    y = forward(x)
    assert torch.equal(y, forward.linear(x))
    assert all(torch.equal(forward(x[i : i + n]), y[i : i + n]) for i in (0, 7) for n in (1, 2, 33))
