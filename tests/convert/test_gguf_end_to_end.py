"""From a Hugging Face directory through ``ktk convert`` and a GGUF file to every way of running
it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import ktk
from ktk import backends
from ktk.cli import main
from ktk.errors import BackendError, CheckpointError
from ktk.experts.dequantise import expert_weights
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.quantise.pack import pack_experts
from make import gguf_files
from make.cases import assert_exact
from make.checkpoints import make

pytestmark = pytest.mark.slow

LAYERS, E, H, N, K = 2, 4, 64, 96, 2
ORDER = np.array([2, 0, 3, 3])

needs_kernels = pytest.mark.skipif(
    backends.backends()["LLAMAFILE"].why_not() is not None, reason="LLAMAFILE does not run"
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes of a tiny Mixtral."""
    folder = tmp_path_factory.mktemp("end_to_end")
    make(folder / "hf", "mixtral", sizes=(LAYERS, E, H, N))
    given = ["--input-path", str(folder / "hf"), "--output", str(folder / "m.gguf")]
    with pytest.raises(SystemExit) as finished:
        main(["convert", *given, "--quant-method", "q4_0"])
    assert not finished.value.code
    return folder / "m.gguf"


@pytest.fixture
def split(file: Path, tmp_path: Path) -> Path:
    """A directory of the same tensors in three files."""
    tensors = {t.name: (np.array(t.data), t.tensor_type) for t in gguf.GGUFReader(file).tensors}
    sizes = {
        "expert_count": E,
        "expert_used_count": K,
        "embedding_length": H,
        "expert_feed_forward_length": N,
        "block_count": LAYERS,
    }
    metadata = {f"llama.{name}": size for name, size in sizes.items()}
    gguf_files.write_gguf(tmp_path / "m.gguf", "llama", tensors, metadata, split_max_tensors=2)
    assert len(list(tmp_path.glob("*.gguf"))) == 3
    return tmp_path


def wrapper_of(path: Path, layer: int = 1, **changes: Any) -> ktk.KTMoEWrapper:
    fields = {
        "num_experts": E,
        "num_experts_per_tok": K,
        "hidden_size": H,
        "moe_intermediate_size": N,
        "method": "LLAMAFILE",
        "weight_path": path,
    }
    return ktk.KTMoEWrapper(layer, **{**fields, **changes})


def blocks_of(path: Path, layer: int = 1) -> StoredExperts:
    return ktk.load_gguf(path).experts(layer)


def routed(tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(E)[:K] for _ in range(tokens)])
    x = rng.standard_normal((tokens, H)).astype(np.float32)
    return x, ids, rng.random((tokens, K), np.float32)


@needs_kernels
def test_a_converted_model_runs_layer_by_layer(file: Path) -> None:
    model = ktk.load_gguf(file)
    assert (model.layers, model.num_experts_per_tok) == ((0, 1), K)
    x, ids, weights = routed(5)
    for layer, moe in model.items():
        assert "Q4_0" in moe.kernel and moe.bits_per_weight == 4.5
        assert_exact(ktk.MoE(blocks_of(file, layer))(x, ids, weights), moe(x, ids, weights))
    assert np.abs(model[0](x, ids, weights) - model[1](x, ids, weights)).max() > 0


@needs_kernels
@pytest.mark.parametrize("repack", [False, True])
def test_the_wrapper_gives_the_operators_bits(file: Path, repack: bool) -> None:
    wrapper = wrapper_of(file, repack=repack)
    wrapper.load_weights()
    assert wrapper.moe.packed.up.is_repacked == repack
    x, ids, weights = routed(5)
    want = ktk.MoE(blocks_of(file))(x, ids, weights)
    assert_exact(want, wrapper.forward(x, ids, weights))
    given = [torch.from_numpy(a) for a in (x, ids, weights)]
    wrapper.submit_forward(*given)
    assert_exact(want, wrapper.sync_forward(given[0]).numpy())


@needs_kernels
@pytest.mark.parametrize("method", ["LLAMAFILE", "auto"])
def test_the_wrapper_maps_slots_and_leaves_gpu_experts_out(file: Path, method: str) -> None:
    mask = torch.tensor([False, True, False, False])
    wrapper = wrapper_of(file, method=method, gpu_experts_mask=mask)
    wrapper.load_weights(torch.from_numpy(ORDER))
    moe = ktk.MoE(blocks_of(file))
    x, ids, weights = routed(9)
    logical = np.where(mask.numpy()[ids], -1, ORDER[ids])
    wrapper.submit_forward(x, ids, weights)
    assert_exact(moe(x, logical, weights), wrapper.sync_forward(x))
    wrapper.gpu_experts_mask[:] = torch.tensor([True, False, False, True])
    logical = np.where(wrapper.gpu_experts_mask.numpy()[ids], -1, ORDER[ids])
    assert_exact(moe(x, logical, weights), wrapper.forward(x, ids, weights))


@needs_kernels
def test_deferred_experts_of_blocks_are_added_one_layer_later(file: Path) -> None:
    first = wrapper_of(file, layer=0, max_deferred_experts_per_token=1)
    second = wrapper_of(file, layer=1)
    for wrapper in (first, second):
        wrapper.load_weights()
    x, ids, weights = routed(3)
    whole = sum(ktk.MoE(blocks_of(file, layer))(x, ids, weights) for layer in range(LAYERS))
    got = sum(wrapper.forward(x, ids, weights) for wrapper in (first, second))
    np.testing.assert_allclose(got, whole, rtol=1e-5, atol=1e-6)


