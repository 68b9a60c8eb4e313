"""No interruption can be seen in the bytes: full disks, kills, other jobs' directories."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import ktk
from ktk.checkpoint.packed import STATE_FILE, TEMPORARY_PREFIX
from ktk.convert.run import Progress, convert
from ktk.errors import CheckpointError
from make.checkpoints import make
from make.conversions import contents


def test_full_disk_is_a_clear_error_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make(source, "deepseek")
    convert(source, tmp_path / "whole", quant_method="bf16")
    whole = contents(tmp_path / "whole")
    for failing in range(1, 12):
        calls = 0

        def fails(fd: int, real: Any = os.fsync, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(fd)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fails)
            try:
                convert(source, output, quant_method="bf16")
            except OSError as error:
                assert "make room and run again with --resume" in str(error)  # noqa: PT017
        left = contents(output)
        assert all(whole[name] == data for name, data in left.items())
        assert "config.json" not in left or len(left) == len(whole)
        convert(source, output, quant_method="bf16", resume=True)
        assert contents(output) == whole
        shutil.rmtree(output)


def test_too_small_a_disk_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "in", "deepseek")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="disk is full") as caught:
        convert(tmp_path / "in", tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert "are to be written" in str(caught.value.__cause__)
    assert not (tmp_path / "out").exists()


def test_resume_refuses_another_job(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make(source, "deepseek")
    convert(source, output, quant_method="int4")
    before = contents(output)
    with pytest.raises(ValueError, match="begun with quant_method='int4', now 'int8'"):
        convert(source, output, quant_method="int8", resume=True)
    with pytest.raises(ValueError, match=r"begun with rotation=None, now \[64, 0\]"):
        convert(source, output, quant_method="int4", rotation=64, resume=True)
    convert(source, tmp_path / "rotated", quant_method="int4", rotation=64)
    with pytest.raises(ValueError, match=r"begun with rotation=\[64, 0\], now None"):
        convert(source, tmp_path / "rotated", quant_method="int4", resume=True)
    with pytest.raises(ValueError, match="begun with group_size=32, now 64"):
        convert(source, output, group_size=64, resume=True)
    os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(ValueError, match=r"source file model\.safetensors changed since"):
        convert(source, output, quant_method="int4", resume=True)
    (output / STATE_FILE).write_text('{"source": 3}')
    with pytest.raises(ValueError, match="begun with"):
        convert(source, output, resume=True)
    (output / STATE_FILE).write_text("[")
    with pytest.raises(CheckpointError, match="not JSON"):
        convert(source, output, resume=True)
    assert {k: v for k, v in contents(output).items() if k != STATE_FILE} == {
        k: v for k, v in before.items() if k != STATE_FILE
    }


def test_resume_of_a_finished_job_does_nothing_and_of_none_starts(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make(source, "deepseek")
    assert convert(source, output, quant_method="bf16", resume=True).reused_layers == 0
    before = contents(output)
    stamp = (output / "ktk-experts-00000.safetensors").stat().st_mtime_ns
    summary = convert(source, output, quant_method="bf16", resume=True)
    assert summary.reused_layers == 2
    assert contents(output) == before
    assert (output / "ktk-experts-00000.safetensors").stat().st_mtime_ns == stamp


def test_resume_writes_damaged_or_missing_files_again(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make(source, "deepseek")
    convert(source, output, quant_method="bf16")
    before = contents(output)
    for name in before:
        if name == STATE_FILE:
            continue
        (output / name).unlink()
        (output / f"{TEMPORARY_PREFIX}{name}.77").write_bytes(b"left over")
        convert(source, output, quant_method="bf16", resume=True)
        assert contents(output) == before
        os.truncate(output / name, 5)
        convert(source, output, quant_method="bf16", resume=True)
        assert contents(output) == before


def test_job_written_again_is_not_called_finished_meanwhile(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make(source, "deepseek")
    convert(source, output, quant_method="bf16")
    (output / "ktk-experts-00001.safetensors").unlink()

    def finished(progress: Progress) -> None:
        assert (output / "config.json").exists() == (progress.what == "done")

    convert(source, output, quant_method="bf16", resume=True, progress=finished)


# The child imports once, then forks one victim per trial; a victim dies by SIGKILL, at the n-th
# file operation or when the parent's timer says so.
VICTIM = """
import json, os, random, signal, sys, time
from pathlib import Path
from ktk.convert import convert
from ktk._cy import native_module
native_module()
job = json.loads(sys.argv[1])

