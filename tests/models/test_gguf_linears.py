"""Linear layers of whole GGUF models, run in the blocks of their file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ktk import backends
from ktk.errors import CheckpointError
from ktk.generate.describe import describe_model
from ktk.generate.open import open_model
from ktk.integration.transformers import linear
from ktk.integration.transformers.gguf import load_gguf_model
from ktk.integration.transformers.linear import KtkLinear
from make.rewriting import rewritten
from make.whole_models import IDS, Made, logits, usual_agreement

pytestmark = pytest.mark.skipif(
    backends.backends()["LLAMAFILE"].why_not() is not None, reason="LLAMAFILE does not run"
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny matrices count as worth running."""
    monkeypatch.setattr(linear, "SMALLEST", 1)


def linears(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, KtkLinear)}


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("qwen3moe", "q4_k"),
        ("qwen2moe", "q8_0"),  # biases, shared experts
        ("mixtral", "q8_0"),  # rows of q and k in pairs, lm_head tied
        ("granitemoe", "bf16"),  # likewise, tied
        ("deepseek2-v3", "q6_k"),  # kv_b in pieces
        ("gpt-oss", "q4_0"),
        ("glm4moe", "f16"),
    ],
)
def test_linear_layers_run_as_their_blocks_dequantised(
    name: str, rest: str, made: Made, small: None
) -> None:
    _, file = made(name, "f32", rest)
    blocks, floats = (load_gguf_model(file, "auto", "float32", linear=x) for x in ("file", "none"))
    found, plain = linears(blocks), dict(floats.named_modules())
    left = {n.rpartition(".")[2] for n, m in blocks.named_modules() if type(m) is torch.nn.Linear}
    assert left == {"deepseek2-v3": {"kv_b_proj"}, "qwen2moe": {"shared_expert_gate"}}.get(
        name, set()
    )
    assert "lm_head" in found and not linears(floats)
    assert rest.upper() in {module.kernel.split()[-1] for module in found.values()}
    for key, module in found.items():
        assert f"{key}.weight" not in blocks.state_dict()
        x = torch.from_numpy(
            np.random.default_rng(1).standard_normal((4, module.in_features), np.float32)
        )
        with torch.no_grad():
            want, got = plain[key](x), module(x)
        assert (got - want).abs().mean() < 0.02 * want.abs().mean(), key
    assert usual_agreement(logits(blocks), logits(floats)) > 0.999
    assert torch.equal(logits(blocks), logits(copy.deepcopy(blocks)))


def test_blocks_are_mapped_and_only_moved_rows_are_copied(made: Made, small: None) -> None:
    _, file = made("mixtral", "q8_0", "q8_0")
    for key, module in linears(load_gguf_model(file)).items():
        assert module._ktk.panels.flags.writeable == key.endswith(("q_proj", "k_proj")), key


def test_the_linear_layers_of_a_file_can_be_packed_or_left_alone(made: Made, small: None) -> None:
    _, file = made("qwen3moe", "q8_0", "q8_0")
    packed = linears(load_gguf_model(file, linear="int4"))
    assert packed and all("int4" in module.kernel for module in packed.values())
    assert not linears(load_gguf_model(file, linear="none"))
    assert not linears(load_gguf_model(made("qwen3moe")[1]))  # of F32
    with pytest.raises(ValueError, match="linear='int3': must be one of file, int8, int4, none"):
        load_gguf_model(file, linear="int3")


def test_what_needs_float_linear_layers_says_so(made: Made, small: None, tmp_path: Path) -> None:
    _, file = made("qwen3moe", "q8_0", "q8_0")
    model = load_gguf_model(file, "INT8")
    with pytest.raises(ValueError, match=r'q_proj is run by .* gguf Q8_0.*linear="none"'):
        model.save_pretrained(tmp_path / "saved")
    assert not model(IDS).logits.requires_grad
    model.model.embed_tokens.weight.requires_grad_()
    with pytest.raises(RuntimeError, match='linear="none"'):
        model(IDS)
    floats = load_gguf_model(file, "INT8", linear="none")
    floats.save_pretrained(tmp_path / "saved")
    assert floats(IDS).logits.requires_grad


@pytest.mark.parametrize("name", ["qwen3moe", "mixtral"])
def test_blocks_of_another_shape_are_named(
    name: str, made: Made, small: None, tmp_path: Path
) -> None:
    _, file = made(name, "q8_0", "q8_0")

    def shorter(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        raw, kind = tensors["blk.0.attn_q.weight"]
        tensors["blk.0.attn_q.weight"] = (raw[:64], kind)

    path = rewritten(file, tmp_path / "m.gguf", shorter)
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_q\.weight' \(byte \d+\) gives \(64,"):
        load_gguf_model(path)


def test_without_the_extension_linear_layers_stay_with_torch(
    made: Made, small: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, file = made("qwen3moe", "q8_0", "q8_0")
    monkeypatch.setattr("ktk.ops.linear.why_not", lambda: "no compiler")
    assert not linears(load_gguf_model(file))
    assert "stay with torch: no compiler" in caplog.text
    assert describe_model(file).linear_bytes == 0


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_the_memory_of_linear_layers_is_told(name: str, made: Made, small: None) -> None:
    _, file = made(name, "q8_0", "q8_0")
    opened = open_model(file)
    model, told = opened.model, opened.description
    in_blocks = sum(module._ktk.panels.nbytes for module in linears(model).values())
    floats = sum(2 * p.numel() for p in model.parameters())
    assert (told.linear_bytes, told.rest_bytes) == (in_blocks, in_blocks + floats)
    for choice in ("int8", "none"):
        opened = open_model(file, linear=choice)
        assert bool(linears(opened.model)) == (choice == "int8")
        assert opened.description.linear_bytes == 0
        assert opened.description.rest_bytes > told.rest_bytes
