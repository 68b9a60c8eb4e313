"""The table of policies."""

from __future__ import annotations

import inspect
from typing import Any

from ktk.placement.residency.policies.baseline import Baseline
from ktk.placement.residency.policies.belady import Belady
from ktk.placement.residency.policies.heat import Heat
from ktk.placement.residency.policies.least_stale import LeastStale
from ktk.placement.residency.policies.lrfu import Lrfu
from ktk.placement.residency.policies.lru import Lru
from ktk.placement.residency.policies.s3fifo import S3Fifo
from ktk.placement.residency.policies.sieve import Sieve
from ktk.placement.residency.policies.slru import Slru
from ktk.placement.residency.policies.two_queues import TwoQueues
from ktk.placement.residency.policies.w_tinylfu import WTinyLfu
from ktk.placement.residency.policy import Policy, Shape

# In the order that tables show them: plain ones, those made for experts, the bound.
_ROWS: tuple[type[Policy], ...] = (
    Lru,
    TwoQueues,
    Slru,
    Sieve,
    S3Fifo,
    WTinyLfu,
    Baseline,
    Lrfu,
    LeastStale,
    Heat,
    Belady,
)
POLICIES: dict[str, type[Policy]] = {row.name: row for row in _ROWS}
_BY_NAME = {name: row for row in _ROWS for name in (row.name, *row.aliases)}


def find_policy(name: str) -> type[Policy]:
    """The policy of this name or alias; case and blanks around it do not matter.

    ValueError lists the names.
    """
    found = _BY_NAME.get(name.strip().lower())
    if found is None:
        raise ValueError(f"residency policy {name!r}: must be one of {', '.join(POLICIES)}")
    return found


def make_policy(name: str, shape: Shape, parameters: dict[str, Any] | None = None) -> Policy:
    """A policy for a pool. parameters : by name, as the policy's class documents them.

    ValueError names what there is not, or a value that does not fit.
    """
    row, given = find_policy(name), parameters or {}
    known = list(inspect.signature(row).parameters)[1:]
    for key, value in given.items():
        if key not in known:
            takes = ", ".join(known) or "no parameters"
            raise ValueError(f"residency policy {row.name}: {key} is unknown; it takes {takes}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"residency policy {row.name}: {key}={value!r}: must be a number")
    return row(shape, **given)
