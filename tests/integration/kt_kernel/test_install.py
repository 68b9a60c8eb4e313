"""ktk as kt_kernel: only where it is asked for, and then in every process started from there."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from ktk.integration.kt_kernel import install
from ktk.integration.kt_kernel.sglang_arguments import NO_GRAPH, WITH_GRAPH, checked_arguments
from ktk.machine import threads as engine
from make import ROOT


def run(code: str, *paths: Path | str) -> str:
    """Standard output of a new Python that imports from ``paths``, too."""
    found = os.pathsep.join([str(ROOT), *map(str, paths)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": found},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A folder in which another kt_kernel is installed."""
    package = tmp_path / "kt_kernel"
    package.mkdir()
    (package / "__init__.py").write_text("KTMoEWrapper = 'the real one'\n")
    return tmp_path


IMPORT = """
import subprocess, sys
import kt_kernel
print(kt_kernel.KTMoEWrapper)
"""
IN_CHILDREN = """
from multiprocessing import get_context
from ktk.integration.kt_kernel.install import install
def child():
    import kt_kernel
    print(kt_kernel.KTMoEWrapper.__module__, flush=True)
if __name__ == "__main__":
    install()
    child()
    process = get_context("spawn").Process(target=child)
    process.start(), process.join()
"""
OURS = "ktk.integration.kt_kernel.wrapper"


def test_nothing_is_shadowed_unasked(real: Path) -> None:
    assert run(f"import ktk, ktk.integration.kt_kernel.install\n{IMPORT}", real) == "the real one"
    code = "try:\n    import ktk, kt_kernel\nexcept ImportError as error:\n    print(error)"
    assert run(code) == "No module named 'kt_kernel'"


def test_an_installed_kt_kernel_stays_unless_it_is_to_be_replaced(real: Path) -> None:
    install_ = "from ktk.integration.kt_kernel.install import install\n"
    code = (
        f"{install_}try:\n    install()\nexcept ImportError as error:\n    print(error)\n{IMPORT}"
    )
    said, found = run(code, real).splitlines()
    assert str(real) in said and "install(replace=True)" in said
    assert found == "the real one"
    code = f"import kt_kernel\n{install_}install(replace=True)\n{IMPORT}"
    assert OURS in run(code, real)
    assert run(IMPORT, real) == "the real one"


def test_spawned_processes_find_it_too(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(IN_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.split() == [OURS, OURS]


SERVER = """
import sys
from multiprocessing import get_context

def scheduler():
    import kt_kernel
    print(kt_kernel.KTMoEWrapper.__module__, flush=True)

if __name__ == "__main__":
    print(*sys.argv[1:], flush=True)
    process = get_context("spawn").Process(target=scheduler)
    process.start(), process.join()
"""


def test_the_command_becomes_sglangs_server_with_ktk_in_its_processes(real: Path) -> None:
    """Of a package sglang that does nothing else; another kt_kernel is installed, and said so."""
    (real / "sglang").mkdir()
    (real / "sglang" / "__init__.py").touch()
    (real / "sglang" / "launch_server.py").write_text(SERVER)
    given = ["--model-path", "m", "--kt-weight-path", str(real), "--kt-threadpool-count", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "ktk", "sglang", *given],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(real)])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [" ".join([*given, NO_GRAPH]), OURS]
    assert f"ktk stands in for the kt_kernel of {real}" in done.stderr
    assert f"with {NO_GRAPH}" in done.stderr


def test_after_sglang_has_looked_it_is_too_late() -> None:
    code = """
import sys, types
sys.modules["sglang.srt.layers.moe.kt_ep_wrapper"] = types.ModuleType("early")
from ktk.integration.kt_kernel.install import install
try:
    install()
except ImportError as error:
    print(error)
"""
    assert "has looked for kt_kernel: install first" in run(code)


def test_the_environment_is_put_first_once() -> None:
    given = {"PYTHONPATH": "/a"}
    for _ in range(2):
        install.environment(given)
    assert given["PYTHONPATH"].split(os.pathsep) == [str(install.DIRECTORY), "/a"]


def test_sglangs_arguments_are_passed_on(tmp_path: Path) -> None:
    given = ["--model-path", "m", f"--kt-weight-path={tmp_path}", "--kt-threadpool-count", "1"]
    given += ["--kt-method", "RAWINT4", "--tp", "2"]
    assert checked_arguments(given) == [*given, NO_GRAPH]
    assert checked_arguments([*given, NO_GRAPH]) == [*given, NO_GRAPH]
    assert checked_arguments([WITH_GRAPH, *given]) == given


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["--kt-method", "AMXINT4"], "--kt-weight-path is missing.*ignores --kt-method"),
        (["--model-path", "m"], "--kt-weight-path is missing"),
        (["--kt-weight-path", "no/such"], "no/such: no such file"),
        (["--kt-weight-path", __file__], "must be a directory or a .gguf file"),
        (["--kt-method", "SYCL_GPTQ_INT4"], "method='SYCL_GPTQ_INT4': ktk runs.*CPUs alone"),
        (["--kt-method", "AMXINT2"], "(?s)method='AMXINT2' is unknown.*AMXINT4"),
        (["--kt-num-gpu-experts", "-1"], "--kt-num-gpu-experts -1: must be at least 0"),
        (["--kt-num-gpu-experts", "x"], "--kt-num-gpu-experts: invalid int value: 'x'"),
        (["--kt-gpu-experts-ratio", "1.5"], "ratio 1.5: must be 0 to 1"),
        (["--kt-gpu-experts-ratio", "nan"], "ratio nan: must be 0 to 1"),
        (["--kt-max-deferred-experts-per-token", "-2"], "token -2: must be at least 0"),
        (["--kt-threadpool-count", "99"], "SGLang's default is 2.*threadpool_count=99"),
        (["--kt-expert-lora-path", "a"], "--kt-expert-lora-path: experts with adapters"),
    ],
)
def test_what_cannot_be_served_is_named_before_sglang_starts(
    given: list[str], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a new process: layers of tests before hold this one's engine to a layout.
    monkeypatch.setattr(engine, "_users", weakref.WeakSet())
    fitting = [] if "missing" in match else ["--kt-weight-path", str(tmp_path)]
    if "--kt-threadpool-count" not in given:
        fitting += ["--kt-threadpool-count", "1"]
    with pytest.raises(ValueError, match=match):
        checked_arguments([*(fitting if "missing" not in match else []), *given])
