"""What experts cost where they are, and what a step of the model then takes.

Both sides of a layer work at once, so a layer takes as long as the slower one:

    CPU   transfer, if any of the layer's experts is on the CPU
          + cpu_expert for each expert that a token goes to + cpu_token for each such pair
    GPU   gpu_expert and gpu_token likewise

and a step is the sum over layers, and ``rest``. The attention of the model runs on the GPU, as with
SGLang: what goes to the CPU's experts and comes back is the transfer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class Costs:
    """Seconds. rest : of a step, all except experts. ValueError if one is negative or no number."""

    cpu_expert: float
    cpu_token: float = 0.0
    gpu_expert: float = 0.0
    gpu_token: float = 0.0
    transfer: float = 0.0
    rest: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field.name}={value}: must be seconds, not negative")

    @classmethod
    def of_bandwidths(
        cls, expert_bytes: int, cpu: float, gpu: float, transfer: float = 0.0, rest: float = 0.0
    ) -> Costs:
        """Where reading the weights is all that takes time, as when few tokens are decoded.

        cpu, gpu : bytes/s that experts are read with. transfer, rest : seconds.
        """
        if not (cpu > 0 and gpu > 0 and expert_bytes > 0):
            raise ValueError(
                f"{expert_bytes} bytes an expert at {cpu} and {gpu} bytes/s: must be above 0"
            )
        return cls(expert_bytes / cpu, 0.0, expert_bytes / gpu, 0.0, transfer, rest)


@dataclass(frozen=True)
class Demand:
    """What a step asks of each expert, expected or seen.

    used : float64 (layers, num_experts), 0..1, how likely a token goes to the expert at all. pairs
    : likewise, how many tokens do.
    """

    used: np.ndarray
    pairs: np.ndarray

    @classmethod
    def of_counts(cls, counts: np.ndarray, top_k: int, num_tokens: int) -> Demand:
        """Expected of ``num_tokens`` tokens that choose ``top_k`` experts each, as often as
        ``counts`` (layers, num_experts) says and independently. Layers without counts choose all
        experts alike. ValueError unless both are at least 1.
        """
        experts = counts.shape[1]
        if not 1 <= top_k <= experts or num_tokens < 1:
            raise ValueError(
                f"top_k={top_k}, num_tokens={num_tokens}: must be 1..{experts} and at least 1"
            )
        sums = counts.sum(axis=1, keepdims=True, dtype=np.float64)
        share = np.where(sums > 0, counts / np.where(sums > 0, sums, 1), 1 / experts)
        chosen = np.minimum(share * top_k, 1.0)  # of one token
        return cls(1 - (1 - chosen) ** num_tokens, chosen * num_tokens)

    def cpu_seconds(self, costs: Costs) -> np.ndarray:
        """float64 (layers, num_experts): of each expert on the CPU."""
        return self.used * costs.cpu_expert + self.pairs * costs.cpu_token

    def gpu_seconds(self, costs: Costs) -> np.ndarray:
        """float64 (layers, num_experts): of each expert on the GPU."""
        return self.used * costs.gpu_expert + self.pairs * costs.gpu_token


def step_seconds(demand: Demand, masks: np.ndarray, costs: Costs) -> float:
    """What a step takes. masks : bool (layers, num_experts), True on the GPU."""
    on_gpu = masks.astype(np.bool_)
    cpu = np.where(on_gpu, 0.0, demand.cpu_seconds(costs)).sum(axis=1)
    gpu = np.where(on_gpu, demand.gpu_seconds(costs), 0.0).sum(axis=1)
    cpu += np.where(on_gpu.all(axis=1), 0.0, costs.transfer)
    return float(np.maximum(cpu, gpu).sum() + costs.rest)
