"""KTMoEWrapper(mode="sft"): adapters in the caller's memory, forward and backward."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

import ktk
from ktk.errors import BackendError, CheckpointError
from ktk.experts.formats.floats import f32_to_bf16
from ktk.experts.lora import ExpertLora
from ktk.integration.kt_kernel.checkpoint_output import CheckpointOutput, CheckpointState
from ktk.integration.kt_kernel.fused_lora import (
    NAME,
    load_fused_expert_lora,
    save_fused_expert_lora,
)
from ktk.ops import training
from make.wrapper_cases import E, H, K, N, random_weights, routed

RANK = 4
MATRICES = [f"{p}_lora_{x}" for p in ("gate", "up", "down") for x in "ab"]


def shapes(num_experts: int, hidden: int, inner: int, rank: int) -> list[tuple[int, int, int]]:
    up = [(num_experts, rank, hidden), (num_experts, inner, rank)]
    return [*up, *up, (num_experts, rank, inner), (num_experts, hidden, rank)]


def twelve(seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Adapters, and buffers that hold 7 everywhere."""
    made = torch.Generator().manual_seed(seed)
    sizes = shapes(E, H, N, RANK)
    lora = [(torch.randn(s, generator=made) / 8).bfloat16() for s in sizes]
    return lora, [torch.full(s, 7.0, dtype=torch.bfloat16) for s in sizes]


def make_sft(layer_idx: int = 0, **arguments: Any) -> Any:
    fields: dict[str, Any] = {"method": "INT8_SFT", "lora_rank": RANK, "lora_alpha": 6.0}
    wrapper = ktk.KTMoEWrapper(layer_idx, E, K, H, N, mode="sft", **{**fields, **arguments})
    wrapper.load_weights_from_tensors(*random_weights())
    return wrapper


def ready(seed: int = 0, **arguments: Any) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
    wrapper = make_sft(**arguments)
    lora, buffers = twelve(seed)
    wrapper.init_lora_weights(*lora, *buffers)
    return wrapper, lora, buffers


