"""Tiny random checkpoints of every naming style, with the weights they hold; for tests."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ktk.checkpoint import Checkpoint
from ktk.experts.formats.floats import bf16_to_f32, e4m3_table, f32_to_bf16
from ktk.models import Experts, find_experts

HIDDEN, INTERMEDIATE, EXPERTS, LAYERS = 64, 32, 3, 2
NUMPY_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "uint16": "BF16",
    "uint8": "U8",
    "int8": "I8",
    "int64": "I64",
}


@dataclass
class Expected:
    """What a written checkpoint holds: experts[layer][expert][gate|up|down(_bias)], float32;
    plain tensors' bytes.
    """

    experts: dict[int, list[dict[str, np.ndarray]]] = field(default_factory=dict)
    plain: dict[str, bytes] = field(default_factory=dict)


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, however wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def write_safetensors(path: Path, tensors: dict[str, np.ndarray | tuple[str, np.ndarray]]) -> Path:
    """Write arrays under their names; uint16 means BF16, a tuple names another dtype."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, entry in tensors.items():
        dtype, array = entry if isinstance(entry, tuple) else (NUMPY_NAMES[entry.dtype.name], entry)
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return raw_file(path, header, data)


def write_directory(
    path: Path, tensors: dict[str, Any], config: dict[str, Any], shards: int = 1
) -> Path:
    """A Hugging Face directory with ``shards`` files, tokenizer and generation config."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "generation_config.json").write_text("{}")
    if shards == 1:
        write_safetensors(path / "model.safetensors", tensors)
        return path
    placed: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: t for i, (name, t) in enumerate(tensors.items()) if i % shards == shard}
        write_safetensors(path / file, part)
        placed.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": placed}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def bf16_like(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """float32 that bf16 and fp16 both hold exactly."""
    w = bf16_to_f32(f32_to_bf16(rng.standard_normal(shape).astype(np.float32) * 0.05))
    w[np.abs(w) < 2.0**-17] = 0  # smaller, and fp16 would round it
    return w


def store(w: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as the checkpoint stores it."""
    if dtype == "bf16":
        return f32_to_bf16(w)
    return w.astype({"fp16": np.float16, "fp32": np.float32}[dtype])


