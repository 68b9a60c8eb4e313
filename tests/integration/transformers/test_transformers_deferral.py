"""Deferred experts in whole models: output(n) = immediate(n) + deferred(n - 1), nothing is lost."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from ktk.convert.run import convert
from ktk.errors import BackendError
from ktk.integration.transformers import KtkConfig, forward, linear, load_model
from ktk.integration.transformers.decoder_layers import fusion_report
from ktk.integration.transformers.decoder_specs import DEFERRED
from ktk.integration.transformers.deferral import defer_experts
from ktk.integration.transformers.experts import find_experts, handle_of
from ktk.integration.transformers.sources import layer_of
from ktk.ops.deferral import split
from make.transformers_cases import make_model, prompt, run

pytestmark = pytest.mark.slow
LAYERS, TOP_K = 5, 4
DENSE = 2  # experts are in layers 0, 1, 3 and 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float")
    changes = {
        "num_hidden_layers": LAYERS,
        "num_experts_per_tok": TOP_K,
        "mlp_only_layers": [DENSE],
    }
    make_model("qwen3_moe", **changes).save_pretrained(path)
    return path


def asked(most: int, **options: Any) -> KtkConfig:
    return KtkConfig(None, max_deferred_experts=most, **options)


def by_definition(most: int, seen: list[tuple[int, int, int]]) -> Any:
    """In place of ``run_experts``: now and later by the formula, one after the other."""
    later_of: dict[int, torch.Tensor] = {}

    def run_layer(
        module: Any, handle: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        layer = handle.layer
        now, later = ids.numpy(), np.full(ids.shape, -1)
        if layer in (0, 3):  # 1 is before a dense layer, 4 is the last
            now, later = split(ids.numpy(), weights.numpy(), TOP_K - most)
        out = handle.moe.forward(x, now, weights) + later_of.pop(layer - 1, torch.zeros(1))
        later_of[layer] = handle.moe.forward(x, later, weights)
        seen.append((layer, len(ids), int((later >= 0).sum())))
        return out

    return run_layer


@torch.no_grad()
def of_one_token(model: Any) -> torch.Tensor:
    """Logits: of a batch most experts are some token's best, and run now."""
    logits: torch.Tensor = model(prompt()[:1, :1]).logits
    return logits


