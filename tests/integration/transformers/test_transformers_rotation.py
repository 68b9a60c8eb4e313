"""A rotation of experts in transformers: asked for, saved, loaded, and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from transformers import AutoModelForCausalLM

from ktk.checkpoint import read_config
from ktk.convert.run import convert
from ktk.errors import CheckpointError
from ktk.experts.rotation import NO_ROTATION, Rotation
from ktk.integration.transformers import KtkConfig, load_model, use_ktk
from ktk.integration.transformers.experts import handle_of, hang
from ktk.integration.transformers.packing import pack_module
from make.transformers_cases import experts_of, make_model, run

pytestmark = pytest.mark.slow

CASES: list[tuple[str, Any, Rotation]] = [
    ("int8", None, Rotation(64)),
    ("int8", 0, NO_ROTATION),
    ("int4", (256, 7), Rotation(256, 7)),
    ("nl4", None, Rotation(64)),
    ("nl4", 0, NO_ROTATION),
]
cases = pytest.mark.parametrize(
    ("weight_format", "asked", "wanted"), CASES, ids=lambda v: str(v).replace("Rotation", "")
)


def rotations(model: Any) -> set[Rotation]:
    return {handle_of(module).moe.spec.turns for module in experts_of(model)}  # type: ignore[union-attr]


def stated(directory: Path) -> dict[str, Any]:
    said = json.loads((directory / "config.json").read_text())["quantization_config"]
    return {name: said.get(name, "absent") for name in ("weight_format", "rotation")}


def experts_bytes(directory: Path) -> list[bytes]:
    files = sorted(directory.glob("ktk-experts-*"))
    assert len(files) == 2
    return [file.read_bytes() for file in files]


@cases
def test_a_packed_model_keeps_its_rotation_through_saving_and_loading(
    tmp_path: Path, weight_format: str, asked: Any, wanted: Rotation
) -> None:
    model = make_model("qwen3_moe")
    use_ktk(model, weight_format, rotation=asked)
    assert rotations(model) == {wanted}
    logits = run(model)[0]
    for name in ("saved", "again"):
        model.save_pretrained(tmp_path / name)
        rotation = list(wanted) if wanted.width else "absent"
        assert stated(tmp_path / name) == {"weight_format": weight_format, "rotation": rotation}
        assert {spec.turns for spec in read_config(tmp_path / name).specs.values()} == {wanted}
        model = load_model(tmp_path / name)
        assert rotations(model) == {wanted}
        assert torch.equal(run(model)[0], logits)
    assert experts_bytes(tmp_path / "saved") == experts_bytes(tmp_path / "again")


@cases
def test_loading_with_a_config_packs_what_convert_packs(
    tmp_path: Path, weight_format: str, asked: Any, wanted: Rotation
) -> None:
    plain = tmp_path / "plain"
    make_model("gpt_oss", torch.bfloat16).save_pretrained(plain)
    convert(plain, tmp_path / "packed", quant_method=weight_format, rotation=asked)
    config = KtkConfig(weight_format, rotation=asked)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=config),
        load_model(plain, quantization_config=config),
    ):
        assert rotations(loaded) == {wanted}
        loaded.save_pretrained(tmp_path / "saved")
        assert experts_bytes(tmp_path / "saved") == experts_bytes(tmp_path / "packed")
        assert stated(tmp_path / "saved") == stated(tmp_path / "packed")


def test_a_rotation_changes_what_runs(tmp_path: Path) -> None:
    plain, rotated = make_model("mixtral"), make_model("mixtral")
    exact = run(plain, "eager")[0]
    use_ktk(plain, "int8", rotation=0)
    use_ktk(rotated, "int8")
    assert not torch.equal(run(plain)[0], run(rotated)[0])
    for model in (plain, rotated):
        assert (run(model)[0] - exact).abs().mean() < 0.03 * exact.abs().mean()


def test_layers_of_several_rotations_are_saved_and_load(tmp_path: Path) -> None:
    model, other = make_model("mixtral"), make_model("mixtral")
    use_ktk(model, "int8")
    use_ktk(other, "int8", rotation=0)
    hang(experts_of(model)[0], handle_of(experts_of(other)[0]))
    model.save_pretrained(tmp_path)
    assert stated(tmp_path) == {"weight_format": "int8", "rotation": None}
    loaded = load_model(tmp_path)
    assert rotations(loaded) == {NO_ROTATION, Rotation(64)}
    assert torch.equal(run(loaded)[0], run(model)[0])


def test_a_directory_of_several_rotations_that_says_one_is_refused(tmp_path: Path) -> None:
    for width in (0, 64):
        model = make_model("mixtral")
        use_ktk(model, "int8", rotation=width)
        model.save_pretrained(tmp_path / str(width))
    name = "ktk-experts-00001.safetensors"
    (tmp_path / "0" / name).write_bytes((tmp_path / "64" / name).read_bytes())
    with pytest.raises(CheckpointError, match=rf"{name}: rotation=\[64, 0\], .* mixes"):
        load_model(tmp_path / "0")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("int8", 7), "rotation=7: the width must be 0, 64 or 256"),
        (("int8", "64"), "rotation='64': must be a width, or a width and a seed"),
        (("int8", [64, -1]), "the seed must be 0 to"),
        ((None, 7), "rotation=7: the width must be 0, 64 or 256"),
        (("bf16", 64), "rotation=64: bf16 takes 0"),
    ],
)
def test_what_is_no_rotation_is_refused_by_the_config(
    arguments: tuple[Any, Any], match: str
) -> None:
    weight_format, rotation = arguments
    with pytest.raises(ValueError, match=match):
        KtkConfig(weight_format, rotation=rotation)


def test_a_rotation_that_does_not_fit_changes_no_model(tmp_path: Path) -> None:
    model = make_model("mixtral")
    before = run(model)[0]
    for weight_format, rotation in (("int8", 32), ("fp32", 64), (None, 64)):
        with pytest.raises(ValueError, match=f"experts: rotation={rotation}: "):
            use_ktk(model, weight_format, rotation=rotation)
        with pytest.raises(ValueError, match=f"rotation={rotation}: "):
            pack_module(experts_of(model)[0], weight_format, rotation=rotation)
    assert torch.equal(run(model)[0], before)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="experts: rotation=64: fp32 takes 0"):
        load_model(tmp_path, quantization_config=KtkConfig(None, rotation=64))
