"""Whole models in GGUF files that other programs write, and files that give none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ktk import backends
from ktk.errors import CheckpointError
from ktk.integration.transformers.gguf import load_gguf_model, load_gguf_tokenizer
from make import whole_models
from make.rewriting import rewritten
from make.whole_models import IDS, H, Made, agreement, logits

pytestmark = pytest.mark.skipif(
    backends.backends()["LLAMAFILE"].why_not() is not None, reason="LLAMAFILE does not run"
)


def test_kv_b_in_one_piece_and_older_key_lengths(made: Made, tmp_path: Path) -> None:
    model, file = made("deepseek2-v2")
    state = model.state_dict()

    def older(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        for n in range(3):
            del tensors[f"blk.{n}.attn_k_b.weight"], tensors[f"blk.{n}.attn_v_b.weight"]
            whole = state[f"model.layers.{n}.self_attn.kv_b_proj.weight"].numpy()
            tensors[f"blk.{n}.attn_kv_b.weight"] = (whole, None)
        for part in ("key", "value"):
            length = metadata.pop(f"deepseek2.attention.{part}_length_mla")
            metadata[f"deepseek2.attention.{part}_length"] = length
        metadata["deepseek2.attention.head_count_kv"] = 4

    loaded = load_gguf_model(rewritten(file, tmp_path / "m.gguf", older), dtype="float32")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)


def test_a_split_model_by_any_part_and_by_its_directory(made: Made, tmp_path: Path) -> None:
    model, file = made("qwen3moe")
    rewritten(file, tmp_path / "m.gguf", lambda *_: None, split_max_tensors=20)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 1
    for path in (tmp_path, parts[-1]):
        loaded = load_gguf_model(path, dtype="float32")
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)
        assert load_gguf_tokenizer(path).chat_template == whole_models.TEMPLATE


def test_layers_of_multi_token_prediction_are_left_out(made: Made, tmp_path: Path) -> None:
    model, file = made("glm4moe")

    def with_prediction(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        metadata["glm4moe.block_count"] = 4
        metadata["glm4moe.nextn_predict_layers"] = 1
        for name in [name for name in tensors if name.startswith("blk.2.")]:
            tensors[name.replace("blk.2.", "blk.3.")] = tensors[name]
        tensors["blk.3.nextn.eh_proj.weight"] = (np.zeros((H, 2 * H), np.float32), None)

    loaded = load_gguf_model(rewritten(file, tmp_path / "m.gguf", with_prediction), dtype="float32")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)


def test_rope_factors_divide_the_frequencies(made: Made, tmp_path: Path) -> None:
    _, file = made("mixtral")
    factors = np.linspace(1, 8, 32, dtype=np.float32)

    def scaled(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["rope_freqs.weight"] = (factors, None)

    path = rewritten(file, tmp_path / "m.gguf", scaled)
    loaded = load_gguf_model(path, dtype="float32")
    plain = load_gguf_model(file, dtype="float32")
    rotary = [m.model.rotary_emb.inv_freq.numpy() for m in (loaded, plain)]
    np.testing.assert_allclose(rotary[0], rotary[1] / factors, rtol=1e-6)
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(path), logits_all=True, n_ctx=128, n_threads=2, verbose=False)
    theirs.eval(IDS[0].tolist())
    assert agreement(torch.tensor(theirs.scores[: IDS.shape[1]]), logits(loaded)) > 0.999


def _drop(name: str) -> Callable[..., None]:
    return lambda metadata, tensors: tensors.pop(name)


def _add(name: str, *shape: int) -> Callable[..., None]:
    return lambda metadata, tensors: tensors.update({name: (np.zeros(shape, np.float32), None)})


def _say(key: str, value: Any) -> Callable[..., None]:
    return lambda metadata, tensors: metadata.update({key: value})


def _unsay(key: str) -> Callable[..., None]:
    return lambda metadata, tensors: metadata.pop(key)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_drop("blk.1.attn_k.weight"), r"1 tensors are missing: blk\.1\.attn_k\.weight"),
        (_drop("output_norm.weight"), "1 tensors are missing: output_norm.weight"),
        (_drop("token_embd.weight"), "no tensor 'token_embd.weight'"),
        (
            _add("blk.1.attn_post_norm.weight", H),
            r"no place in Qwen3MoeForCausalLM: blk\.1\.attn_post",
        ),
        (
            _add("blk.0.attn_q.weight", 64, H),
            r"'blk\.0\.attn_q\.weight' \(byte \d+\) gives \(64, 256\)",
        ),
        (_say("architecture", "dbrx"), "whole models of qwen3moe, deepseek2, llama"),
        (_say("qwen3moe.rope.scaling.type", "longrope"), "ktk knows none, linear and yarn"),
        (_say("qwen3moe.rope.dimension_count", 8), "must be the head's size, 32"),
        (_say("qwen3moe.attention.head_count", "four"), "must be an int of 0"),
        (
            _unsay("qwen3moe.attention.head_count"),
            "attention.head_count is None: the model's config needs it",
        ),
        (_say("qwen3moe.attention.head_count_kv", [2, 4, 2]), "differs between layers"),
        (_say("qwen3moe.attention.head_count", 3), "head_count=3: must be a multiple of 2"),
        (_say("qwen3moe.attention.head_count_kv", 0), "transformers makes no qwen3_moe of what"),
        (_say("qwen3moe.block_count", 1 << 20), "says 1048576 layers"),
        (_say("qwen3moe.block_count", 4), r"11 tensors are missing: blk\.3\."),
        (_say("qwen3moe.attention.layer_norm_rms_epsilon", "small"), "must be a number of 0 to 1"),
    ],
)
def test_what_does_not_fit_is_named(
    change: Callable[..., None], text: str, made: Made, tmp_path: Path
) -> None:
    _, file = made("qwen3moe")

    def both(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        change(metadata, tensors)
        architecture = metadata.get("architecture")
        for key in list(metadata) if architecture else ():
            if key.startswith("qwen3moe."):
                metadata[key.replace("qwen3moe", architecture)] = metadata.pop(key)

    path = rewritten(file, tmp_path / "m.gguf", both)
    with pytest.raises(CheckpointError, match=text):
        load_gguf_model(path)
