"""The files of SGLang's wheels that import kt_kernel: python tests/make/sglang_files.py downloads
the wheels and keeps these files, as they are, in build/sglang.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "sglang"
# Name and version, as pip takes them: SGLang's own release, and KTransformers' of it.
MAINLINE, KT = "sglang==0.5.23", "sglang-kt==0.7.2"
WRAPPER = "sglang/srt/layers/moe/kt_ep_wrapper.py"


def folder_of(release: str) -> Path:
    return FOLDER / release.replace("==", "-")


def files_of(release: str) -> dict[str, str]:
    """Text of each file by its path in the wheel; none where it was not downloaded."""
    folder = folder_of(release)
    return {str(f.relative_to(folder)): f.read_text() for f in sorted(folder.rglob("*.py"))}


def why_not(release: str) -> str | None:
    """Why the release's files cannot be tested here, None if they can."""
    if (folder_of(release) / WRAPPER).is_file():
        return None
    return f"{release} is not in {FOLDER}: run python tests/make/sglang_files.py"


def download(release: str) -> None:
    """Keep the release's files; what pip raises if it cannot be had."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
        ]
        subprocess.run([*command, "--python-version=3.11", "-d", folder, release], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".py") and b"kt_kernel" in (text := archive.read(name)):
                    kept = folder_of(release) / name
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    kept.write_bytes(text)


if __name__ == "__main__":
    for release in (MAINLINE, KT):
        if why_not(release) is not None:
            download(release)
