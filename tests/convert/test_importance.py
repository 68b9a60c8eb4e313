"""Conversions by an importance matrix: closer where inputs are large, from any source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ktk.checkpoint import read_layer
from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.checkpoint.imatrix import Imatrix, Importance, read_imatrix, write_imatrix
from ktk.cli import main
from ktk.convert.recipe import experts_name
from ktk.convert.run import convert
from ktk.errors import CheckpointError
from ktk.experts.dequantise import expert_weights
from make.checkpoints import make
from make.conversions import tiny_gguf

F = np.float32
NAMES = ("gate", "up", "down")


def written(path: Path, layers: int, experts: int, sizes: dict[str, int], seed: int = 0) -> Imatrix:
    """A file of mean squares that differ by a factor of 1000; the last expert saw no token."""
    rng = np.random.default_rng(seed)
    entries = {}
    for layer in range(layers):
        for name in NAMES:
            squares = np.exp(rng.uniform(0, np.log(1000), (experts, sizes[name]))).astype(F)
            counts = np.full(experts, 100, F)
            squares[-1], counts[-1] = 0, 0
            entries[experts_name(layer, name)] = Importance(squares, counts)
    imatrix = Imatrix(entries)
    write_imatrix(path, imatrix)
    return imatrix


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
@pytest.mark.parametrize("method", ["int4", "nl4", "q4_0"])
def test_columns_of_large_inputs_come_closer(tmp_path: Path, suffix: str, method: str) -> None:
    expected = make(tmp_path / "in", "deepseek", sizes=(2, 3, 128, 64))
    file = tmp_path / f"imatrix.{suffix}"
    imatrix = written(file, 2, 3, {"gate": 128, "up": 128, "down": 64})
    ends = {"gguf": method == "q4_0"}
    errors = []
    for name, options in (("plain", {}), ("with", {"imatrix": file})):
        output = tmp_path / (f"{name}.gguf" if ends["gguf"] else name)
        convert(tmp_path / "in", output, quant_method=method, **options)
        total = 0.0
        for e in range(2):
            if ends["gguf"]:
                checkpoint = GgufCheckpoint.open(output)
                got = {n: checkpoint.read(experts_name(1, n))[e] for n in NAMES}
            else:
                got = expert_weights(read_layer(output, 1), e)._asdict()
            for n in NAMES:
                squares = imatrix.entries[experts_name(1, n)].mean_squares[e]
                total += float((np.square(got[n] - expected.experts[1][e][n]) * squares).sum())
        errors.append(total)
    assert errors[1] < (0.97 if method == "nl4" else 0.9) * errors[0]


def test_a_gguf_model_is_rounded_by_an_importance_matrix(tmp_path: Path) -> None:
    source = tiny_gguf(tmp_path / "m.gguf")
    written(tmp_path / "i.dat", 3, 4, {"gate": 64, "up": 64, "down": 32})
    convert(source, tmp_path / "plain")
    convert(source, tmp_path / "with", imatrix=tmp_path / "i.dat")
    plain, rounded = (read_layer(tmp_path / name, 2).data for name in ("plain", "with"))
    assert (plain != rounded).any()


@pytest.mark.parametrize(
    ("sizes", "layers", "match"),
    [
        ({"gate": 128, "up": 128, "down": 32}, 2, "ffn_down_exps.weight: 32 columns: must be 64"),
        ({"gate": 128, "up": 128, "down": 64}, 1, "has no blk.1.ffn_gate_exps.weight"),
    ],
)
def test_a_file_of_another_model_is_refused(
    tmp_path: Path, sizes: dict[str, int], layers: int, match: str
) -> None:
    make(tmp_path / "in", "deepseek", sizes=(2, 3, 128, 64))
    written(tmp_path / "i.gguf", layers, 3, sizes)
    with pytest.raises(CheckpointError, match=match):
        convert(tmp_path / "in", tmp_path / "out", imatrix=tmp_path / "i.gguf")
    with pytest.raises(ValueError, match="imatrix: bf16 rounds nothing away"):
        convert(tmp_path / "in", tmp_path / "out", quant_method="bf16", imatrix=tmp_path / "i.gguf")
    assert not (tmp_path / "out").exists()


def test_quant_is_convert(tmp_path: Path) -> None:
    make(tmp_path / "in", "deepseek", sizes=(1, 2, 64, 64))
    with pytest.raises(SystemExit) as ended:
        main(["quant", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")])
    assert ended.value.code == 0
    assert read_layer(tmp_path / "out", 0).types == "nl4"
    with pytest.raises(CheckpointError):
        read_imatrix(tmp_path / "out" / "config.json")
