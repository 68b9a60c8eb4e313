"""ik_llama.cpp's types: NumPy's decoding against rows and weights that its own library made
(vendor/llamafile/make_ik_vectors.py), and files that hold them.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path

import gguf
import numpy as np
import pytest

import ktk
from ktk._cy import native_module
from ktk.bench.blocks import error_bound, random_matrix
from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.errors import CheckpointError
from ktk.experts.formats.decode import decode_rows
from ktk.experts.formats.ik import BLOCK, INTERLEAVED, ROWS
from ktk.experts.stored import ExpertWeights
from ktk.reference.moe import oracle_forward
from make.cases import random_hidden
from make.gguf_files import STRING, U32, key, raw_file, tensor

VENDOR = Path(__file__).parents[2] / "vendor" / "llamafile"
TYPES = [row.name for row in ROWS]
ROW = {row.name: row for row in ROWS}
EXPERTS, SIZE = 2, 256
PARTS = ("gate", "up", "down")


@pytest.fixture(scope="module")
def made_rows() -> dict[str, tuple[np.ndarray, int]]:
    """Rows that the program quantised, and the CRC-32 of their weights."""
    found = json.loads((VENDOR / "ik_rows.json").read_text())
    return {
        name: (np.frombuffer(base64.b64decode(entry["row"]), np.uint8), entry["crc32"])
        for name, entry in found.items()
    }


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    """The arrays of ik_vectors.h."""
    text = (VENDOR / "ik_vectors.h").read_text()
    arrays = re.findall(r"const uint(\d+)_t (\w+)\[\] = \{([^}]*)\}", text)
    return {
        name: np.array([int(word, 16) for word in re.findall(r"0x\w+", body)], f"u{int(bits) // 8}")
        for bits, name, body in arrays
    }


@pytest.mark.parametrize("name", TYPES)
def test_blocks_decode_to_the_programs_weights(name: str, vectors: dict[str, np.ndarray]) -> None:
    want = vectors[f"WEIGHTS_{name}"].view(np.float32)
    got = decode_rows(name, vectors[f"BLOCKS_{name}"])
    np.testing.assert_array_equal(want, got)
    assert len(np.unique(got)) > 30


@pytest.mark.parametrize("name", TYPES)
def test_rows_that_the_program_made_have_its_weights(
    name: str, made_rows: dict[str, tuple[np.ndarray, int]]
) -> None:
    row, crc = made_rows[name]
    assert len(row) == ROW[name].row_bytes(2 * BLOCK)
    weights = decode_rows(name, np.stack([row, row]))[1]
    assert zlib.crc32((weights + 0.0).tobytes()) == crc  # 0.0 of either sign is one


def test_rows_stay_apart(vectors: dict[str, np.ndarray]) -> None:
    for row in ROWS:
        blocks = np.tile(vectors[f"BLOCKS_{row.name}"], (2, 3, 1))
        blocks[1, 2] = 0
        decoded = decode_rows(row.name, blocks)
        assert decoded.shape == (2, 3, BLOCK) and not decoded[1, 2].any()
        np.testing.assert_array_equal(decoded[0, 0], decoded[1, 1])


def test_no_number_is_one_of_llama_cpps() -> None:
    numbers = [row.number for row in ROWS] + list(INTERLEAVED)
    assert len(set(numbers)) == len(numbers)
    assert not set(numbers) & {int(kind) for kind in gguf.GGMLQuantizationType}


def write_experts(path: Path, name: str) -> Path:
    """A model of one layer, its experts random blocks."""
    data, infos = b"", []
    for seed, part in enumerate(PARTS):
        dims = [SIZE, SIZE, EXPERTS]
        infos.append(tensor(f"blk.0.ffn_{part}_exps.weight", dims, ROW[name].number, len(data)))
        data += random_matrix(name, EXPERTS, SIZE, SIZE, seed).data.tobytes()
        data += bytes(-len(data) % 32)
    sizes = {
        "expert_count": EXPERTS,
        "expert_used_count": 1,
        "embedding_length": SIZE,
        "expert_feed_forward_length": SIZE,
        "block_count": 1,
    }
    keys = [key("general.architecture", STRING, "qwen3moe")]
    keys += [key(f"qwen3moe.{field}", U32, value) for field, value in sizes.items()]
    return raw_file(path, keys, infos, data)


@pytest.mark.parametrize("name", TYPES)
def test_experts_of_a_file_run(name: str, tmp_path: Path) -> None:
    if native_module() is None:
        pytest.skip("the extension is not built")
    path = write_experts(tmp_path / "m.gguf", name)
    moe = ktk.load_gguf(path)[0]
    assert moe.packed.up.format is ROW[name]
    checkpoint = GgufCheckpoint.open(path)
    parts = [checkpoint.read(f"blk.0.ffn_{part}_exps.weight") for part in PARTS]
    x = random_hidden(3, SIZE, 0)
    ids, weights = np.array([[0], [1], [0]]), np.ones((3, 1), np.float32)
    experts = [ExpertWeights(*(part[e] for part in parts)) for e in range(EXPERTS)]
    with np.errstate(over="ignore"):
        want = oracle_forward(experts, moe.spec, x, ids, weights)
    bound = 1.5 * error_bound(name, moe.spec.activation_group)  # of three tokens
    for kernels in (moe, ktk.MoE(moe.packed, repack=True)):
        assert np.abs(kernels(x, ids, weights) - want).mean() <= bound * np.abs(want).mean()


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (339, r"IQ4_K_R4: rows interleaved .*; get the model in IQ4_K, or quantise it to IQ4_K"),
        (223, r"IQ4_XS_R8: rows interleaved .* leave out --repack"),
        (133, r"Q6_0: a type of ik_llama\.cpp that is not read here; get the model in Q6_K"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path: Path, number: int, text: str) -> None:
    infos = [tensor("good", [4]), tensor("bad", [256, 8], number, 32)]
    checkpoint = GgufCheckpoint.open(raw_file(tmp_path / "a.gguf", [], infos, bytes(4096)))
    with pytest.raises(CheckpointError, match=f"tensor 'bad' .* is {text}"):
        checkpoint.blocks("bad")


def test_rows_of_broken_blocks_are_refused(tmp_path: Path) -> None:
    infos = [tensor("bad", [128, 8], ROW["IQ4_KS"].number)]
    path = raw_file(tmp_path / "a.gguf", [], infos, bytes(4096))
    with pytest.raises(CheckpointError, match="rows of 128 weights: IQ4_KS has blocks of 256"):
        GgufCheckpoint.open(path)