def call(seed: int = 0, tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, ids, weights = routed(tokens, seed)
    return torch.from_numpy(hidden).bfloat16(), torch.from_numpy(ids), torch.from_numpy(weights)


def operator(
    wrapper: Any, lora: list[torch.Tensor], given: Any, grad: torch.Tensor
) -> tuple[Any, training.Gradients]:
    arrays = {
        n.replace("_lora", ""): t.view(torch.uint16).numpy()
        for n, t in zip(MATRICES, lora, strict=True)
    }
    out, saved = training.forward(wrapper.moe, *given, ExpertLora(**arrays, scaling=6.0 / RANK))
    return out, training.backward(wrapper.moe, saved, grad)


def assert_bits(expected: np.ndarray, got: torch.Tensor) -> None:
    assert torch.equal(torch.from_numpy(f32_to_bf16(expected)), got.view(torch.uint16))


def test_it_gives_what_the_operator_gives_rounded_once():
    wrapper, lora, buffers = ready()
    given, grad = call(), call(1)[0]
    out, want = operator(wrapper, lora, given, grad)
    assert torch.equal(out, wrapper.forward(*given))
    d_hidden, d_weights = wrapper.backward(grad)
    assert_bits(want.hidden, d_hidden)
    assert torch.equal(torch.from_numpy(want.topk_weights), d_weights)
    for name, buffer in zip(MATRICES, buffers, strict=True):
        assert_bits(want.lora[name.replace("_lora", "")], buffer)
    positional = inspect.signature(ktk.KTMoEWrapper).parameters
    assert [*positional][:2] == ["layer_idx", "num_experts"]


def test_later_backwards_add_until_the_optimiser_has_stepped():
    wrapper, lora, buffers = ready(max_cache_depth=2)
    first, second, grads = call(), call(2, 3), (call(1)[0], call(3, 3)[0])
    wrapper.forward(*first)
    wrapper.forward(*second)
    assert wrapper.cache_depth == 2
    wrapper.backward(grads[1], optimizer_grad_scale=0.5)  # the last pass comes first
    wrapper.backward(grads[0])
    half = operator(wrapper, lora, second, grads[1])[1].lora["down_b"] * np.float32(0.5)
    whole = operator(wrapper, lora, first, grads[0])[1].lora["down_b"]
    rounded = torch.from_numpy(half).bfloat16().float().numpy()
    assert_bits(rounded + whole, buffers[5])
    for close in (wrapper.update_lora_weights, wrapper.release_authoritative_optimizer_grads):
        close()
        wrapper.forward(*first)
        wrapper.backward(grads[0])
        assert_bits(whole, buffers[5])


def test_adapters_are_read_where_they_lie():
    wrapper, lora, _ = ready()
    before = wrapper.forward(*call(), save_for_backward=False)
    lora[5].zero_()
    lora[1].zero_()
    lora[3].zero_()
    after = wrapper.forward(*call(), save_for_backward=False)
    assert not torch.equal(before, after)
    assert torch.equal(wrapper.moe.forward(*call()), after)
    assert wrapper.lora_tensors["down_lora_b"].data_ptr() == lora[5].data_ptr()


def test_submitted_arguments_may_be_overwritten():
    wrapper, _, buffers = ready()
    given, grad = call(), call(1)[0]
    want = wrapper.forward(*given)
    wanted = wrapper.backward(grad)
    kept = [b.clone() for b in buffers]
    wrapper.update_lora_weights()
    wrapper.submit_forward(*given)
    for tensor in given:
        tensor.zero_()
    assert torch.equal(want, wrapper.sync_forward())
    wrapper.submit_backward_async(grad)
    grad.zero_()
    for expected, got in zip(wanted, wrapper.sync_backward(), strict=True):
        assert torch.equal(expected, got)
    assert all(torch.equal(a, b) for a, b in zip(kept, buffers, strict=True))
    wrapper.submit_forward_inference(*call(), None)
    assert torch.equal(want, wrapper.sync_forward_inference(None))
    assert wrapper.cache_depth == 0


def test_calls_out_of_order_are_refused():
    wrapper, _, _ = ready()
    grad = call(1)[0]
    with pytest.raises(RuntimeError, match="without a saved pass"):
        wrapper.backward(grad)
    with pytest.raises(RuntimeError, match="without submit_forward"):
        wrapper.sync_forward()
    with pytest.raises(RuntimeError, match="without submit_backward"):
        wrapper.sync_backward()
    wrapper.submit_forward(*call())
    with pytest.raises(RuntimeError, match="submit_forward twice"):
        wrapper.submit_forward(*call())
    wrapper.sync_forward()
    with pytest.raises(RuntimeError, match="1 passes are saved, max_cache_depth=1"):
        wrapper.forward(*call())
    with pytest.raises(ValueError, match=r"grad_output has shape \(4, 64\)"):
        wrapper.backward(grad[:4])
    for scale in (0.0, float("nan")):
        with pytest.raises(ValueError, match="optimizer_grad_scale"):
            wrapper.backward(grad, optimizer_grad_scale=scale)
    assert wrapper.cache_depth == 1  # a refused call drops nothing
    wrapper.clear_saved_forwards()
    assert wrapper.cache_depth == 0
    with pytest.raises(RuntimeError, match="no weights yet"):
        ktk.KTMoEWrapper(0, E, K, H, N, mode="sft").forward(*call())
    with pytest.raises(RuntimeError, match="init_lora_weights"):
        make_sft().forward(*call())


def test_a_failed_backward_poisons_the_checkpoint_and_overwrites_next(monkeypatch):
    wrapper, _, buffers = ready()
    wrapper.forward(*call())
    wrapper.backward(call(1)[0])
    kept = [b.clone() for b in buffers]
    wrapper.checkpoint.keep(wrapper.forward(*call()))
    with monkeypatch.context() as patch:
        patch.setattr(training, "backward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            wrapper.backward(call(1)[0])
    assert wrapper.checkpoint.state is CheckpointState.POISONED
    wrapper.forward(*call())
    wrapper.backward(call(1)[0])
    assert all(torch.equal(a, b) for a, b in zip(kept, buffers, strict=True))


def test_a_checkpoints_output_has_three_states():
    kept = CheckpointOutput()
    with pytest.raises(RuntimeError, match="EMPTY"):
        kept.get(2)
    kept.keep(torch.ones(2, 3))
    assert torch.equal(torch.ones(2, 3), kept.get(2))
    with pytest.raises(RuntimeError, match="2 tokens, not 3"):
        kept.get(3)
    kept.poison()
    for refused in (lambda: kept.get(2), lambda: kept.keep(torch.ones(2, 3))):
        with pytest.raises(RuntimeError):
            refused()
    kept.clear()
    assert kept.state is CheckpointState.EMPTY


def test_skiplora_needs_no_adapters():
    wrapper = make_sft(method="AMXINT8_SFT_SkipLoRA")
    assert torch.equal(wrapper.moe.forward(*call()), wrapper.forward(*call()))
    d_hidden, d_weights = wrapper.backward(call(1)[0])
    assert d_hidden.abs().max() > 0
    assert d_weights.abs().max() > 0
    lora, buffers = twelve()
    with pytest.raises(ValueError, match="has no adapters"):
        wrapper.init_lora_weights(*lora, *buffers)


def test_experts_of_the_gpu_add_zero_and_have_no_gradient():
    wrapper, _, buffers = ready(gpu_experts_mask=[1, 0, 0, 0, 0, 1])
    hidden, ids, weights = call()
    wrapper.forward(hidden, ids, weights)
    d_weights = wrapper.backward(call(1)[0])[1]
    is_there = (ids == 0) | (ids == 5)
    assert is_there.any()
    assert (d_weights[is_there] == 0).all()
    assert (d_weights[~is_there] != 0).all()
    for buffer in buffers:
        assert (buffer[[0, 5]] == 0).all()
        assert (buffer[1:5] != 0).any()


def test_dropout_is_of_saved_passes_and_changes():
    wrapper, _, _ = ready(lora_dropout=0.5, max_cache_depth=2)
    plain = wrapper.forward(*call(), save_for_backward=False)
    first, second = wrapper.forward(*call()), wrapper.forward(*call())
    assert not torch.equal(plain, first)
    assert not torch.equal(first, second)


def test_no_tokens_give_no_rows_and_zero_gradients():
    wrapper, _, buffers = ready()
    given = call(tokens=0)
    assert wrapper.forward(given[0], given[1], given[2]).shape == (0, H)
    assert [g.shape for g in wrapper.backward(given[0])] == [(0, H), (0, K)]
    assert all((buffer == 0).all() for buffer in buffers)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"lora_rank": 0}, ValueError, "lora_rank=0"),
        ({"lora_rank": 129}, ValueError, "at most 128"),
        ({"lora_alpha": 0.0}, ValueError, "lora_alpha=0.0"),
        ({"lora_alpha": "32"}, TypeError, "lora_alpha='32'"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout=1.0: must be below 1"),
        ({"max_cache_depth": 0}, ValueError, "max_cache_depth=0"),
        ({"zero_point": True}, ValueError, "zero_point=True.*no format here has zero points"),
        ({"full_weight_grad": True}, ValueError, "full_weight_grad=True.*train_experts"),
        ({"max_deferred_experts_per_token": 1}, ValueError, "max_deferred_experts_per_token=1"),
        ({"max_resident_experts": 4}, ValueError, "max_resident_experts=4"),
        ({"method": "AMXINT4_1_SFT"}, ValueError, "AMXINT4_1_SFT.*zero points"),
        ({"method": "AMXINT2_SFT"}, ValueError, "(?s)AMXINT2_SFT.*AMXINT4"),
        ({"method": None}, ValueError, "method=None"),
    ],
)
def test_bad_sft_arguments_are_named(arguments, error, match):
    with pytest.raises(error, match=match):
        ktk.KTMoEWrapper(0, E, K, H, N, mode="sft", **arguments)


