"""vLLM on the CPU with its own experts and with ktk's, in one run:

    VLLM/bin/python bench/vllm_experts.py MODEL [--formats own bf16 int8 int4] [--rounds 3]
    VLLM/bin/python bench/vllm_experts.py --make DIRECTORY   # 3 layers of Qwen3-30B-A3B, random

VLLM is an environment as `make test-vllm` makes it. Each model is loaded and runs alone, in bf16,
compiled as vLLM does by default or eager; then come the next round's. Prompts are random tokens.
Prints tokens/s of one stream and of eight, of a prompt of 512 tokens, and memory: at most while the
model was loaded and warmed up, and afterwards.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, NEW_TOKENS, STREAMS = 512, 32, 8
SHAPE = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128}
VOCABULARY = 4096


def make(directory: Path, layers: int = 3) -> None:
    """A Qwen3-MoE whose experts have the shape of Qwen3-30B-A3B's; embeddings are small."""
    import torch
    from safetensors.torch import save_file

    heads, kv_heads, head_dim, hidden = 32, 4, 128, SHAPE["hidden_size"]
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        **SHAPE,
        "intermediate_size": 6144,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(1)

    def rows(count: int, columns: int) -> torch.Tensor:
        return (torch.randn(count, columns, generator=random) * columns**-0.5).bfloat16()

    where: dict[str, str] = {}

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05}.safetensors"
        save_file(tensors, directory / file, {"format": "pt"})
        where.update(dict.fromkeys(tensors, file))

    for i in range(layers):
        at, inner = f"model.layers.{i}", SHAPE["moe_intermediate_size"]
        layer = {
            f"{at}.self_attn.q_proj.weight": rows(heads * head_dim, hidden),
            f"{at}.self_attn.k_proj.weight": rows(kv_heads * head_dim, hidden),
            f"{at}.self_attn.v_proj.weight": rows(kv_heads * head_dim, hidden),
            f"{at}.self_attn.o_proj.weight": rows(hidden, heads * head_dim),
            f"{at}.mlp.gate.weight": rows(SHAPE["num_experts"], hidden),
        }
        for name, width in (
            ("self_attn.q_norm", head_dim),
            ("self_attn.k_norm", head_dim),
            ("input_layernorm", hidden),
            ("post_attention_layernorm", hidden),
        ):
            layer[f"{at}.{name}.weight"] = torch.ones(width).bfloat16()
        for e in range(SHAPE["num_experts"]):
            for name in ("gate_proj", "up_proj"):
                layer[f"{at}.mlp.experts.{e}.{name}.weight"] = rows(inner, hidden)
            layer[f"{at}.mlp.experts.{e}.down_proj.weight"] = rows(hidden, inner)
        save(i, layer)
    ends = {
        "model.embed_tokens.weight": rows(VOCABULARY, hidden),
        "lm_head.weight": rows(VOCABULARY, hidden),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
    }
    save(layers, ends)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def memory(field: str) -> float:
    """GiB of this process, VmHWM or VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) / 2**20


def measured(model: str, kind: str, seed: int, is_eager: bool) -> dict[str, float]:
    """Of one load: figures by their heading. kind : own, or the weight_format of ktk's experts."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    asked: dict[str, Any] = {}
    if kind != "own":
        asked = {"quantization": "ktk", "additional_config": {"ktk": {"weight_format": kind}}}
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    llm = LLM(
        model,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=is_eager,
        max_model_len=1024,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 28,
        **asked,
    )
    found = {"peak GiB": memory("VmHWM"), "GiB": memory("VmRSS")} | speeds(llm, seed)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


def speeds(llm: Any, seed: int) -> dict[str, float]:
    """tokens/s."""
    from vllm import SamplingParams

    rng = np.random.default_rng(seed)

    def seconds(streams: int, prompt: int, new: int) -> float:
        ids = rng.integers(3, VOCABULARY, (streams, prompt)).tolist()
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate([{"prompt_token_ids": row} for row in ids], sampling, use_tqdm=False)
        return time.perf_counter() - begin

    found = {}
    seconds(STREAMS, 16, 4)
    for streams in (1, STREAMS):
        least = seconds(streams, 16, 1)
        more = seconds(streams, 16, 1 + NEW_TOKENS)
        found[f"{streams} at a time"] = streams * NEW_TOKENS / (more - least)
    return found | {f"prompt of {PROMPT}": PROMPT / seconds(1, PROMPT, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--formats", nargs="+", default=["own", "bf16", "int8", "int4"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="do not compile: minutes each")
    parser.add_argument("--make", type=Path)
    given = parser.parse_args()
    if given.make is not None:
        make(given.make)
    if given.model is None:
        return
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for turn in range(given.rounds):
        for kind in given.formats:
            figures = measured(given.model, kind, turn, given.eager)
            print(kind, {name: round(value, 2) for name, value in figures.items()}, flush=True)
            for name, value in figures.items():
                found[kind][name].append(value)
    headings = list(found[given.formats[0]])
    print(f"| experts | {' | '.join(headings)} |\n{'|---' * (len(headings) + 1)}|")
    for kind, figures in found.items():
        cells = [f"{statistics.median(figures[name]):.4g}" for name in headings]
        print(f"| {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
