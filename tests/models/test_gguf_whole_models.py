"""Whole models from GGUF files: as transformers' float models of the same weights,
and as llama.cpp, where it is installed.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
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
from ktk.generate.describe import describe_model
from ktk.generate.open import open_model
from ktk.integration.transformers import linear
from ktk.integration.transformers.experts import find_experts
from ktk.integration.transformers.gguf import load_gguf_model, load_gguf_tokenizer
from ktk.integration.transformers.linear import KtkLinear
from ktk.integration.transformers.loading import packed_modules
from ktk.integration.transformers.sources import layer_of
from ktk.models.arch import WHOLE_MODELS
from ktk.models.find import find_gguf_experts
from make import whole_models
from make.rewriting import rewritten
from make.whole_models import MODELS, VOCAB, WIDTH, E, H

IDS = torch.tensor([[1, *np.random.default_rng(0).integers(3, VOCAB - 20, 63).tolist()]])

pytestmark = pytest.mark.skipif(
    backends.backends()["LLAMAFILE"].why_not() is not None, reason="LLAMAFILE does not run"
)
Made = Callable[..., tuple[Any, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(float model, GGUF file) of a name of MODELS, experts and the rest in the given types;
    each made once.
    """
    models: dict[str, tuple[Any, Path]] = {}

    def make(name: str, experts: str = "f32", rest: str = "f32") -> tuple[Any, Path]:
        if name not in models:
            folder = tmp_path_factory.mktemp(name)
            models[name] = whole_models.write(folder, name), folder
        model, folder = models[name]
        file = folder / f"{experts}-{rest}.gguf"
        if not file.exists():
            convert(folder, file, quant_method=experts, whole=rest)
        return model, file

    return make


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits[0].float()


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


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """The smallest cosine over positions."""
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1).min())


def usual_agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """The median cosine: where rounding takes a random router to another expert, nothing agrees."""
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1).median())


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


# Linear layers in the file's blocks
# --------------------------------------------------------------------------------


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


# Files that others write
# ----------------------------------------------------------------------------------------


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


# Writing
# --------------------------------------------------------------------------------------------------


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