def test_tensors_that_do_not_fit_are_named_and_nothing_changes():
    wrapper, lora, buffers = ready()
    for at, name in enumerate([*MATRICES, *(f"grad_{m}" for m in MATRICES)]):
        for spoilt, match in (
            (lambda t: t[:, :1], "has shape"),
            (lambda t: t.float(), "torch.float32: must be torch.bfloat16"),
            (lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "contiguous"),
            (lambda t: t.to("meta"), "on meta"),
        ):
            given = [*lora, *buffers]
            given[at] = spoilt(given[at])
            with pytest.raises(ValueError, match=f"^{name} .*{match}"):
                wrapper.init_lora_weights(*given)
    with pytest.raises(ValueError, match="the same memory"):
        wrapper.init_lora_weights(*lora, *lora)
    assert wrapper.lora_tensors["up_lora_b"].data_ptr() == lora[3].data_ptr()


def test_a_fused_file_comes_back_and_bad_ones_change_nothing(tmp_path):
    from safetensors.torch import load_file, save_file

    wrappers = [ready(seed=i, layer_idx=i)[0] for i in range(2)]
    save_fused_expert_lora(wrappers, tmp_path)
    found = load_file(tmp_path / NAME)
    assert sorted(found) == sorted(f"layers.{i}.experts.{m}" for i in range(2) for m in MATRICES)
    others = [ready(seed=9, layer_idx=i)[0] for i in range(2)]
    load_fused_expert_lora(others, tmp_path)
    for mine, theirs in zip(wrappers, others, strict=True):
        for name, tensor in mine.lora_tensors.items():
            assert torch.equal(tensor, theirs.lora_tensors[name])
    changed = others[0].lora_tensors["gate_lora_a"].fill_(3)
    with pytest.raises(CheckpointError, match=r"no layer here has layers\.1"):
        load_fused_expert_lora(others[:1], tmp_path)
    bad = {**found, "layers.1.experts.down_lora_b": torch.zeros(2, 3)}
    save_file(bad, tmp_path / NAME)
    with pytest.raises(CheckpointError, match="must be BF16"):
        load_fused_expert_lora(others, tmp_path)
    save_file({n: t for n, t in found.items() if "layers.0" in n}, tmp_path / NAME)
    with pytest.raises(CheckpointError, match=r"lacks layers\.1"):
        load_fused_expert_lora(others, tmp_path)
    assert (changed == 3).all()
    with pytest.raises(ValueError, match="twice"):
        save_fused_expert_lora([wrappers[0], wrappers[0]], tmp_path)


