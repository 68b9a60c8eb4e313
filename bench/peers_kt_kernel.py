"""One MoE layer on kt-kernel, for bench/peers.py, which starts it with the Python that kt-kernel is
installed in.

Drives the package's C++ extension: its Python class needs a GPU build of torch. Talks JSON lines:
first it says what it is, then answers each {"tokens": T, "seconds": S} with the times of its calls.
Needs torch and kt-kernel, not ktk.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

REPLIES = os.dup(1)
os.dup2(2, 1)  # the extension prints to stdout

import kt_kernel  # noqa: E402
import torch  # noqa: E402

EXT: Any = kt_kernel.kt_kernel_ext
# method: class, bytes per weight once loaded, largest mean error relative to unquantised weights
METHODS = {
    "AMXINT4": ("AMXInt4_MOE", 0.5, 0.4),
    "AMXINT8": ("AMXInt8_MOE", 1.0, 0.06),
    "BF16": ("AMXBF16_MOE", 2.0, 0.02),
    "RAWINT4": ("AMXInt4_KGroup_MOE", 0.5 + 2 / 32, 0.03),
}
GROUP = 32  # of RAWINT4
ASLEEP = 0.15  # seconds after which its workers have stopped spinning
MIN_CALLS, MAX_CALLS = 2, 20


def reply(message: dict[str, Any]) -> None:
    os.write(REPLIES, (json.dumps(message) + "\n").encode())


def raw_int4(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nibbles (rows, columns/2), bf16 scales (rows, columns/GROUP),
    and the float32 weights they stand for.
    """
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    scales = ((torch.rand(rows, columns // GROUP) + 1) / (7 * columns**0.5)).bfloat16()
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(rows, columns).float() - 8
    return packed, scales, codes * scales.float().repeat_interleave(GROUP, dim=1)


class Layer:
    """All experts hold the same weights, each in its own memory."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        torch.manual_seed(0)
        kind, self.bytes_per_weight, self.tolerance = METHODS[a.method]
        sizes = {
            "gate": (a.intermediate, a.hidden),
            "up": (a.intermediate, a.hidden),
            "down": (a.hidden, a.intermediate),
        }
        pool = EXT.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map = 1, [0]
        pool.subpool_thread_count = [a.threads]
        self.cpu = EXT.CPUInfer(pool)
        self.skip = torch.zeros(a.experts, dtype=torch.bool)
        config = EXT.moe.MOEConfig(
            a.experts, a.top_k, a.hidden, a.intermediate, self.skip.data_ptr()
        )
        config.layer_idx, config.pool, config.max_len = 0, self.cpu.backend_, max(a.max_tokens, 32)
        self.weights: dict[str, torch.Tensor] = {}  # float32, one expert
        keep = []
        for name, (rows, columns) in sizes.items():
            if a.method == "RAWINT4":
                one, scale, self.weights[name] = raw_int4(rows, columns)
                scales = scale.repeat(a.experts, 1, 1)
                setattr(config, f"{name}_scales", [[s.data_ptr() for s in scales]])
                keep.append(scales)
            else:
                one = (torch.randn(rows, columns) / columns**0.5).bfloat16()
                self.weights[name] = one.float()
            stacked = one.repeat(a.experts, 1, 1)
            keep.append(stacked)
            if a.method in ("AMXINT4", "AMXINT8"):
                setattr(config, f"{name}_proj", stacked.data_ptr())
            else:
                setattr(config, f"{name}_projs", [[w.data_ptr() for w in stacked]])
                if a.method == "BF16":
                    setattr(config, f"{name}_scales", [[0] * a.experts])
        if a.method == "RAWINT4":
            q = config.quant_config
            q.bits, q.group_size, q.zero_point = 4, GROUP, False
        self.moe = getattr(EXT.moe, kind)(config)
        self.map = torch.arange(a.experts)
        self.cpu.submit(self.moe.load_weights_task(self.map.data_ptr()))
        self.cpu.sync()
        self.kernel = f"{kind} {a.threads}t"
        self.deck: list[int] = []

    def routing(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 ids, float32 weights (tokens, top_k);
        one token's experts are dealt from a shuffled deck.
        """
        a = self.a
        if tokens == 1:
            if len(self.deck) < a.top_k:
                self.deck = torch.randperm(a.experts).tolist()
            ids = torch.tensor([[self.deck.pop() for _ in range(a.top_k)]])
        else:
            ids = torch.rand(tokens, a.experts).argsort(dim=1)[:, : a.top_k].contiguous()
        weights = torch.rand(tokens, a.top_k) + 0.1
        return ids, (weights / weights.sum(dim=1, keepdim=True)).contiguous()

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y, count = torch.empty_like(x), torch.tensor([len(x)], dtype=torch.int32)
        self.cpu.submit(
            self.moe.forward_task(
                count.data_ptr(),
                self.a.top_k,
                ids.data_ptr(),
                weights.data_ptr(),
                x.data_ptr(),
                y.data_ptr(),
                False,
            )
        )
        self.cpu.sync()
        return y

    def error(self) -> float:
        """Mean error of two tokens relative to the mean magnitude."""
        x = torch.randn(2, self.a.hidden).bfloat16()
        y = self.forward(x, *self.routing(2)).float()
        f, w = x.float(), self.weights
        expected = (torch.nn.functional.silu(f @ w["gate"].T) * (f @ w["up"].T)) @ w["down"].T
        return float((y - expected).abs().mean() / expected.abs().mean())

    def measure(self, tokens: int, seconds: float) -> dict[str, Any]:
        x = torch.randn(tokens, self.a.hidden).bfloat16()
        times: list[float] = []
        touched: list[int] = []
        pool = [self.routing(tokens) for _ in range(MAX_CALLS + 1)]
        for ids, weights in pool:
            begin = time.perf_counter()
            self.forward(x, ids, weights)
            times.append(time.perf_counter() - begin)
            touched.append(len(ids.unique()))
            if len(times) > MIN_CALLS and sum(times[1:]) > seconds:
                break
        time.sleep(ASLEEP)
        return {"seconds": times[1:], "touched": touched[1:]}  # the first warmed up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, required=True)
    for name in ("hidden", "intermediate", "experts", "top-k", "threads", "max-tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    layer = Layer(parser.parse_args())
    error = layer.error()
    reply(
        {
            "version": kt_kernel.__version__,
            "kernel": layer.kernel,
            "bytes_per_weight": layer.bytes_per_weight,
            "error": error,
            "is_right": error < layer.tolerance,
        }
    )
    time.sleep(ASLEEP)
    for line in sys.stdin:
        asked = json.loads(line)
        reply(layer.measure(asked["tokens"], asked["seconds"]))


main()
os._exit(0)  # its worker threads do not end