@pytest.mark.parametrize("most", [1, 2, TOP_K])
def test_a_model_computes_what_the_definition_says(
    most: int, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(saved, quantization_config=asked(most))
    got, plain, seen = (*run(model), of_one_token(model)), load_model(saved), []
    assert not torch.equal(got[2], of_one_token(plain))
    for name, module in find_experts(plain):
        handle_of(module).layer = layer_of(name)
    monkeypatch.setattr(forward, "run_experts", by_definition(most, seen))
    want = (*run(plain), of_one_token(plain))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    deferred = {layer: sum(n for at, _, n in seen if at == layer) for layer, _, _ in seen}
    assert deferred[0] > 0 and deferred[3] > 0 and deferred[1] == deferred[4] == 0
    assert [n for layer, tokens, n in seen if tokens == 1 and layer == 0] == [most]


def test_none_is_the_default_and_zero_is_none(saved: Path) -> None:
    plain = load_model(saved)
    want = of_one_token(plain)
    assert torch.equal(want, of_one_token(load_model(saved, quantization_config=asked(0))))
    model = load_model(saved, quantization_config=asked(2))
    deferred = of_one_token(model)
    assert not torch.equal(want, deferred)
    assert defer_experts(model, 0) == 0
    assert torch.equal(want, of_one_token(model))
    assert defer_experts(plain, 2) == 2
    assert torch.equal(deferred, of_one_token(plain))


def test_experts_of_a_device_are_never_deferred(saved: Path) -> None:
    """So the sums are those of the CPU alone where none is left to it."""
    device = {"device": "cpu", "gpu_experts": 1.0}
    want = run(load_model(saved))[0]
    model = load_model(saved, quantization_config=asked(3, **device))
    assert (run(model)[0] - want).abs().max() <= 1e-4
    half = {"device": "cpu", "gpu_experts": 0.5, "gpu_update": "online"}
    run(load_model(saved, quantization_config=asked(3, **half)))


@pytest.mark.parametrize("gpu_experts", [0.0, 0.25])
def test_some_on_a_device_and_some_deferred(
    gpu_experts: float, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = asked(2, device="cpu", gpu_experts=gpu_experts)
    model = load_model(saved, quantization_config=config)
    got = run(model)[0]
    if gpu_experts == 0.0:
        assert torch.equal(got, run(load_model(saved, quantization_config=asked(2)))[0])
        return
    plain, later_of = load_model(saved), {}
    masks = {layer_of(name): handle_of(m).hybrid.mask for name, m in find_experts(model)}
    for name, module in find_experts(plain):
        handle_of(module).layer = layer_of(name)

    def run_layer(
        module: Any, handle: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        layer, later = handle.layer, np.full(ids.shape, -1)
        if layer in (0, 3):
            later = split(ids.numpy(), weights.numpy(), TOP_K - 2)[1]
            later = np.where(masks[layer][later], -1, later)
        now = np.where(later >= 0, -1, ids.numpy())
        out = handle.moe.forward(x, now, weights) + later_of.pop(layer - 1, torch.zeros(1))
        later_of[layer] = handle.moe.forward(x, later, weights)
        return out

    monkeypatch.setattr(forward, "run_experts", run_layer)
    assert (run(plain)[0] - got).abs().max() <= 1e-4


def test_a_packed_directory_that_streams_defers_with_the_same_bits(
    saved: Path, tmp_path: Path
) -> None:
    convert(saved, tmp_path / "packed", quant_method="int8")
    want = run(load_model(tmp_path / "packed", quantization_config=asked(2)))[0]
    model = load_model(tmp_path / "packed", quantization_config=asked(2), expert_memory=16)
    assert torch.equal(run(model)[0], want)


@torch.no_grad()
def test_a_layer_that_is_left_out_is_an_error_and_the_next_pass_is_right(saved: Path) -> None:
    model = load_model(saved, quantization_config=asked(2))
    ids = prompt()[:1, :1]
    want = model(ids).logits
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layers[0], *layers[2:]])
    with pytest.raises(BackendError, match="layer 0 deferred were not added by layer 1"):
        model(ids, use_cache=False)
    model.model.layers = torch.nn.ModuleList([layers[0]])
    with pytest.raises(BackendError, match="layer 0 deferred were not added by layer 1"):
        model(ids, use_cache=False)
    model.model.layers = layers
    assert torch.equal(model(ids).logits, want)


@torch.no_grad()
def test_what_an_abandoned_pass_deferred_is_added_nowhere(saved: Path) -> None:
    model = load_model(saved, quantization_config=asked(2))
    ids = prompt()[:1, :1]
    want = model(ids).logits

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for error in (KeyboardInterrupt,):
        hook = model.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(error):
            model(ids)
        hook.remove()
        assert torch.equal(model(ids).logits, want)


def test_with_gradients_nothing_is_deferred(saved: Path) -> None:
    model = load_model(saved, quantization_config=asked(2))
    got = model(prompt()).logits
    assert torch.equal(got.detach(), load_model(saved)(prompt()).logits.detach())
    got.square().mean().backward()


@torch.no_grad()
def test_a_module_called_by_itself_defers_nothing(saved: Path) -> None:
    models = [load_model(saved, quantization_config=asked(most)) for most in (0, 2)]
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    ids, weights = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    modules = [model.model.layers[0].mlp.experts for model in models]
    want, got = (module(x, ids, weights) for module in modules)
    assert torch.equal(want, got)


def test_threads_and_copies_have_their_own_passes(saved: Path) -> None:
    model = load_model(saved, quantization_config=asked(2))
    same = copy.deepcopy(model)
    ids = [prompt()[:1, :n] for n in (1, 3, 11)]
    with torch.no_grad():
        wants = [model(i).logits for i in ids]
    failures: list[BaseException] = []

    def work(own: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(20):
                    for i, want in zip(ids, wants, strict=True):
                        assert torch.equal((model, same)[own % 2](i).logits, want)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures


def test_layers_are_not_fused(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SMALLEST", 1)
    model = load_model(saved, quantization_config=asked(2, linear="int8"))
    reasons = list(fusion_report(model).values())
    assert reasons.count(DEFERRED) == LAYERS - 1
    plain = load_model(saved, quantization_config=asked(0, linear="int8"))
    assert DEFERRED not in fusion_report(plain).values()
    for most in (2, 0, 2):  # of layers that were fused before
        defer_experts(plain, most)
        reasons = list(fusion_report(plain).values())
        assert reasons.count(DEFERRED) == (LAYERS - 1 if most else 0)
    assert torch.equal(of_one_token(plain), of_one_token(model))
    make_model("qwen3_moe").save_pretrained(tmp_path)
    every = load_model(tmp_path, quantization_config=KtkConfig(None, linear="int8"))
    for most in (1, 0):
        defer_experts(every, most)
        assert set(fusion_report(every).values()) == {DEFERRED if most else None}


def test_what_cannot_defer_is_refused(saved: Path, tmp_path: Path) -> None:
    for most in (-1, 1.0, True, "2"):
        with pytest.raises(ValueError, match=f"max_deferred_experts={most!r}: must be an int"):
            asked(most)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_deferred_experts=-1: must be at least 0"):
        defer_experts(load_model(saved), -1)
    make_model("qwen3_moe", mlp_only_layers=[1]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no two neighbouring layers"):
        load_model(tmp_path, quantization_config=asked(1))
