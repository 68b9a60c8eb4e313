"""docs/packed-format.md is enough to read a packed directory:
a reader written from the page alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from ktk.convert import convert
from make import checkpoints

HIDDEN, INTERMEDIATE = 80, 40  # multiples of neither 32 nor 64; 40 not of 16
ZERO = {"int4": 8, "int8": 128}
# Mean squared error over mean square; random weights. A code in another place makes it 1 or more.
LOSS = {"nl4": 0.02, "int4": 0.02, "int8": 2e-4, "fp8": 2e-3, "bf16": 0.0}
LEVELS = (-10, -8, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 7, 9)
MULTIPLIERS = (5, 6, 7, 8, 9, 10, 11, 12, -5, -6, -7, -8, -9, -10, -11, -12)


def e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    size = 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else mantissa * 2.0**-9
    return -size if code & 128 else size


def bf16(raw: bytes) -> np.ndarray:
    return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")


def splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def rotated(rows: np.ndarray, width: int, seed: int) -> np.ndarray:
    """(rows, K): signs, then butterflies, as the page has them."""
    x = rows.copy()
    for k in range(x.shape[1]):
        if splitmix64(seed * 2**32 + k // 64) >> k % 64 & 1:
            x[:, k] = -x[:, k]
    step = 1
    while step < width:
        for k in range(x.shape[1]):
            if k // step % 2 == 0:
                a, b = x[:, k].copy(), x[:, k + step].copy()
                x[:, k], x[:, k + step] = a + b, a - b
        step *= 2
    return x / math.sqrt(width)


class Page:
    """A layer's file, read as the page says; nothing of ktk."""

    def __init__(self, path: Path) -> None:
        self.raw = path.read_bytes()
        length = int.from_bytes(self.raw[:8], "little")
        header = json.loads(self.raw[8 : 8 + length])
        said = json.loads(header["__metadata__"]["ktk"])
        self.begin, self.spec, self.layer = 8 + length, said["spec"], said["layer"]
        assert said["layout_version"] == 3
        assert header["experts"]["dtype"] == "U8"
        self.num_experts, self.expert_bytes = header["experts"]["shape"]
        assert len(self.raw) == self.begin + self.num_experts * self.expert_bytes
        assert self.begin % 4096 == self.expert_bytes % 4096 == 0

    def panel(self, at: int, in_features: int) -> tuple[np.ndarray, int]:
        """The panel that begins at byte ``at``: its weights (16, in_features), of unrotated
        inputs, and where it ends.
        """
        width, seed = self.spec.get("rotation", (0, 0))
        k = max(32, width) * math.ceil(in_features / max(32, width))
        weights, end = self.stored(at, k)
        if width:  # (W R^T) R, R the matrix that rotates
            weights = weights @ rotated(np.eye(k), width, seed).T
        return weights[:, :in_features], end

    def stored(self, at: int, k: int) -> tuple[np.ndarray, int]:
        """The same as it lies: (16, k)."""
        kind = self.spec["weight_format"]
        weights = np.empty((16, k), np.float32)
        if kind == "bf16":
            values = bf16(self.raw[at : at + 32 * k])
            for c in range(16):
                for i in range(k):
                    weights[c, i] = values[i // 2 * 32 + 2 * c + i % 2]
            return weights, at + 32 * k
        group = min(self.spec["group_size"] or k, k)
        groups = math.ceil(k / group)
        if kind == "fp8":
            scales = np.frombuffer(self.raw[at : at + 4 * groups], "<f4")
            at += 64 * math.ceil(4 * groups / 64)
            for c in range(16):
                for i in range(k):
                    code = self.raw[at + i // 4 * 64 + 4 * c + i % 4]
                    weights[c, i] = scales[i // group] * e4m3(code)
            return weights, at + 16 * k
        if kind == "nl4":
            scales = np.frombuffer(self.raw[at : at + 64], "<f4")
            size = 64 + 16 * math.ceil(k / (2 * group)) * (self.spec["group_size"] > 0)
            codes = at + 64 * math.ceil(size / 64)
            for c in range(16):
                for i in range(k):
                    code = self.raw[codes + i // 8 * 64 + 4 * c + i % 4]
                    level = LEVELS[code & 15 if i % 8 < 4 else code >> 4]
                    both = self.raw[at + 64 + i // (2 * group) * 16 + c]
                    nibble = both >> 4 if i // group % 2 else both & 15
                    multiplier = MULTIPLIERS[nibble] if self.spec["group_size"] else 1
                    weights[c, i] = scales[c] * (multiplier * level)
            return weights, codes + 8 * k
        if self.spec["group_size"]:
            size = 32 * groups
            scales = bf16(self.raw[at : at + size]).reshape(groups, 16)
        else:
            size = 64
            scales = np.frombuffer(self.raw[at : at + size], "<f4").reshape(1, 16)
        at += 64 * math.ceil(size / 64)
        wide = 8 if kind == "int4" else 4  # inputs of a row of codes
        for c in range(16):
            for i in range(k):
                code = self.raw[at + i // wide * 64 + 4 * c + i % 4]
                if kind == "int4":
                    code = code & 15 if i % 8 < 4 else code >> 4
                weights[c, i] = scales[i // group, c] * (code - ZERO[kind])
        return weights, at + k // wide * 64

    def expert(self, index: int) -> dict[str, np.ndarray]:
        h, i = self.spec["hidden_size"], self.spec["intermediate_size"]
        at = first = self.begin + index * self.expert_bytes
        first_names = ("gate", "up") if self.spec["has_gate"] else ("up",)
        found: dict[str, list[np.ndarray]] = {name: [] for name in (*first_names, "down")}
        for _ in range(math.ceil(i / 16)):
            for name in first_names:
                panel, at = self.panel(at, h)
                found[name].append(panel)
        for _ in range(math.ceil(h / 16)):
            panel, at = self.panel(at, i)
            found["down"].append(panel)
        rows = {"gate": i, "up": i, "down": h}
        weights = {n: np.concatenate(panels)[: rows[n]] for n, panels in found.items()}
        if self.spec["has_bias"]:
            for name in found:
                count = 16 * math.ceil(rows[name] / 16)
                values = np.frombuffer(self.raw[at : at + 4 * count], "<f4")
                weights[f"{name}_bias"], at = values[: rows[name]], at + 4 * count
                assert not values[rows[name] :].any()
        assert not any(self.raw[at : first + self.expert_bytes])
        assert first + self.expert_bytes - at < 4096
        return weights


@pytest.mark.parametrize("style", ["deepseek", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize(
    ("method", "group", "rotation"),
    [
        ("int4", 32, None),
        ("int4", 64, None),
        ("int4", 0, None),
        ("int4", 32, (64, 3)),
        ("int8", None, None),
        ("int8", None, 64),
        ("int8", None, (256, 9)),
        ("nl4", 16, None),
        ("nl4", 32, 0),
        ("nl4", 0, (256, 1)),
        ("fp8", None, None),
        ("bf16", None, None),
    ],
)
def test_a_reader_written_from_the_page_finds_the_weights(
    tmp_path: Path,
    style: str,
    method: str,
    group: int | None,
    rotation: tuple[int, int] | int | None,
) -> None:
    source, output = tmp_path / "source", tmp_path / "packed"
    held = checkpoints.make(source, style, sizes=(2, 2, HIDDEN, INTERMEDIATE))
    convert(source, output, quant_method=method, group_size=group, rotation=rotation)
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["layout_version"]) == ("ktk", 3)
    assert config["layers"] == [0, 1]
    page = Page(output / "ktk-experts-00001.safetensors")
    assert page.layer == 1
    for key in ("weight_format", "group_size", "activation_group"):
        assert config[key] == page.spec[key]
    assert config.get("rotation") == page.spec.get("rotation")
    for index in range(page.num_experts):
        expected, found = held.experts[1][index], page.expert(index)
        assert set(found) == set(expected)
        for name, weights in expected.items():
            loss = np.square(weights - found[name]).mean() / np.square(weights).mean()
            assert loss <= (0 if name.endswith("bias") else LOSS[method]), f"{name} of {index}"
