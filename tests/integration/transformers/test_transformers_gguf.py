"""Experts of a GGUF file in place of those of a model's directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from transformers import AutoModelForCausalLM

import ktk
from ktk import backends
from ktk.convert.run import convert
from ktk.errors import CheckpointError
from ktk.experts.dequantise import expert_weights
from ktk.integration.transformers import KtkConfig, load_model
from ktk.integration.transformers.experts import find_experts, handle_of
from ktk.integration.transformers.loading import packed_modules
from ktk.integration.transformers.sources import layer_of
from make.transformers_cases import FAMILIES, experts_of, make_model, put_weights, run

pytestmark = pytest.mark.slow


# Rows must be whole blocks of 32.
WHOLE_BLOCKS = {"qwen3_moe": {"moe_intermediate_size": 64}, "mixtral": {"intermediate_size": 96}}


def plain_and_gguf(family: str, tmp_path: Path, method: str = "q8_0") -> tuple[Path, Path]:
    """A tiny float directory, and the GGUF file of its experts."""
    model = make_model(family, torch.bfloat16, **WHOLE_BLOCKS.get(family, {}))
    model.save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "experts.gguf", quant_method=method)
    return tmp_path / "plain", tmp_path / "experts.gguf"


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_a_gguf_file_run_in_place_of_the_directorys(family: str, tmp_path: Path) -> None:
    plain, file = plain_and_gguf(family, tmp_path)
    loaded, info = load_model(plain, dtype=torch.float32, gguf=file, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rows = packed_modules(loaded)
    runs = backends.backends()["LLAMAFILE"].why_not() is None
    assert all(("Q8_0" if runs else "int8") in row.kernel for row in rows)
    blocks = ktk.load_gguf(file).experts(layer_of(rows[0].name))
    if runs:
        assert rows[0].bytes == sum(m.num_bytes for m in blocks.matrices.values())
        assert rows[0].bits_per_weight == 8.5
    want = make_model(family, **WHOLE_BLOCKS.get(family, {}))
    with torch.no_grad():
        for name, module in find_experts(want):
            found = ktk.load_gguf(file).experts(layer_of(name))
            for e in range(found.spec.num_experts):
                put_weights(module, e, expert_weights(found, e))
    logits, exact = run(loaded)[0], run(want, "eager")[0]
    assert (logits - exact).abs().mean() <= 0.02 * exact.abs().mean()


def test_a_method_for_packed_weights_quantises_the_gguf_anew(tmp_path: Path) -> None:
    plain, file = plain_and_gguf("mixtral", tmp_path)
    loaded = load_model(plain, method="NUMPY", gguf=file)
    assert all(row.kernel == "numpy int8" for row in packed_modules(loaded))


def test_config_takes_a_gguf_file(tmp_path: Path) -> None:
    plain, file = plain_and_gguf("mixtral", tmp_path)
    config = KtkConfig(gguf=file, method="NUMPY")
    loaded = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    assert torch.equal(run(loaded)[0], run(load_model(plain, "NUMPY", gguf=file))[0])
    assert json.loads(json.dumps(config.to_dict()))["gguf"] == str(file)


def test_biases_of_blocks_reach_an_activation_that_ktk_does_not_know(tmp_path: Path) -> None:
    plain, file = plain_and_gguf("gpt_oss", tmp_path)
    loaded = load_model(plain, dtype=torch.float32, gguf=file)
    want = run(loaded)[0]
    for module in experts_of(loaded):
        handle_of(module).activation = None
    assert torch.allclose(run(loaded)[0], want, rtol=1e-2, atol=1e-2)


def test_a_gguf_of_another_model_is_refused(tmp_path: Path) -> None:
    plain, file = plain_and_gguf("mixtral", tmp_path)
    config = json.loads((plain / "config.json").read_text())
    for change, match in (
        ({"intermediate_size": 64}, "the model's config says"),
        ({"num_hidden_layers": 3}, r"experts.gguf: no packed experts for model.layers.2.mlp"),
        ({"num_hidden_layers": 1}, r"experts.gguf: packed experts of layers \[1\]"),
    ):
        (plain / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=match):
            load_model(plain, gguf=file)
    (plain / "config.json").write_text(json.dumps(config))
    convert(plain, tmp_path / "packed", quant_method="int8")
    with pytest.raises(CheckpointError, match="packed or quantised already"):
        load_model(tmp_path / "packed", gguf=file)
    with pytest.raises(CheckpointError, match="nothing.gguf"):
        load_model(plain, gguf=tmp_path / "nothing.gguf")


def test_saving_what_no_packed_directory_holds_is_refused(tmp_path: Path) -> None:
    plain, file = plain_and_gguf("mixtral", tmp_path)
    loaded = load_model(plain, gguf=file)
    if not handle_of(experts_of(loaded)[0]).moe.packed.is_packed:
        with pytest.raises(ValueError, match="Q8_0 blocks of its file"):
            loaded.save_pretrained(tmp_path / "saved")
    loaded = load_model(plain, "NUMPY", gguf=file)
    loaded.save_pretrained(tmp_path / "packed")
    again = load_model(tmp_path / "packed", "NUMPY")
    assert torch.equal(run(again)[0], run(loaded)[0])
