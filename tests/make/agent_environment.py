"""The environment that tests/server/test_agent_loop.py needs: python
tests/make/agent_environment.py [FOLDER] makes it, by default build/agent, and runs them
(`make test-agent`). It has an agent library and its client, 100 MB.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "pydantic-ai-slim[openai]==2.68.0"
TESTS = ROOT / "tests" / "server" / "test_agent_loop.py"


def make(folder: Path) -> Path:
    """Its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "-q", "--no-compile", LIBRARY]
        subprocess.run(install, check=True)
    return python


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "agent"
    variables = {**os.environ, "AGENT_PYTHON": str(make(folder.resolve()))}
    command = [sys.executable, "-m", "pytest", "-s", str(TESTS)]
    return subprocess.run(command, check=False, cwd=ROOT, env=variables).returncode


if __name__ == "__main__":
    sys.exit(main())
