"""The registry: which backends exist, which run here, and what a ``method=`` means.

A backend refuses with a reason (``why_not``), never with a crash; selection takes the first that
runs.
Other packages add backends through the entry-point group ``ktk.backends`` (an instance or a class).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache

from ktk import env
from ktk.backends.base import Backend, Operands, Runner
from ktk.errors import BackendError
from ktk.experts.formats import GGUF, PANELS
from ktk.experts.formats.parse import Method, parse
from ktk.experts.spec import MoESpec
from ktk.log import logger, warn_once

# Fastest first: selection takes the first that runs.
_BUILT_IN = (
    "ktk.backends.amx_int4:AmxInt4Backend",
    "ktk.backends.amx_int8:AmxInt8Backend",
    "ktk.backends.amx_bf16:AmxBf16Backend",
    "ktk.backends.avx512:Avx512Backend",
    "ktk.backends.avx2:Avx2Backend",
    "ktk.backends.llamafile:LlamafileBackend",
    "ktk.backends.numba_jit:NumbaBackend",
    "ktk.backends.numpy_ref:NumpyBackend",
)

# Methods that name a weight format rather than a backend; any backend may run them.
_FORMAT_METHODS = {name.upper(): name for name in PANELS}
# Backends whose packed weights run elsewhere too: the next best runs them, with one warning.
_PORTABLE = {"AMXINT4": "int4", "AMXINT8": "int8", "AMXBF16": "bf16"}


@dataclass(frozen=True)
class Report:
    """One backend's state: ``reason`` is None if it runs; ``kernel`` is what would run then."""

    name: str
    reason: str | None
    kernel: str


@cache
def backends() -> dict[str, Backend]:
    """All backends by name, fastest first, third-party ones behind the built-in."""
    from importlib.metadata import entry_points

    found: dict[str, Backend] = {}
    for target in _BUILT_IN:
        module, _, attribute = target.partition(":")
        backend: Backend = getattr(importlib.import_module(module), attribute)()
        found[backend.name] = backend
    for entry in entry_points(group="ktk.backends"):
        try:
            loaded = entry.load()
            backend = loaded() if isinstance(loaded, type) else loaded
        except Exception as error:  # a broken plug-in must not take the others down
            logger.warning("backend plug-in %s does not load: %s", entry.name, error)
            continue
        if backend.name in found:
            logger.warning(
                "backend plug-in %s: the name %s is taken, ignored", entry.name, backend.name
            )
        else:
            found[backend.name] = backend
    return found


def methods() -> tuple[str, ...]:
    """Every value ``method=`` takes, "auto" first."""
    return ("auto", *backends(), *_FORMAT_METHODS)


def parse_method(text: str) -> Method:
    """A method as users write it, with a format, a group size, a GGUF type:
    see ``ktk.experts.formats.parse``.
    """
    runs = {name: _PORTABLE.get(name) for name in backends()}
    return parse(text, runs | {"LLAMAFILE": GGUF.name})


def method_format(method: str) -> str | None:
    """The weight format a method stands for, or None if it names only a backend (or "auto")."""
    key = check_method(method)
    return _PORTABLE.get(key) or _FORMAT_METHODS.get(key)


def check_method(method: str, weight_format: str | None = None) -> str:
    """The method in its canonical spelling; ValueError lists the known ones and why each would not
    run.

    weight_format : what it is to run, None if that is not decided here; ValueError if it stands for
        another one.
    """
    if isinstance(method, str):
        if method.lower() == "auto":
            return "auto"
        if (key := method.upper()) in methods():
            runs = _PORTABLE.get(key) or _FORMAT_METHODS.get(key)
            if None not in (runs, weight_format) and runs != weight_format:
                raise ValueError(
                    f"weight_format={weight_format!r}: method={method!r} runs {runs} weights: "
                    "give that format, "
                    'or method="auto"'
                )
            return key
    lines = "\n".join(f"  {r.name}: {r.reason or 'runs'}" for r in report())
    formats = ", ".join(_FORMAT_METHODS)
    raise ValueError(
        f"method={method!r} is unknown: use auto, a format ({formats}) or a backend:\n{lines}"
    )


def report(spec: MoESpec | None = None) -> list[Report]:
    """Every backend with the reason it would not run (``spec``), fastest first."""
    rows = []
    for backend in backends().values():
        reason = backend.why_not(spec)
        kernel = backend.kernel(spec or MoESpec(1, 32, 32)) if reason is None else ""
        rows.append(Report(backend.name, reason, kernel if spec else kernel.split(" ")[0]))
    return rows


def _reasons(spec: MoESpec) -> str:
    return "\n".join(f"  {r.name}: {r.reason or 'runs'}" for r in report(spec))


def select(method: str, spec: MoESpec) -> Backend:
    """The backend that will run ``spec``.

    method : "auto" (KTK_BACKEND or the fastest), a backend's name, or a format's name.
    Raises ValueError for an unknown method or one for other weights, BackendError if it cannot run
    here.
    """
    key = check_method(method)
    wanted = method_format(key)
    if wanted is not None and wanted != spec.weight_format:
        raise ValueError(
            f"method={method!r} runs {wanted} weights, these are {spec.weight_format}: "
            f"use method='auto', or convert with --quant-method {wanted}"
        )
    if key in _FORMAT_METHODS:
        key = "auto"
    if key == "auto":
        named = env.backend()
        key = "auto" if named is None else check_method(named)
        if key in _FORMAT_METHODS:
            raise ValueError(f"KTK_BACKEND={named}: must name a backend ({', '.join(backends())})")
    if key != "auto":
        backend = backends()[key]
        reason = backend.why_not(spec)
        if reason is None:
            return backend
        if key not in _PORTABLE or env.strict_backend():
            raise BackendError(f"{key} cannot run here: {reason}. Backends:\n{_reasons(spec)}")
        stand_in = _first(spec)
        text = "%s does not run here (%s); %s runs its weights"
        warn_once(key, text, key, reason, stand_in.kernel(spec))
        return stand_in
    return _first(spec)


def _first(spec: MoESpec) -> Backend:
    for backend in backends().values():
        if backend.why_not(spec) is None and not backend.is_emulated:
            if backend.is_last_resort:
                text = "%s runs the experts, many times slower than compiled kernels; AVX2: %s"
                warn_once("compiled", text, backend.name, backends()["AVX2"].why_not(spec))
            return backend
    raise BackendError(f"no backend runs {spec}:\n{_reasons(spec)}")


__all__ = [
    "Backend",
    "Operands",
    "Report",
    "Runner",
    "backends",
    "check_method",
    "method_format",
    "methods",
    "parse_method",
    "report",
    "select",
]
