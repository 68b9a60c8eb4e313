"""Whole models from GGUF files: as transformers' float models of the same weights,
and as llama.cpp, where it is installed.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ktk import backends
from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.cli import main
from ktk.convert.run import convert
from ktk.errors import CheckpointError
from ktk.experts.dequantise import expert_weights
from ktk.integration.transformers.experts import find_experts
from ktk.integration.transformers.gguf import load_gguf_model
from ktk.integration.transformers.loading import packed_modules
from ktk.integration.transformers.sources import layer_of
from ktk.models.arch import WHOLE_MODELS
from ktk.models.find import find_gguf_experts
from make import whole_models
from make.whole_models import IDS, MODELS, WIDTH, E, H, Made, agreement, logits, usual_agreement

pytestmark = pytest.mark.skipif(
    backends.backends()["LLAMAFILE"].why_not() is not None, reason="LLAMAFILE does not run"
)


def greedy(model: Any) -> list[int]:
    count = 8 if model.config.num_hidden_layers < 9 else 2
    out = model.generate(
        IDS[:, :16],
        attention_mask=torch.ones(1, 16),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=2,
    )
    return out[0].tolist()


def with_experts_of(model: Any, file: Path) -> Any:
    """A copy of a float model with the file's experts, dequantised."""
    changed = copy.deepcopy(model)
    experts = find_gguf_experts(GgufCheckpoint.open(file))
    for name, module in find_experts(changed):
        blocks = experts.experts(layer_of(name))
        for e in range(blocks.spec.num_experts):
            gate, up, down, *_ = expert_weights(blocks, e)
            if module.is_concatenated:
                first = np.concatenate([gate, up])
            else:
                first = np.stack([gate, up], axis=1).reshape(-1, gate.shape[1])
            pair = (first, down) if not module.is_transposed else (first.T, down.T)
            with torch.no_grad():
                module.gate_up_proj[e] = torch.from_numpy(np.ascontiguousarray(pair[0]))
                module.down_proj[e] = torch.from_numpy(np.ascontiguousarray(pair[1]))
    return changed


@pytest.mark.parametrize("name", MODELS)
def test_float_experts_give_the_float_models_logits_and_tokens(name: str, made: Made) -> None:
    model, file = made(name)
    loaded = load_gguf_model(file, dtype="float32")
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)
    assert greedy(loaded) == greedy(model)


@pytest.mark.parametrize(
    ("name", "kind", "least"),
    [
        ("qwen3moe", "q8_0", 0.999),
        ("qwen3moe", "q4_k", 0.999),
        ("qwen2moe", "bf16", 0.9999),
        ("mixtral", "q6_k", 0.999),
        ("deepseek2-v3", "q4_0", 0.999),
        ("gpt-oss", "mxfp4", 0.999),
        ("granitemoe", "f16", 0.9999),
    ],
)
def test_blocks_run_as_their_weights_dequantised(
    name: str, kind: str, least: float, made: Made
) -> None:
    model, file = made(name, kind)
    wanted = with_experts_of(model, file)
    loaded = load_gguf_model(file, dtype="float32")
    assert all(kind.upper() in row.kernel for row in packed_modules(loaded))
    assert (
        usual_agreement(logits(loaded), logits(wanted)) > least
    )  # activations are rounded to 8 bits
    if kind not in ("bf16", "f16"):  # and the weights do matter
        assert usual_agreement(logits(loaded), logits(model)) < 0.9999


@pytest.mark.parametrize("rest", ["q8_0", "q4_k", "bf16", "f16"])
def test_other_tensors_are_dequantised_exactly(rest: str, made: Made) -> None:
    _, file = made("deepseek2-v2", "q8_0", rest)
    checkpoint = GgufCheckpoint.open(file)
    model = load_gguf_model(file, dtype="float32", linear="none")
    for n, module in enumerate(model.model.layers):
        for piece, ours in (
            ("attn_q_a", module.self_attn.q_a_proj),
            ("attn_output", module.self_attn.o_proj),
        ):
            want = checkpoint.read(f"blk.{n}.{piece}.weight")
            assert torch.equal(torch.from_numpy(want), ours.weight)
    want = torch.from_numpy(checkpoint.read("token_embd.weight"))
    assert torch.equal(want, model.model.embed_tokens.weight)
    half = load_gguf_model(file)
    assert half.dtype == torch.bfloat16
    assert torch.equal(want.bfloat16(), half.model.embed_tokens.weight)


def test_what_transformers_keeps_in_float32_stays_so(made: Made) -> None:
    """DeepSeek-V3's correction of the router, since transformers 5.24 the router too."""
    model, file = made("deepseek2-v3")
    theirs = type(model).from_pretrained(file.parent, dtype=torch.bfloat16)
    dtypes = {name: weight.dtype for name, weight in theirs.state_dict().items()}
    loaded = load_gguf_model(file)
    ours = {name: weight.dtype for name, weight in loaded.state_dict().items()}
    assert ours == {name: dtypes[name] for name in ours}
    gate, wanted = loaded.model.layers[1].mlp.gate, model.model.layers[1].mlp.gate
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(gate.e_score_correction_bias, wanted.e_score_correction_bias)


