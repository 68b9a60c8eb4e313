"""Paths as users give them: what a shell makes of a leading ``~`` it does not make of quoted
text, nor of a Python string.
"""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path, a leading ``~`` or ``~name`` being that user's home directory.

    ValueError if there is no such user.
    """
    text = os.fspath(path)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        user = expanded.partition("/")[0]
        raise ValueError(
            f"{text}: {user} is no user's home directory: must be ~, ~ and a user's name, or a "
            f"path; for a name that begins with ~ write ./{text}"
        )
    return Path(expanded)