@needs_kernels
def test_a_directory_of_split_files_and_any_part_of_it_are_the_model(
    file: Path, split: Path
) -> None:
    x, ids, weights = routed(4)
    want = ktk.MoE(blocks_of(file))(x, ids, weights)
    for path in (split, max(split.glob("*.gguf"))):
        wrapper = wrapper_of(path)
        wrapper.load_weights()
        assert_exact(want, wrapper.forward(x, ids, weights))


@pytest.mark.parametrize(
    ("method", "weight_format"),
    [("AMXINT8", "int8"), ("AMXINT4", "int4"), ("INT4", "int4"), ("NUMPY", "int4")],
)
def test_a_method_for_packed_weights_quantises_the_blocks_anew(
    file: Path, method: str, weight_format: str
) -> None:
    wrapper = wrapper_of(file, method=method)
    wrapper.load_weights(ORDER)
    blocks = blocks_of(file)
    spec = MoESpec(E, H, N, weight_format)
    want = pack_experts(spec, lambda e: expert_weights(blocks, int(ORDER[e])))
    assert wrapper.moe.spec == spec
    assert np.array_equal(want.data, wrapper.moe.packed.data)


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        ("INT4", {"group_size": 64, "activation_group": 32}),
        ("auto", {"weight_format": "int8"}),
        ("AVX2", {"weight_format": "int8"}),
        ("AVX512", {"group_size": 128}),
        ("INT8", {"rotation": 64}),
        ("NUMPY", {"weight_format": "nl4"}),
        ("NUMPY", {"weight_format": "nl4", "rotation": 0}),
    ],
)
def test_blocks_become_the_format_and_groups_that_are_asked_for(
    file: Path, method: str, asked: dict[str, Any]
) -> None:
    if reason := backends.backends()[method].why_not() if method.startswith("AVX") else None:
        pytest.skip(f"{method}: {reason}")
    wrapper = wrapper_of(file, method=method, **asked)
    wrapper.load_weights(ORDER)
    blocks = blocks_of(file)
    weight_format = "int8" if method == "INT8" else "int4"
    spec = MoESpec(E, H, N, **{"weight_format": weight_format, **asked})
    want = pack_experts(spec, lambda e: expert_weights(blocks, int(ORDER[e])))
    assert wrapper.moe.spec == spec
    assert np.array_equal(want.data, wrapper.moe.packed.data)


@needs_kernels
def test_blocks_take_an_activation_group_but_no_group_size_or_rotation(file: Path) -> None:
    wrapper = wrapper_of(file, activation_group=32)
    wrapper.load_weights()
    assert wrapper.moe.spec.activation_group == 32
    for asked in ({"group_size": 32}, {"activation_group": 0}):
        with pytest.raises(ValueError, match="group"):
            wrapper_of(file, **asked).load_weights()
    with pytest.raises(ValueError, match="rotation=64: gguf takes 0"):
        wrapper_of(file, rotation=64).load_weights()


def test_what_does_not_fit_is_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="layer 7 has no experts; MoE layers: 0, 1"):
        wrapper_of(file, layer=7).load_weights()
    for name, size in (("num_experts", 8), ("hidden_size", 128), ("moe_intermediate_size", 64)):
        field = name.removeprefix("moe_")
        with pytest.raises(ValueError, match=rf"layer 1, has {field}=.*made for {size}"):
            wrapper_of(file, **{name: size}).load_weights()
    with pytest.raises(CheckpointError, match="nothing.gguf"):
        wrapper_of(tmp_path / "nothing.gguf").load_weights()
    with pytest.raises(ValueError, match="physical_to_logical_map goes from"):
        wrapper_of(file).load_weights(ORDER + 1)


@needs_kernels
def test_a_model_is_found_whatever_the_case_of_its_name_and_beside_a_config(
    file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    capitals = folder / "MODEL.GGUF"
    x, ids, weights = routed(3)
    for seed in range(2):  # the second file is not taken for the first
        made = tmp_path / f"{seed}.gguf"
        blocks = {
            name: gguf_files.quantised(
                np.random.default_rng(seed), gguf.GGMLQuantizationType.Q8_0, E, *shape
            )
            for name, shape in (("gate", (N, H)), ("up", (N, H)), ("down", (H, N)))
        }
        tensors = {f"blk.1.ffn_{name}_exps.weight": given for name, given in blocks.items()}
        gguf_files.write_gguf(made, "qwen3moe", tensors)
        made.replace(capitals)
        want = ktk.load_gguf(folder)[1](x, ids, weights)
        for path in (folder, capitals):
            wrapper = wrapper_of(path)
            wrapper.load_weights()
            assert_exact(want, wrapper.forward(x, ids, weights))


def test_a_path_that_cannot_be_looked_at_is_an_error_of_the_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="name too long"):
        wrapper_of(Path("x" * 5000)).load_weights()


@needs_kernels
def test_blocks_kernels_refuse_other_weights(file: Path) -> None:
    with pytest.raises(BackendError, match="runs the blocks of GGUF files, these are int4 weights"):
        wrapper_of(file.parent / "hf").load_weights()


def test_a_missing_part_of_a_split_is_named(split: Path) -> None:
    parts = sorted(split.glob("*.gguf"))
    parts[1].unlink()
    for path in (split, parts[0]):
        with pytest.raises(CheckpointError, match="00002-of-00003"):
            wrapper_of(path).load_weights()
