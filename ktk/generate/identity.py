"""Whose keys and values an engine makes: what must be the same for pages to be taken again."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import xxhash

from ktk.generate.open import OpenModel
from ktk.integration.transformers.native_batch import NativeModel
from ktk.kv.pages import PAGE
from ktk.kv.prefix.config import CacheInfo
from ktk.kv.sizes import TokenShape

LAYOUT = 1  # of a page in a frame, and of what ktk's kernels compute; another one: other pages
SAMPLES, SAMPLE_BYTES = 256, 4096  # of each file of weights
_TOLD = (".json", ".jinja", ".txt", ".md", ".model")  # tokens and templates, not weights
_KV_DTYPES = {
    np.float32: "float32",
    np.float16: "float16",
    np.uint16: "bfloat16",
    np.int8: "int8",
}


def cache_info(opened: OpenModel, native: NativeModel, linear: str) -> CacheInfo:
    """Of a model that runs natively. linear : of its dense layers, as in ``open_model``.

    A page is one key of all layers' numbers: its order is that of ``PagePool.copy_out``.
    """
    found = opened.description
    tuned = "" if opened.adapter is None else f" with {fingerprint(opened.adapter)}"
    numbers = native.token_bytes // native.kv_dtype.itemsize  # of int8, scales too
    return CacheInfo(
        f"{opened.name} {fingerprint(found.path)}{tuned}",
        f"{found.weight_format}, {found.kernel}, linear {linear}, layout {LAYOUT} of {PAGE} tokens",
        _KV_DTYPES[native.kv_dtype.type],
        TokenShape(1, 1, numbers, 0),
    )


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Tells a model from others by config.json and, of each file of weights, its name, size, time
    and bytes at ``SAMPLES`` places: 32 hexadecimal digits.

    path : a GGUF file, or a directory. Whoever changes weights so that none of that changes gets
    the keys of those before.
    """
    path, digest = Path(path), xxhash.xxh3_128()
    files = [path]
    if path.is_dir():
        for name in ("config.json", "adapter_config.json"):
            if (path / name).is_file():
                digest.update((path / name).read_bytes())
        files = sorted(each for each in path.iterdir() if each.is_file())
        files = [each for each in files if each.suffix not in _TOLD]
    for each in files:
        status = each.stat()
        digest.update(f"{each.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        with each.open("rb", buffering=0) as file:
            step = max(SAMPLE_BYTES, status.st_size // SAMPLES)
            for begin in range(0, status.st_size, step):
                file.seek(begin)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
