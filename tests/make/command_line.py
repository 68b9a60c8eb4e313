"""The command line, run in this process."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from typing import Any

from ktk.cli import main


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def ktk(*arguments: str, given: str = "") -> Done:
    """The command line in this process: a new one takes seconds to import torch."""
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(given)
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(list(arguments))
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.stdin = before
    return Done(code or 0, out.getvalue(), err.getvalue())
