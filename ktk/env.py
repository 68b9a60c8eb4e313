"""The KTK_* environment variables: one row of ``VARIABLES`` each, parsed here and nowhere else.

Read at first use, never on import. An unknown value, or a KTK_ variable that is not in the table (a
typo would otherwise be ignored silently), is ValueError. Unset and empty mean the same: the
default.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PREFIX = "KTK_"
LOG_LEVELS = ("debug", "info", "warning", "error")
MAX_THREADS = 4096
SECRETS = ("KTK_API_KEY",)  # never shown


@dataclass(frozen=True)
class Variable:
    """parse raises ValueError with what is allowed;
    ``backend`` names are checked by the registry.
    """

    parse: Callable[[str], Any]
    default: Any
    allowed: str
    meaning: str


def _parse_backend(text: str) -> str | None:
    return None if text.lower() == "auto" else text


def _parse_num_threads(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= MAX_THREADS:
        raise ValueError(f"must be a whole number from 1 to {MAX_THREADS}")
    return int(text)


def _parse_flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("must be 0 or 1")
    return text == "1"


def _parse_log(text: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise ValueError(f"must be one of {', '.join(LOG_LEVELS)}")
    return text.lower()


def _parse_tile(text: str) -> str:
    if text != "emulated":
        raise ValueError("must be emulated, or unset")
    return text


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(name for part in text.split(",") if (name := part.strip()))


VARIABLES: dict[str, Variable] = {
    "KTK_BACKEND": Variable(
        _parse_backend,
        None,
        "auto or a backend's name",
        'what method="auto" takes; default: the fastest that runs',
    ),
    "KTK_NUM_THREADS": Variable(
        _parse_num_threads,
        None,
        f"1 to {MAX_THREADS}",
        "threads of the engine; default: physical cores this process may use",
    ),
    "KTK_STRICT_BACKEND": Variable(
        _parse_flag, False, "0 or 1", "1: a method that cannot run here is an error, no stand-in"
    ),
    "KTK_REPACK": Variable(
        _parse_flag,
        False,
        "0 or 1",
        "1: copy experts from a GGUF file into memory in the order the kernels read them",
    ),
    "KTK_API_KEY": Variable(
        str,
        None,
        "any text",
        "the key that clients of `ktk serve` must send; default: none, on this machine's own "
        "addresses",
    ),
    "KTK_LOG": Variable(
        _parse_log,
        "warning",
        ", ".join(LOG_LEVELS),
        "what ktk logs to stderr; debug also shows tracebacks of the command line",
    ),
    "KTK_DISABLE_CPU_FEATURES": Variable(
        _parse_names,
        (),
        "comma list of CPU features or ISA levels",
        "treat the CPU as if it lacked them and what needs them",
    ),
    "KTK_TILE": Variable(
        _parse_tile,
        None,
        "emulated",
        "run AMX kernels without the CPU's tiles, very slowly; auto still takes others",
    ),
}


def check_unknown() -> None:
    """ValueError if a variable starts with KTK_ and is not in the table."""
    unknown = sorted(
        name for name in os.environ if name.startswith(PREFIX) and name not in VARIABLES
    )
    if unknown:
        raise ValueError(
            f"environment variable {', '.join(unknown)} is unknown: ktk has "
            f"{', '.join(VARIABLES)}; unset it or correct its name"
        )


def _get(name: str) -> Any:
    check_unknown()
    variable = VARIABLES[name]
    text = os.environ.get(name, "").strip()
    if not text:
        return variable.default
    try:
        return variable.parse(text)
    except ValueError as error:
        raise ValueError(f"environment variable {name}={text!r}: {error}") from None


def check() -> None:
    """ValueError for any KTK_ variable that is unknown or holds an unknown value."""
    for name in VARIABLES:
        _get(name)


def backend() -> str | None:
    """KTK_BACKEND as it was written; None for unset or "auto". The registry checks the name."""
    value: str | None = _get("KTK_BACKEND")
    return value


def num_threads() -> int | None:
    """KTK_NUM_THREADS, or None."""
    value: int | None = _get("KTK_NUM_THREADS")
    return value


def repack() -> bool:
    """KTK_REPACK: whether GGUF experts are copied and repacked unless a caller says."""
    value: bool = _get("KTK_REPACK")
    return value


def api_key() -> str | None:
    """KTK_API_KEY, or None."""
    value: str | None = _get("KTK_API_KEY")
    return value


def strict_backend() -> bool:
    """KTK_STRICT_BACKEND: a method that cannot run here raises instead of handing over."""
    value: bool = _get("KTK_STRICT_BACKEND")
    return value


def log_level() -> str:
    """KTK_LOG, one of LOG_LEVELS."""
    value: str = _get("KTK_LOG")
    return value


def disabled_cpu_features() -> tuple[str, ...]:
    """KTK_DISABLE_CPU_FEATURES split at commas; ``ktk.machine.cpu`` checks the names."""
    value: tuple[str, ...] = _get("KTK_DISABLE_CPU_FEATURES")
    return value


def tiles_are_emulated() -> bool:
    """KTK_TILE=emulated."""
    value: str | None = _get("KTK_TILE")
    return value == "emulated"


def in_effect() -> dict[str, str]:
    """The variables that are set, by name, with their text; a secret's is left out."""
    check_unknown()
    texts = {name: text for name in VARIABLES if (text := os.environ.get(name, "").strip())}
    return {name: "(set)" if name in SECRETS else text for name, text in texts.items()}
