"""A GGUF model as a mapping of its layers, read ahead."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import quants

import ktk
from ktk.backends import backends
from ktk.errors import CheckpointError
from ktk.experts.stored import StoredExperts
from ktk.models.gguf.experts import GgufExperts
from make.gguf_families import FUSED, family_file, singles
from make.gguf_files import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    sizes,
    stacked,
    write_gguf,
)


def test_a_model_is_a_mapping_of_its_layers(tmp_path: Path) -> None:
    path, _ = family_file(tmp_path / "a.gguf", "kimi-k2")
    model = ktk.load_gguf(path)
    assert model.layers == (1, 2) == tuple(model) and len(model) == 2 and 1 in model
    assert model.spec(1).num_experts == EXPERTS and model.num_experts_per_tok == 2
    assert model.metadata["general.architecture"] == "deepseek2"
    assert model.routing.expert_weights_scale == 2.5
    assert model.experts(1).up.format.name == "Q8_0" and "deepseek2, 2 MoE layers" in repr(model)
    with pytest.raises(KeyError):
        model[0]
    with pytest.raises(CheckpointError, match="layer 0 has no experts"):
        model.moe(0)


def test_a_method_or_repack_that_is_none_is_refused(tmp_path: Path) -> None:
    path, _ = family_file(tmp_path / "a.gguf", "kimi-k2")
    with pytest.raises(ValueError, match="method='Q4_K' is unknown"):
        ktk.load_gguf(path, method="Q4_K")
    model = ktk.load_gguf(path, repack="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="repack='no': must be True, False or None"):
        model[1]


def test_a_model_equals_itself_alone_and_comparing_makes_no_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = family_file(tmp_path / "a.gguf", "kimi-k2")
    model = ktk.load_gguf(path)
    monkeypatch.setattr(GgufExperts, "experts", None)
    assert model == model and model != ktk.load_gguf(path) and model != {}
    assert model in {model}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_while_a_layer_is_made_makes_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = family_file(tmp_path / "a.gguf", "kimi-k2")
    model, experts = ktk.load_gguf(path), GgufExperts.experts
    begun, go_on = threading.Event(), threading.Event()

    def slow(self: GgufExperts, layer: int) -> StoredExperts:
        if layer == 1:
            begun.set()
            go_on.wait(60)
        return experts(self, layer)

    monkeypatch.setattr(GgufExperts, "experts", slow)
    maker = threading.Thread(target=model.moe, args=(1,))
    maker.start()
    try:
        assert begun.wait(60)
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # a child that waits for the lock is killed
            made = model[2].spec == model.spec(2)
            os._exit(0 if made else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        go_on.set()
        maker.join()


def test_the_next_layer_is_read_ahead_only_if_it_is_not_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = family_file(tmp_path / "a.gguf", "qwen3moe")
    made: list[Any] = []
    monkeypatch.setattr(
        "ktk.ops.gguf_model.MoE", lambda blocks, **kw: made.append((blocks, kw)) or kw
    )
    model = ktk.load_gguf(path, method="LLAMAFILE", num_threads=2, repack=False)
    asked: list[int] = []
    monkeypatch.setattr(GgufExperts, "prefetch", lambda self, layer: asked.append(layer))
    monkeypatch.setattr(GgufExperts, "is_resident", lambda self, layer: layer == 1)
    for layer in (1, 2, 1):
        model.moe(layer)
        if model._reader is not None:
            model._reader.join()
    assert asked == [2, 2]  # the layer after 2 is 1, which is there
    assert [kw for _, kw in made] == [
        {"method": "LLAMAFILE", "num_threads": 2, "repack": False}
    ] * 2


@pytest.mark.parametrize("is_copied", [False, True])
def test_a_layer_whose_moe_has_its_own_weights_is_not_read_ahead_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_copied: bool
) -> None:
    path, _ = family_file(tmp_path / "a.gguf", "qwen3moe")
    monkeypatch.setattr("ktk.ops.gguf_model.MoE", lambda blocks, **_: None if is_copied else blocks)
    monkeypatch.setattr(GgufExperts, "is_resident", lambda self, layer: False)
    asked: list[int] = []
    monkeypatch.setattr(GgufExperts, "prefetch", lambda self, layer: asked.append(layer))
    model = ktk.load_gguf(path)
    for layer in (1, 2, 1):
        model.moe(layer)
        if model._reader is not None:
            model._reader.join()
    assert asked == ([2] if is_copied else [2, 1, 2])


@pytest.mark.parametrize("repack", [False, True])
@pytest.mark.parametrize("style", ["stacked", "fused", "even", "uneven"])
def test_a_layer_of_a_model_runs(tmp_path: Path, style: str, repack: bool) -> None:
    if "LLAMAFILE" not in backends():
        pytest.skip("LLAMAFILE: no such backend")
    if reason := backends()["LLAMAFILE"].why_not():
        pytest.skip(f"LLAMAFILE: {reason}")
    rng = np.random.default_rng(2)
    tensors: dict[str, Any] = (
        stacked(rng, (0,), FUSED if style == "fused" else ("gate", "up", "down"))
        if style in ("stacked", "fused")
        else singles(rng, style)
    )
    path = write_gguf(tmp_path / "a.gguf", "llama", tensors, sizes("llama"))
    model = ktk.load_gguf(path, method="LLAMAFILE", repack=repack)
    hidden = rng.standard_normal((3, HIDDEN), np.float32)
    ids = np.array([[0, 1], [2, 3], [1, 1]])
    weights = np.array([[0.5, 0.5], [0.25, 0.75], [1.0, 0.5]], np.float32)
    got = model.moe(0)(hidden, ids, weights)
    assert model.moe(0) is model[0] and model._copied == ({0} if repack else set())
    values = {name: quants.dequantize(*given) for name, given in tensors.items()}
    w: dict[str, np.ndarray] = {}
    for part in ("gate", "up", "down"):
        if style == "fused" and part != "down":
            rows = slice(0, INTERMEDIATE) if part == "gate" else slice(INTERMEDIATE, None)
            w[part] = values["blk.0.ffn_gate_up_exps.weight"][:, rows]
        elif style in ("even", "uneven"):
            w[part] = np.stack([values[f"blk.0.ffn_{part}.{e}.weight"] for e in range(EXPERTS)])
        else:
            w[part] = values[f"blk.0.ffn_{part}_exps.weight"]
    want = np.zeros_like(got)
    for t, slot in np.ndindex(ids.shape):
        e = ids[t, slot]
        g, u = w["gate"][e] @ hidden[t], w["up"][e] @ hidden[t]
        want[t] += weights[t, slot] * (w["down"][e] @ (g / (1 + np.exp(-g)) * u))
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
