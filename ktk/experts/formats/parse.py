"""What a user may write for a method or a format, read in one place.

int4   INT4:64   bf16               a packed format, and its group size
Q4_K   q4_k:ggml   Q4_K:repack      a type of GGUF files, by llama.cpp, in the kernels' order
AVX2   AMXINT4:32   AVX2:INT4:128   a backend, and what it runs
LLAMAFILE:Q4_K:repack   auto:int8
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ktk.experts.formats import BLOCKS, GGUF, PANELS, Format

AUTO = "auto"
USAGE = (
    "must be FORMAT, FORMAT:GROUP, TYPE, TYPE:repack or TYPE:ggml (of GGUF), or one of them behind "
    "BACKEND:"
)


class Method(NamedTuple):
    """text : as it was written. backend : a name or "auto". format : None where only a backend is
        named.

    group_size : of packed formats, None where none is named. by : who quantises, "ktk" or "ggml".
        is_repacked : of blocks.
    """

    text: str
    backend: str = AUTO
    format: Format | None = None
    group_size: int | None = None
    by: str = "ktk"
    is_repacked: bool = False

    @property
    def weight_format(self) -> str | None:
        """As MoESpec has it."""
        if self.format is None:
            return None
        return self.format.name if self.format.is_packed else GGUF.name

    @property
    def block_type(self) -> str | None:
        """The type of GGUF files; None of packed formats."""
        return None if self.format is None or self.format.is_packed else self.format.name


def parse(text: str, backends: Mapping[str, str | None]) -> Method:
    """Read ``text``, in upper or lower case. backends : names -> the weight format that one stands
    for, or None.

    A format and a type of one name (bf16) are the format, except behind the backend that runs GGUF
    blocks.
    Raises ValueError that says what there is.
    """
    try:
        return _parse(text, backends)
    except ValueError as error:
        raise ValueError(f"method {text!r}: {USAGE}; {error}") from None


def _parse(text: str, backends: Mapping[str, str | None]) -> Method:
    parts = text.split(":")
    backend, stands_for = AUTO, None
    rows: Mapping[str, Format] = {**BLOCKS, **PANELS}
    if parts[0].lower() == AUTO or parts[0].upper() in backends:
        first = parts.pop(0).upper()
        if first in backends:
            backend, stands_for = first, backends[first]
            rows = BLOCKS if stands_for == GGUF.name else PANELS
    if stands_for in PANELS:
        fmt = PANELS[stands_for]
    elif not parts:
        return Method(text, backend)
    else:
        fmt = _format(parts.pop(0), rows)
    if not fmt.is_packed:
        backend = next((name for name, runs in backends.items() if runs == GGUF.name), backend)
    method = Method(text, backend, fmt)
    if not parts:
        return method
    option = parts.pop(0).lower()
    if parts:
        raise ValueError(f"nothing may stand behind {option!r}")
    if not fmt.is_packed:
        if option not in ("repack", "ggml"):
            raise ValueError("behind a GGUF type only :repack or :ggml may stand")
        return method._replace(**{"by": option} if option == "ggml" else {"is_repacked": True})
    if not option.isdecimal() or int(option) not in fmt.group_sizes:
        groups = ", ".join(map(str, fmt.group_sizes))
        raise ValueError(f"{fmt.name} takes groups of {groups} (0 = per channel)")
    return method._replace(group_size=int(option))


def _format(name: str, rows: Mapping[str, Format]) -> Format:
    found = {row.lower(): fmt for row, fmt in rows.items()}.get(name.lower())
    if found is None:
        raise ValueError(f"format {name!r}: must be one of {', '.join(rows)}")
    return found