def test_every_architecture_has_a_model_here() -> None:
    assert {row[1] for row in MODELS.values()} == set(WHOLE_MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_the_same_logits(name: str, made: Made, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    model, file = made(name)
    if name == "gpt-oss":
        # llama.cpp rounds the bounds of yarn's ramp; the models were trained without that.
        model = copy.deepcopy(model)
        model.config.rope_parameters["truncate"] = True
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    theirs = llama_cpp.Llama(str(file), logits_all=True, n_ctx=128, n_threads=2, verbose=False)
    theirs.eval(IDS[0].tolist())
    assert agreement(torch.tensor(theirs.scores[: IDS.shape[1]]), logits(model)) > 0.999


def test_arguments_reach_the_experts_and_the_rest(made: Made) -> None:
    _, file = made("qwen3moe", "q8_0")
    seen: list[tuple[int, int]] = []
    model = load_gguf_model(file, "INT8", torch.float16, progress=lambda *given: seen.append(given))
    assert model.dtype == torch.float16
    assert all("int8" in row.kernel for row in packed_modules(model))
    assert seen[-1][0] == seen[-1][1] == sum(p.numel() for p in model.parameters())
    assert seen == sorted(seen)
    repacked = load_gguf_model(file, dtype="float32", repack=True)
    for _, module in find_experts(repacked):
        assert module._ktk.moe.packed.up.is_repacked
    assert torch.equal(logits(repacked), logits(load_gguf_model(file, dtype="float32")))
    with pytest.raises(ValueError, match="dtype='int8'"):
        load_gguf_model(file, dtype="int8")


def test_a_loaded_model_cannot_be_saved_without_its_experts(made: Made, tmp_path: Path) -> None:
    _, file = made("qwen3moe", "q8_0")
    model = load_gguf_model(file)
    with pytest.raises(ValueError, match="blocks of its file"):
        model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="keep it in a variable"):
        load_gguf_model(file).save_pretrained(tmp_path)


def test_a_config_goes_into_a_file_and_back(made: Made) -> None:
    for name in MODELS:
        model, file = made(name)
        loaded = load_gguf_model(file, dtype="float32").config
        for field in MODELS[name][2]:
            want, got = getattr(model.config, field), getattr(loaded, field)
            if isinstance(want, dict):
                for key, value in want.items():
                    assert got[key] == pytest.approx(value), (name, field, key)
            else:
                assert got == pytest.approx(want), (name, field)
        for field in whole_models.COMMON:
            assert getattr(loaded, field) == getattr(model.config, field), (name, field)


def test_the_command_writes_a_whole_model(made: Made, tmp_path: Path) -> None:
    _, file = made("qwen3moe")
    given = ["--input-path", str(file.parent), "--output", str(tmp_path / "m.gguf")]
    with pytest.raises(SystemExit) as finished:
        main(["convert", *given, "--quant-method", "q4_0", "--whole", "q8_0"])
    assert not finished.value.code
    model = load_gguf_model(tmp_path / "m.gguf")
    assert {row.kernel.split()[-1] for row in packed_modules(model)} == {"Q4_0"}
    tensors = GgufCheckpoint.open(tmp_path / "m.gguf").tensors
    assert tensors["token_embd.weight"].type == tensors["blk.0.attn_q.weight"].type == "Q8_0"


def test_what_no_gguf_file_can_say_is_refused(made: Made, tmp_path: Path) -> None:
    _, file = made("qwen3moe")
    for change, text in (
        ({"mlp_only_layers": [0]}, "layers without experts"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope scaling of type 'llama3'",
        ),
        ({"model_type": "qwen4_exp"}, "a whole GGUF file is written of"),
    ):
        folder = tmp_path / next(iter(change))
        shutil.copytree(file.parent, folder, ignore=shutil.ignore_patterns("*.gguf"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=text):
            convert(folder, folder / "m.gguf", quant_method="q8_0", whole="q8_0")
        assert not (folder / "m.gguf").exists()
    shutil.copytree(
        file.parent, tmp_path / "bare", ignore=shutil.ignore_patterns("*.gguf", "token*")
    )
    with pytest.raises(CheckpointError, match="no tokenizer.json"):
        convert(tmp_path / "bare", tmp_path / "m.gguf", quant_method="q8_0", whole="q8_0")
    with pytest.raises(ValueError, match="whole='int4'"):
        convert(file.parent, tmp_path / "m.gguf", quant_method="q8_0", whole="int4")
    with pytest.raises(ValueError, match="is a directory"):
        convert(file.parent, tmp_path / "out", quant_method="int8", whole="q8_0")


def test_rows_that_are_no_whole_blocks_fall_back(made: Made) -> None:
    """k_b's rows are as wide as a head: 64 fits Q8_0, not Q4_K."""
    _, file = made("deepseek2-v2", "q4_k", "q4_k")
    tensors = GgufCheckpoint.open(file).tensors
    assert tensors["blk.0.attn_k_b.weight"].type == "Q8_0"
    assert tensors["blk.0.attn_v_b.weight"].type == "Q4_K"
    assert tensors["blk.1.ffn_gate_inp.weight"].type == "F32"
    assert tensors["blk.1.ffn_gate_exps.weight"].shape == (E, WIDTH, H)