def registered_parameters() -> tuple[Any, list[torch.nn.Parameter], list[torch.Tensor]]:
    """A wrapper whose adapters are parameters: registered as they are given."""
    wrapper = make_sft()
    lora, buffers = twelve()
    parameters = [torch.nn.Parameter(matrix) for matrix in lora]
    wrapper.init_lora_weights(*parameters, *buffers)
    return wrapper, parameters, buffers


def test_a_registered_parameters_grad_is_the_buffer_until_it_is_released():
    wrapper, parameters, buffers = registered_parameters()
    given, grad = call(), call(1)[0]
    assert wrapper.validate_authoritative_optimizer_grad_state() == "closed"
    wrapper.forward(*given)
    wrapper.backward(grad)
    assert all(p.grad is b for p, b in zip(parameters, buffers, strict=True))
    first = [buffer.clone() for buffer in buffers]
    wrapper.forward(*given)
    wrapper.backward(grad)
    for once, twice in zip(first, buffers, strict=True):
        assert torch.equal(2 * once, twice)
    torch.optim.SGD(parameters, lr=0.0).step()
    wrapper.release_authoritative_optimizer_grads()
    assert all(p.grad is None for p in parameters)
    wrapper.forward(*given)
    wrapper.submit_backward_async(grad)
    with pytest.raises(RuntimeError, match="under way"):
        wrapper.release_authoritative_optimizer_grads()
    wrapper.sync_backward()
    for once, again in zip(first, buffers, strict=True):
        assert torch.equal(once, again)
    torch.optim.SGD(parameters, lr=0.0).zero_grad()  # to None: backward overwrites
    wrapper.forward(*given)
    wrapper.backward(grad)
    assert all(torch.equal(a, b) for a, b in zip(first, buffers, strict=True))


def test_parts_of_a_buffer_are_registered_for_each_expert():
    wrapper, lora, buffers = ready()
    parameters = [torch.nn.Parameter(lora[0][expert]) for expert in range(E)]
    for expert, parameter in enumerate(parameters):
        wrapper.register_authoritative_optimizer_grad(f"{expert}", parameter, buffers[0][expert])
    assert [entry.name for entry in wrapper.authoritative_optimizer_grads] == list("01234567")[:E]
    wrapper.forward(*call())
    wrapper.backward(call(1)[0])
    assert parameters[1].grad is wrapper.authoritative_optimizer_grads[1].grad_view


