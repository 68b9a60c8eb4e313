"""Experts of GGUF files read one by one: the bytes of the mapped file, and whole models' bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ktk import backends
from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.convert.run import convert
from ktk.errors import BackendError, CheckpointError
from ktk.generate.open import open_model
from ktk.generate.sampling import Sampler, Sampling
from ktk.generate.session import Session
from ktk.integration.transformers.decoder_layers import native_calls
from ktk.integration.transformers.gguf import load_gguf_model
from ktk.integration.transformers.loading import load_model
from ktk.integration.transformers.streaming import expert_slots
from ktk.models.find import find_gguf_experts
from ktk.placement import blocks
from ktk.placement.residency.expert_memory import ExpertMemory
from ktk.placement.residency.gguf_reader import GgufReader
from ktk.placement.store import ExpertStore
from make import whole_models
from make.cases import assert_exact
from make.command_line import ktk
from make.gguf_families import FAMILIES, family_file, singles
from make.gguf_files import sizes, write_gguf
from make.rewriting import rewritten

pytestmark = pytest.mark.skipif(
    backends.backends()["LLAMAFILE"].why_not() is not None, reason="LLAMAFILE does not run"
)
IDS = torch.tensor([[1, *np.random.default_rng(0).integers(3, 300, 31).tolist()]])
WHOLE = {"qwen3moe": "q4_k", "deepseek2-v3": "q4_0", "gpt-oss": "mxfp4", "mixtral": "q6_k"}
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The GGUF file of a name of WHOLE, made once."""
    files: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in files:
            folder = tmp_path_factory.mktemp(name)
            whole_models.write(folder, name)
            files[name] = folder / "model.gguf"
            convert(folder, files[name], quant_method=WHOLE[name], whole="bf16")
        return files[name]

    return make


def stored(path: Path, name: str) -> Path:
    """A file of a family, or of a tensor for each expert in some order."""
    if name in FAMILIES:
        return family_file(path, name)[0]
    return write_gguf(path, "llama", singles(np.random.default_rng(3), name), sizes("llama"))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("name", [*FAMILIES, "in order", "descending", "uneven"])
def test_every_way_to_store_experts_is_read_as_it_is_mapped(
    name: str, direct: bool, tmp_path: Path
) -> None:
    """Offsets are multiples of 32, not of a block."""
    experts = find_gguf_experts(GgufCheckpoint.open(stored(tmp_path / "m.gguf", name)))
    reader = GgufReader(experts, experts.layers, direct=direct)
    for at, layer in enumerate(experts.layers):
        whole, store = ExpertStore(experts.experts(layer)), reader.store(at)
        assert (store.offsets, store.span_bytes) == (whole.offsets, whole.span_bytes)
        assert not store.present.any()
        for expert in range(store.spec.num_experts):
            span = np.zeros(store.span_bytes, np.uint8)
            reader.read(at, expert, span)
            assert_exact(whole.copy_of(expert), span)
    reader.close()


def test_blocks_that_run_only_as_a_copy_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = find_gguf_experts(GgufCheckpoint.open(stored(tmp_path / "m.gguf", "uneven")))
    monkeypatch.setattr(blocks, "kernel_types", lambda: ("F16", "F32"))
    with pytest.raises(BackendError, match="layer 0: gate is Q8_0 .* only as a copy in memory"):
        GgufReader(experts, experts.layers).store(0)


def decoded(opened: Any) -> list[int]:
    made: list[int] = []
    session = Session(opened.model, opened.tokenizer)
    session.generate_tokens(
        IDS[0].tolist(), Sampler(Sampling(0.0)), 20, lambda token: bool(made.append(token.id))
    )
    return made


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_have_the_bits_of_the_mapped_file(name: str, made: Made) -> None:
    plain = open_model(made(name))
    limited = open_model(made(name), expert_memory=ExpertMemory("12"))
    with torch.no_grad():
        want, got = (opened.model(IDS).logits for opened in (plain, limited))
    assert torch.equal(want, got)
    assert decoded(plain) == decoded(limited)
    assert native_calls(plain.model) == native_calls(limited.model)
    assert native_calls(plain.model) > 0 or name == "deepseek2-v3"  # torch runs its kv_b_proj
    slots = expert_slots(limited.model)
    assert slots is not None
    assert slots.capacity == 12
    assert slots.counters().evictions > 0


def test_a_split_file_is_read_part_by_part(made: Made, tmp_path: Path) -> None:
    rewritten(made("qwen3moe"), tmp_path / "m.gguf", lambda *_: None, split_max_tensors=20)
    assert len(list(tmp_path.glob("*.gguf"))) > 1
    with torch.no_grad():
        want = load_gguf_model(made("qwen3moe"))(IDS).logits
        assert torch.equal(want, load_gguf_model(tmp_path, expert_memory="50%")(IDS).logits)


def test_a_gguf_file_beside_a_directory(made: Made) -> None:
    file = made("qwen3moe")
    with torch.no_grad():
        want = load_model(file.parent, gguf=file)(IDS).logits
        assert torch.equal(want, load_model(file.parent, gguf=file, expert_memory="9")(IDS).logits)


def test_the_command_takes_a_gguf_file(made: Made) -> None:
    ask = ("run", str(made("qwen3moe")), "Why?", "-n", "12", "--temperature", "0")
    plain, limited = ktk(*ask), ktk(*ask, "--expert-memory", "50%")
    assert limited.returncode == 0, limited.stderr
    assert limited.stdout == plain.stdout
    assert "room for 12 of 24 experts" in limited.stderr


def test_what_needs_all_experts_in_memory_is_refused(made: Made) -> None:
    with pytest.raises(ValueError, match="repack copies all experts"):
        load_gguf_model(made("qwen3moe"), repack=True, expert_memory="50%")
    with pytest.raises(BackendError, match="ExpertStore run as they lie"):
        load_gguf_model(made("qwen3moe"), method="INT8", expert_memory="50%")


def test_a_file_that_is_replaced_or_cut_is_an_error_not_other_bits(
    made: Made, tmp_path: Path
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(made("qwen3moe").read_bytes())
    experts = find_gguf_experts(GgufCheckpoint.open(file))
    file.rename(tmp_path / "before.gguf")
    file.write_bytes(b"another")
    with pytest.raises(CheckpointError, match="was replaced"):
        GgufReader(experts, experts.layers)
    (tmp_path / "before.gguf").rename(file)
    reader = GgufReader(experts, experts.layers)
    store = reader.store(0)
    _, begin = experts.rows(experts.layers[0])["down"].places[3]
    with open(file, "r+b") as written:
        written.truncate(begin + 100)
    with pytest.raises(CheckpointError, match="truncated"):
        reader.read(0, 3, np.zeros(store.span_bytes, np.uint8))
