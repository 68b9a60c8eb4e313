"""How many of a wrapper's experts are in memory: its argument, or KTransformers' own environment
variables, by the names that scripts for it set.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

from ktk.integration.kt_kernel.arguments import checked_int
from ktk.placement.residency.expert_memory import ExpertMemory

MOST = ("KT_MAX_RESIDENT_EXPERTS", "KT_MAX_TIER0_EXPERTS")  # the first that says something
POLICY, PARAMETERS = "KT_RESIDENCY_POLICY", "KT_RESIDENCY_POLICY_CONFIG"
_UNSET = ("", "auto", "none", "0", "-1")


@dataclass(frozen=True)
class Residency:
    """A wrapper that keeps only some experts in memory: room for ``most``, of which a token uses
    top_k.

    is_asked : by the wrapper's own argument; else by the environment, which is for all of a model's
    wrappers, so that one that cannot be had so loads all its experts.
    """

    most: int
    top_k: int
    is_asked: bool = True
    policy: str = ExpertMemory.policy
    parameters: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def asked(cls, max_resident_experts: int | None, top_k: int) -> Residency | None:
        """None if all are loaded. Raises ValueError, TypeError."""
        if max_resident_experts is not None:
            most = checked_int("max_resident_experts", max_resident_experts, top_k)
        elif (most := _most_of_environment(top_k)) == 0:
            return None
        found = cls(most, top_k, max_resident_experts is not None, *_policy_of_environment())
        found.memory()  # its checks
        return found

    def memory(self) -> ExpertMemory:
        try:
            return ExpertMemory(str(self.most), self.policy, self.parameters)
        except ValueError as error:
            raise ValueError(f"{POLICY}={self.policy!r}: {error}") from None


def _most_of_environment(top_k: int) -> int:
    """0: all. What is less than a token uses is that much."""
    for name in MOST:
        text = os.environ.get(name, "").strip().lower()
        if text in _UNSET:
            continue
        if not text.isdecimal():
            raise ValueError(
                f"{name}={text!r}: must be a number of experts of each layer, or auto for all"
            )
        return max(int(text), top_k)
    return 0


def _policy_of_environment() -> tuple[str, dict[str, Any]]:
    policy = os.environ.get(POLICY, "").strip() or ExpertMemory.policy
    text = os.environ.get(PARAMETERS, "").strip() or "{}"
    try:
        parameters = json.loads(text)
    except ValueError:
        parameters = None
    if not isinstance(parameters, dict):
        raise ValueError(f"{PARAMETERS}={text!r}: must be a JSON object of the policy's parameters")
    return policy, parameters
