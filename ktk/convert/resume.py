"""What an interrupted conversion left in its output directory, and who may take it over.

The state file names the job: its options and every file it reads. It is the first file written, so
a directory that holds others was begun by somebody else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ktk.checkpoint.packed import STATE_FILE, TEMPORARY_PREFIX
from ktk.checkpoint.safetensors import read_json_object
from ktk.errors import CheckpointError


@contextlib.contextmanager
def made(directory: Path) -> Iterator[None]:
    """A directory for the block; if that fails, what was made for it and is empty goes away."""
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in new:
            with contextlib.suppress(OSError):  # holds something by now
                path.rmdir()
        raise


@contextlib.contextmanager
def claimed(
    output: Path, state: dict[str, Any], resume: bool, folders: Sequence[str]
) -> Iterator[None]:
    """Hold a directory for one job, made if need be, without another run's temporary files.

    state : names the job. folders : of the directory, that may hold temporary files too. Raises
    FileExistsError for a directory in use, or of others, ValueError for one of another job.
    """
    with made(output), _locked(output):
        _check(output, state, resume)
        for folder in (output, *(output / name for name in folders)):
            for path in folder.glob(TEMPORARY_PREFIX + "*"):
                path.unlink()
        yield


def check_unchanged(path: Path, before: Any, now: list[dict[str, Any]]) -> None:
    """CheckpointError if a source's fingerprint is not what it was when the conversion began."""
    changed = _changed(before, now)
    if changed:
        raise CheckpointError(f"{path}: {changed} while it was converted; convert it again")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock; it ends with the process, however that ends."""
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"{directory}: another conversion is writing there; wait for it"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(fd)


def _check(output: Path, state: dict[str, Any], resume: bool) -> None:
    """Refuse a directory that is not empty, unless this very job is to be resumed there."""
    present = {name for name in os.listdir(output) if not name.startswith(TEMPORARY_PREFIX)}
    if not present:
        return
    if not resume:
        raise FileExistsError(
            f"{output}: exists and is not empty; give another output, empty it, "
            "or go on with --resume"
        )
    if STATE_FILE not in present:
        raise FileExistsError(
            f"{output}: was not begun by ktk convert ({STATE_FILE} is missing): nothing to resume"
        )
    path = output / STATE_FILE
    have = read_json_object(path)
    for key in dict.fromkeys((*state, *have)):  # what is not so by default stands in one alone
        if key != "source" and have.get(key) != state.get(key):
            raise ValueError(
                f"{path}: was begun with {key}={have.get(key)!r}, now {state.get(key)!r}: "
                "resume with the same options, or give another output"
            )
    changed = _changed(have.get("source"), state["source"])
    if changed:
        raise ValueError(f"{path}: {changed} since the conversion began: give another output")


def _changed(before: Any, now: list[dict[str, Any]]) -> str | None:
    """What differs between two fingerprints of a source, or None."""
    if before == now:
        return None
    try:
        old = {entry["file"]: entry for entry in before}
    except (TypeError, KeyError):
        return "the list of source files was damaged"
    new = {entry["file"]: entry for entry in now}
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            return f"source file {name} was removed"
        if name not in old:
            return f"source file {name} was added"
        if old[name] != new[name]:
            return f"source file {name} changed"
    return "the list of source files changed"
