"""One MoE layer on kt-kernel, for bench/peers.py, which starts it with the Python that kt-kernel is
installed in. Drives the package's C++ extension: its Python class needs a GPU build of torch.
"""

from __future__ import annotations

from typing import Any

import torch
from driver import DIFFERENT_EXPERTS, Engine, Expert, Sizes, drive, random_weights

# method: classes, the first that its build for this CPU has; what it multiplies; bytes per weight
# once loaded; largest mean error relative to unquantised weights
METHODS = {
    "AMXINT4": (("AMXInt4_MOE",), "int8", 0.5, 0.4),
    "AMXINT8": (("AMXInt8_MOE",), "int8", 1.0, 0.06),
    "BF16": (("AMXBF16_MOE", "AVX2BF16_MOE"), "bf16", 2.0, 0.02),
    "RAWINT4": (("AMXInt4_KGroup_MOE", "AVX2RawInt4_MOE"), "int8", 0.5 + 2 / 32, 0.03),
}
GROUP = 32  # of RAWINT4
MATRICES = ("gate", "up", "down")


def raw_int4(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nibbles (rows, columns/2), bf16 scales (rows, columns/GROUP),
    and the float32 weights they stand for.
    """
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    scales = ((torch.rand(rows, columns // GROUP) + 1) / (7 * columns**0.5)).bfloat16()
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(rows, columns).float() - 8
    return packed, scales, codes * scales.float().repeat_interleave(GROUP, dim=1)


class KtKernel(Engine):
    ids_type = torch.int64

    def __init__(self, sizes: Sizes) -> None:
        if sizes.method not in METHODS:
            raise ValueError(f"method {sizes.method!r}: must be one of {', '.join(METHODS)}")
        import kt_kernel  # prints

        extension: Any = kt_kernel.kt_kernel_ext
        names, self.arithmetic, self.bytes_per_weight, self.tolerance = METHODS[sizes.method]
        name = next((n for n in names if hasattr(extension.moe, n)), None)
        if name is None:
            raise ValueError(f"kt-kernel's build for this CPU has no {' or '.join(names)}")
        self.version, self.kernel = kt_kernel.__version__, name
        self.top_k = sizes.top_k
        pool = extension.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map = 1, [0]
        pool.subpool_thread_count = [sizes.threads]
        self.cpu = extension.CPUInfer(pool)
        self.skip = torch.zeros(sizes.experts, dtype=torch.bool)
        config = extension.moe.MOEConfig(
            sizes.experts, sizes.top_k, sizes.hidden, sizes.intermediate, self.skip.data_ptr()
        )
        config.layer_idx, config.pool = 0, self.cpu.backend_
        config.max_len = max(sizes.max_tokens, 32)
        source = self._give(config, sizes)
        self.moe = getattr(extension.moe, name)(config)
        self.map = torch.arange(sizes.experts)
        self.cpu.submit(self.moe.load_weights_task(self.map.data_ptr()))
        self.cpu.sync()
        # AVX2RawInt4_MOE reads the weights it was given; the others have their own copy now
        self.source = source if name.startswith("AVX2") else []

    def _give(self, config: Any, sizes: Sizes) -> list[torch.Tensor]:
        """Point the configuration at weights, which must live until they are loaded."""
        torch.manual_seed(0)
        alive: list[torch.Tensor] = []
        experts = [random_weights(sizes, e) for e in range(DIFFERENT_EXPERTS)]
        exact: dict[str, list[torch.Tensor]] = {}
        turns = torch.arange(sizes.experts) % DIFFERENT_EXPERTS
        for name in MATRICES:
            few = [getattr(expert, name).bfloat16() for expert in experts]
            exact[name] = [w.float() for w in few]
            if sizes.method == "RAWINT4":
                raw = [raw_int4(*w.shape) for w in few]
                few, exact[name] = [r[0] for r in raw], [r[2] for r in raw]
                scales = torch.stack([r[1] for r in raw])[turns]
                setattr(config, f"{name}_scales", [[s.data_ptr() for s in scales]])
                alive.append(scales)
            stacked = torch.stack(few)[turns]
            alive.append(stacked)
            if sizes.method in ("AMXINT4", "AMXINT8"):
                setattr(config, f"{name}_proj", stacked.data_ptr())
            else:
                setattr(config, f"{name}_projs", [[w.data_ptr() for w in stacked]])
                if sizes.method == "BF16":
                    setattr(config, f"{name}_scales", [[0] * sizes.experts])
        if sizes.method == "RAWINT4":
            q = config.quant_config
            q.bits, q.group_size, q.zero_point = 4, GROUP, False
        self.different = [
            Expert(*(exact[name][e] for name in MATRICES)) for e in range(DIFFERENT_EXPERTS)
        ]
        return alive

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y, count = torch.empty_like(x), torch.tensor([len(x)], dtype=torch.int32)
        self.cpu.submit(
            self.moe.forward_task(
                count.data_ptr(),
                self.top_k,
                ids.data_ptr(),
                weights.data_ptr(),
                x.data_ptr(),
                y.data_ptr(),
                False,
            )
        )
        self.cpu.sync()
        return y


if __name__ == "__main__":
    drive(KtKernel)