def e4m3_codes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random finite e4m3 codes."""
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[(codes & 127) == 127] = 0
    return codes


def e4m3(codes: np.ndarray) -> np.ndarray:
    return e4m3_table()[codes]


# style -> (module, gate, up, down); gate None where experts have none
PER_EXPERT_STYLES: dict[str, tuple[str, str | None, str, str]] = {
    "deepseek": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "mistral": ("experts", "w1", "w3", "w2"),
    "ffn": ("ffn.experts", "w1", "w3", "w2"),
    "jamba": ("feed_forward.experts", "gate_proj", "up_proj", "down_proj"),
    "lfm2": ("feed_forward.experts", "w1", "w3", "w2"),
    "nemotron_h": ("mixer.experts", None, "up_proj", "down_proj"),
}
FUSED_STYLES = ("fused", "fused_transposed", "gpt_oss", "gpt_oss_mxfp4", "granite")
STYLES = (*PER_EXPERT_STYLES, *FUSED_STYLES)
FAMILY_OF = {"fused_transposed": "fused", "gpt_oss_mxfp4": "gpt_oss"}


def base_config(style: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["Tiny"],
        "model_type": style,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTERMEDIATE,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": LAYERS,
    }
    if style.startswith("gpt_oss"):
        config.update(model_type="gpt_oss", swiglu_limit=7.0)
    if style == "nemotron_h":
        del config["hidden_act"]
        config["mlp_hidden_act"] = "relu2"
    return config


def make(
    path: Path,
    style: str,
    dtype: str = "bf16",
    prefix: str = "model.layers",
    seed: int = 0,
    shards: int = 1,
    config: dict[str, Any] | None = None,
    sizes: tuple[int, int, int, int] = (LAYERS, EXPERTS, HIDDEN, INTERMEDIATE),
) -> Expected:
    """Write a checkpoint of a naming style and return what it holds."""
    rng = np.random.default_rng(seed)
    expected = Expected()
    tensors: dict[str, Any] = {}
    layers, num_experts, h, i = sizes
    for layer in range(layers):
        base = f"{prefix}.{layer}"
        experts = []
        for _ in range(num_experts):
            expert = {"up": bf16_like(rng, i, h), "down": bf16_like(rng, h, i)}
            if style != "nemotron_h":
                expert["gate"] = bf16_like(rng, i, h)
            experts.append(expert)
        expected.experts[layer] = experts
        if style in PER_EXPERT_STYLES:
            module, gate, up, down = PER_EXPERT_STYLES[style]
            for e, expert in enumerate(experts):
                for role, part in (("gate", gate), ("up", up), ("down", down)):
                    if part:
                        tensors[f"{base}.{module}.{e}.{part}.weight"] = store(expert[role], dtype)
        else:
            tensors.update(_fused(rng, style, base, experts, dtype))
        expected.plain[f"{base}.input_layernorm.weight"] = b""
        tensors[f"{base}.input_layernorm.weight"] = store(bf16_like(rng, h), dtype)
    tensors["lm_head.weight"] = store(bf16_like(rng, 5, h), dtype)
    expected.plain["lm_head.weight"] = b""
    for name in expected.plain:
        expected.plain[name] = tensors[name].tobytes()
    config = base_config(style) if config is None else config
    config.update(
        num_hidden_layers=layers, num_experts=num_experts, hidden_size=h, moe_intermediate_size=i
    )
    write_directory(path, tensors, config, shards)
    return expected


def _fused(
    rng: np.random.Generator,
    style: str,
    base: str,
    experts: list[dict[str, np.ndarray]],
    dtype: str,
) -> dict[str, Any]:
    gates, ups, downs = (np.stack([e[r] for e in experts]) for r in ("gate", "up", "down"))
    if style in ("fused", "granite"):
        names = (
            ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
            if style == "fused"
            else ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight")
        )
        both = np.concatenate([gates, ups], axis=1)  # (E, 2I, H)
        return {f"{base}.{names[0]}": store(both, dtype), f"{base}.{names[1]}": store(downs, dtype)}
    names = (f"{base}.mlp.experts.gate_up_proj", f"{base}.mlp.experts.down_proj")
    if style == "fused_transposed":
        both = np.concatenate([gates, ups], axis=1).transpose(0, 2, 1)  # (E, H, 2I)
        return {names[0]: store(both, dtype), names[1]: store(downs.transpose(0, 2, 1), dtype)}
    tensors: dict[str, Any] = {}
    gate_up_bias = bf16_like(rng, len(experts), 2 * gates.shape[1])
    down_bias = bf16_like(rng, len(experts), downs.shape[1])
    for e, expert in enumerate(experts):
        expert.update(
            gate_bias=gate_up_bias[e, 0::2], up_bias=gate_up_bias[e, 1::2], down_bias=down_bias[e]
        )
    tensors[f"{names[0]}_bias"] = store(gate_up_bias, dtype)
    tensors[f"{names[1]}_bias"] = store(down_bias, dtype)
    if style == "gpt_oss":
        both = np.empty((len(experts), 2 * gates.shape[1], gates.shape[2]), np.float32)
        both[:, 0::2], both[:, 1::2] = gates, ups
        tensors[names[0]] = store(both.transpose(0, 2, 1), dtype)
        tensors[names[1]] = store(downs.transpose(0, 2, 1), dtype)
        return tensors
    values = np.array(
        [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
    )
    for name, rows, columns in (
        (names[0], 2 * gates.shape[1], gates.shape[2]),
        (names[1], *downs.shape[1:]),
    ):
        blocks = rng.integers(0, 256, (len(experts), rows, columns // 32, 16), dtype=np.uint8)
        scales = rng.integers(118, 130, (len(experts), rows, columns // 32), dtype=np.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        w = np.stack([values[blocks & 15], values[blocks >> 4]], axis=-1).reshape(
            *blocks.shape[:3], 32
        )
        w = (w * np.exp2(scales.astype(np.float32) - 127)[..., None]).reshape(
            len(experts), rows, columns
        )
        for e, expert in enumerate(experts):
            if name == names[0]:
                expert["gate"], expert["up"] = w[e, 0::2], w[e, 1::2]
            else:
                expert["down"] = w[e]
    return tensors


def open_experts(path: Path) -> Experts:
    return find_experts(Checkpoint.open(path))


def assert_holds(experts: Experts, expected: Expected) -> None:
    assert experts.layers == tuple(expected.experts)
    for layer, wanted in expected.experts.items():
        for expert, weights in enumerate(wanted):
            got = experts.read(layer, expert)
            for role in got._fields:
                array = getattr(got, role)
                if role not in weights:
                    assert array is None, role
                    continue
                assert array.flags.c_contiguous
                values = bf16_to_f32(array) if array.dtype == np.uint16 else array
                assert values.dtype == np.float32
                np.testing.assert_array_equal(
                    values, weights[role], err_msg=f"{layer} {expert} {role}"
                )