def run(resume, threads=2):
    method = job["quant_method"]
    convert(job["source"], job["output"], quant_method=method, threads=threads, resume=resume)

def die_at(operation, nth, after):
    count = 0
    real = getattr(os, operation)
    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == nth and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if count == nth and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(os, operation, counted)

def victim(trial):
    pid = os.fork()
    if pid == 0:
        status = 3
        try:
            if "operation" in trial:
                die_at(trial["operation"], trial["nth"], trial["after"])
            run(trial["resume"])
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    if "delay" in trial:
        time.sleep(trial["delay"])
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    _, status = os.waitpid(pid, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

for line in sys.stdin:
    started = time.monotonic()
    status = victim(json.loads(line))
    print(json.dumps([status, time.monotonic() - started]), flush=True)
"""


class Victims:
    """Runs conversions in processes that die on command."""

    def __init__(self, source: Path, output: Path, quant_method: str) -> None:
        job = {"source": str(source), "output": str(output), "quant_method": quant_method}
        self.process = subprocess.Popen(
            [sys.executable, "-c", VICTIM, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(ktk.__file__).parent.parent)},
        )

    def run(self, **trial: Any) -> tuple[int, float]:
        """(exit status or minus the signal, seconds)."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(trial) + "\n")
        self.process.stdin.flush()
        status, seconds = json.loads(self.process.stdout.readline())
        return status, seconds

    def __enter__(self) -> Victims:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def check_after_kill(output: Path, whole: dict[str, bytes]) -> None:
    """Every file under a final name is whole; config.json is there only if all are."""
    left = contents(output) if output.exists() else {}
    final = {name: data for name, data in left.items() if TEMPORARY_PREFIX not in name}
    for name, data in final.items():
        assert data == whole[name], name
    assert "config.json" not in final or set(final) == set(whole)


@pytest.mark.slow
def test_killed_at_every_file_operation_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make(source, "deepseek", sizes=(3, 4, 64, 32))
    convert(source, tmp_path / "whole", quant_method="bf16")
    whole = contents(tmp_path / "whole")
    kills = 0
    with Victims(source, output, "bf16") as victims:
        for operation, after in (("replace", False), ("replace", True), ("fsync", False)):
            nth = 1
            while True:
                status, _ = victims.run(resume=False, operation=operation, nth=nth, after=after)
                check_after_kill(output, whole)
                if status == 0:
                    break
                assert status == -signal.SIGKILL
                kills += 1
                assert victims.run(resume=True)[0] == 0
                assert contents(output) == whole, (operation, after, nth)
                shutil.rmtree(output)
                nth += 1
            shutil.rmtree(output)
    assert kills > 2 * len(whole)


@pytest.mark.parametrize("quant_method", ["bf16", "int4"])
@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_gives_the_same_bytes(
    tmp_path: Path, quant_method: str
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make(source, "deepseek", sizes=(6, 8, 256, 128))
    convert(source, tmp_path / "whole", quant_method=quant_method)
    whole = contents(tmp_path / "whole")
    seed = int(time.time())
    rng = random.Random(seed)
    print(f"seed {seed}")
    with Victims(source, output, quant_method) as victims:
        status, seconds = victims.run(resume=False)
        assert status == 0
        for _ in range(4):
            shutil.rmtree(output)
            kills = 0
            resume = False
            while True:  # killed again and again, ever later, until it gets through
                status, _ = victims.run(
                    resume=resume, delay=rng.uniform(0, seconds * (0.5 + kills / 4))
                )
                check_after_kill(output, whole)
                if status == 0:
                    break
                assert status == -signal.SIGKILL
                kills += 1
                resume = True
            assert contents(output) == whole
