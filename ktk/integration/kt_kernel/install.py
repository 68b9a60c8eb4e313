"""ktk in place of kt_kernel, where somebody asks for it: in this process and those that it starts.

SGLang looks for kt_kernel when its modules are imported, in every process that it spawns. So what
these inherit, PYTHONPATH, names a folder that holds a package of this name. Nothing on disk
changes: a kt_kernel that is installed is there again in the next process.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

NAME = "kt_kernel"
DIRECTORY = Path(__file__).parent / "stand_in"
# SGLang's modules that import kt_kernel, and go on without it if it is not there.
_IMPORTERS = (
    "sglang.srt.layers.moe.kt_ep_wrapper",
    "sglang.srt.model_executor.cuda_graph_runner",
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner",
)


def installed() -> str | None:
    """Where a kt_kernel that is not ktk's would be imported from, None without one."""
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != DIRECTORY.resolve()]
    found = importlib.machinery.PathFinder.find_spec(NAME, elsewhere)
    if found is None:
        return None
    return found.origin or ", ".join(found.submodule_search_locations or [NAME])


def environment(given: MutableMapping[str, str]) -> None:
    """Let processes that get this environment find ktk's kt_kernel first."""
    others = [p for p in given.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(DIRECTORY)]
    given["PYTHONPATH"] = os.pathsep.join([str(DIRECTORY), *others])


def install(*, replace: bool = False) -> None:
    """``import kt_kernel`` gives ktk's from now on, here and in processes started from here.

    replace : also where another one is installed or already imported.
    Raises ImportError if there is another one and ``replace`` is False, or if SGLang has already
    looked for kt_kernel.
    """
    loaded = sys.modules.get(NAME)
    is_ours = Path(getattr(loaded, "__file__", None) or ".").is_relative_to(DIRECTORY)
    early = [name for name in _IMPORTERS if name in sys.modules]
    if early and not is_ours:
        raise ImportError(
            f"{early[0]} is imported already and has looked for {NAME}: install first"
        )
    other = installed()
    if other is not None and not replace:
        raise ImportError(
            f"{NAME} is installed, {other}: uninstall it, or call install(replace=True), which "
            "hides it from this process and those that it starts"
        )
    environment(os.environ)
    sys.path[:] = [str(DIRECTORY), *(entry for entry in sys.path if entry != str(DIRECTORY))]
    if not is_ours:
        for name in [n for n in sys.modules if n == NAME or n.startswith(f"{NAME}.")]:
            del sys.modules[name]
    importlib.invalidate_caches()