def test_grads_that_do_not_fit_are_named():
    wrapper, lora, buffers = ready()
    register = wrapper.register_authoritative_optimizer_grad
    parameter = torch.nn.Parameter(lora[0])
    for given, error, match in (
        ((lora[0], buffers[0]), TypeError, "nn.Parameter"),
        ((parameter, None), TypeError, "must be a tensor"),
        ((parameter, buffers[1]), ValueError, "shape"),
        ((parameter, torch.zeros_like(lora[0])), ValueError, "init_lora_weights"),
    ):
        with pytest.raises(error, match=match):
            register("gate", *given)
    register("gate", parameter, buffers[0])
    with pytest.raises(RuntimeError, match="already"):
        register("again", parameter, buffers[0])
    other = torch.nn.Parameter(lora[1])
    register("b", other, buffers[1])
    other.grad = buffers[1]
    wrapper.forward(*call())
    with pytest.raises(RuntimeError, match="1 of 2"):
        wrapper.backward(call(1)[0])
    other.grad = torch.zeros_like(other)
    with pytest.raises(RuntimeError, match="another tensor"):
        wrapper.backward(call(1)[0])
    assert wrapper.cache_depth == 1


class BlockFp8:
    """As KT-Kernel's trainer holds a layer: blocks of 32 x 16."""

    block_size = (32, 16)

    def __init__(self) -> None:
        made = torch.Generator().manual_seed(3)
        for name, (rows, columns) in {"gate": (N, H), "up": (N, H), "down": (H, N)}.items():
            codes = [
                torch.randn(rows, columns, generator=made).to(torch.float8_e4m3fn) for _ in range(E)
            ]
            scales = [
                torch.rand(-(-rows // 32), -(-columns // 16), generator=made) for _ in range(E)
            ]
            setattr(self, f"{name}_proj", codes)
            setattr(self, f"{name}_scale", scales)

    def decoded(self) -> list[torch.Tensor]:
        found = []
        for name in ("gate", "up", "down"):
            pairs = zip(getattr(self, f"{name}_proj"), getattr(self, f"{name}_scale"), strict=True)
            spread = [
                (codes.float(), scales.repeat_interleave(32, 0).repeat_interleave(16, 1))
                for codes, scales in pairs
            ]
            found.append(torch.stack([c * s[: c.shape[0], : c.shape[1]] for c, s in spread]))
        return found


@pytest.mark.parametrize("method", ["INT8_SFT", "BF16"])
def test_block_fp8_weights_are_their_decoded_values(method):
    given = BlockFp8()
    wrapper, other = (ktk.KTMoEWrapper(0, E, K, H, N, mode="sft", method=method) for _ in range(2))
    wrapper.load_block_fp8_weights(given, torch.arange(E))
    other.load_weights_from_tensors(*given.decoded())
    got, want = (x.moe.runner.packed().data for x in (wrapper, other))
    assert np.array_equal(got, want)


def test_bad_block_fp8_weights_are_named():
    wrapper = ktk.KTMoEWrapper(0, E, K, H, N, mode="sft", method="INT8_SFT")
    for name, value, match in (
        ("block_size", (0, 16), "block_size"),
        ("up_proj", [], "up_proj has tensors of 0 experts"),
        ("down_proj", [torch.zeros(H, N)] * E, "float8_e4m3fn"),
        ("gate_scale", [torch.zeros(1, 1)] * E, r"gate_scale\[0\] has shape"),
    ):
        given = BlockFp8()
        setattr(given, name, value)
        with pytest.raises(ValueError, match=match):
            wrapper.load_block_fp8_weights(given)


def test_what_packed_experts_do_not_have_says_what_to_do():
    wrapper = make_sft()
    with pytest.raises(BackendError, match="nothing to save"):
        wrapper.save_backward_weights_from_tensors(*random_weights(), torch.arange(E), "out")
    with pytest.raises(BackendError, match="train_experts"):
        wrapper.init_full_weight_grad_buffers(*random_weights())
