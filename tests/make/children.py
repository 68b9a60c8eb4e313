"""What has to be true of a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

from make import ROOT


def run_python(code: str, *arguments: str, before: str = "") -> str:
    """Run ``before`` and ``code``, both dedented, in a child that finds ktk and tests/make as this
    process does; what it printed, stderr included. AssertionError with that if it fails.
    """
    text = textwrap.dedent(before) + textwrap.dedent(code)
    found = os.pathsep.join([str(ROOT / "tests"), *(path for path in sys.path if path)])
    done = subprocess.run(
        [sys.executable, "-c", text, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": found},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
