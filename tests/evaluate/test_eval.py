"""``ktk eval`` and ``ktk convert --calibrate``,
on small random models with a tokenizer of words.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("transformers")
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ktk import backends, load_gguf
from ktk.checkpoint import Checkpoint, packed
from ktk.checkpoint.imatrix import read_imatrix, write_imatrix
from ktk.cli import main
from ktk.convert.importance import ImportanceFile, record
from ktk.convert.recipe import Recipe
from ktk.convert.run import convert
from ktk.evaluate.distance import Distance, StoredLogits, distance
from ktk.evaluate.frontier import draw, frontier, read_rows
from ktk.evaluate.run import Row, evaluate_texts
from ktk.evaluate.variants import Variant, all_variants
from ktk.experts.formats import PANELS
from ktk.experts.formats.floats import as_values, f32_to_bf16
from ktk.integration.transformers.calibration import Calibration, run_layers
from ktk.integration.transformers.experts import find_experts
from ktk.quantise.feedback import rows_alike
from ktk.quantise.texts import windows
from make.checkpoints import write_safetensors
from make.fp8_directory import to_fp8
from make.transformers_cases import make_model

RUNS_GGUF = backends.backends()["LLAMAFILE"].why_not() is None
CHANGES: dict[str, dict[str, object]] = {"qwen3_moe": {"moe_intermediate_size": 64}, "gpt_oss": {}}
WORDS = [f"w{i}" for i in range(3, 250)]


def write_text(path: Path, seed: int, count: int = 1100) -> Path:
    path.write_text(" ".join(random.Random(seed).choices(WORDS, k=count)))
    return path


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / request.param
    make_model(request.param, **CHANGES[request.param]).save_pretrained(folder)
    vocabulary = {"<unk>": 0, **{word: i + 3 for i, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", 1)


def fake_model(logits: torch.Tensor):
    return lambda ids, use_cache: SimpleNamespace(logits=logits[None, : ids.shape[1]])


def test_distance_agrees_with_float64_over_several_windows() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 130, 11, generator=generator, dtype=torch.float64) * 3
    window = torch.randint(0, 11, (130,), generator=generator).tolist()
    got = distance(fake_model(q), [window, window], [p, p])
    p, q = torch.log_softmax(p, 1), torch.log_softmax(q.float().double(), 1)
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
    loss = torch.nn.functional.nll_loss(q[:-1], torch.tensor(window[1:]))
    assert got.kl == pytest.approx(float(kl.mean()), rel=1e-6)
    assert got.kl_p99 == pytest.approx(float(torch.cat([kl, kl]).quantile(0.99)), rel=1e-6)
    assert got.perplexity == pytest.approx(float(loss.exp()), rel=1e-6)
    assert got.top1 == float((p.argmax(1) == q.argmax(1)).double().mean())
    assert got.num_tokens == 260


def test_stored_logits_are_the_models() -> None:
    logits = torch.randn(9, 5)
    with contextlib.closing(StoredLogits(fake_model(logits), [[0] * 9, [0] * 4])) as stored:
        assert [len(part) for part in stored] == [9, 4]
        assert torch.equal(stored[1], logits[:4])


def test_formats_are_told_by_name() -> None:
    assert Variant.parse("INT4:64") == Variant("int4", 64)
    assert Variant.parse("int8").label == "int8 channel"
    assert Variant.parse("bf16").calibrated() is None
    if RUNS_GGUF:
        assert Variant.parse("q4_k:ggml").calibrated() == Variant(
            "Q4_K", by="ggml", is_calibrated=True
        )
    for wrong, why in (
        ("int5", "must be one of"),
        ("int4:48", "groups of"),
        ("int4:x", "groups of"),
    ):
        with pytest.raises(ValueError, match=why):
            Variant.parse(wrong)


def test_all_variants_hold_every_packed_format_and_group() -> None:
    have = {(v.format, v.group_size) for v in all_variants(False)}
    assert {(f.name, g) for f in PANELS.values() if f.is_integer for g in f.group_sizes} < have


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, dict[str, float]]:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--json"])
    out = capsys.readouterr()
    assert ended.value.code == 0, out.err
    return {row["label"]: row for row in json.loads(out.out)["rows"]}


def test_eval_reports_every_format(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_text(tmp_path / "other.txt", 2)
    formats = ["-f", "int8", "-f", "int4:32", *(["-f", "Q8_0", "-f", "Q6_K"] if RUNS_GGUF else [])]
    rows = run_json(
        capsys,
        "eval",
        source,
        "--text",
        text,
        *formats,
        "--calibrate",
        other,
        "--tokens",
        512,
        "--calibrate-tokens",
        512,
    )
    assert rows["float"]["kl"] == 0
    assert rows["float"]["top1"] == 1
    assert 0 < rows["int8 channel"]["kl"] < rows["int4 g32"]["kl"]
    assert rows["int4 g32"]["perplexity"] > 1
    assert rows["int4 g32"]["kl_p99"] > rows["int4 g32"]["kl"]
    assert rows["int4 g32, calibrated"]["kl"] != rows["int4 g32"]["kl"]
    if RUNS_GGUF:  # Q6_K: rows padded to 256
        assert 0 < rows["Q8_0"]["kl"] < rows["Q6_K"]["kl"] < rows["int4 g32"]["kl"]
        assert rows["Q6_K"]["bits_per_weight"] == pytest.approx(6.5625)


def test_eval_takes_recipes(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, mixed = tmp_path / "same.txt", tmp_path / "mixed.txt"
    same.write_text("ffn_(gate|up|down) = int8")
    mixed.write_text("blk.0 = int8\nblk = nl3")
    formats = [option for name in ("int8", same, mixed) for option in ("-f", name)]
    rows = run_json(capsys, "eval", source, "--text", text, *formats, "--tokens", 256)
    assert rows[str(same)]["kl"] == rows["int8 channel"]["kl"] < rows[str(mixed)]["kl"]
    assert rows[str(same)]["bits_per_weight"] > rows[str(mixed)]["bits_per_weight"] > 5


def test_convert_chooses_a_recipe_for_bits(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["convert", "-i", source, "--calibrate", text, "--calibrate-tokens", 256, "--json"]
    output, saved = tmp_path / "out", tmp_path / "recipe.txt"
    auto = ["-o", output, "--recipe", "auto", "--bits", 8.1, "--save-recipe", saved]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, options), *map(str, auto)])
    out = capsys.readouterr()
    assert ended.value.code == 0, out.err
    found = json.loads(out.out)
    chosen, recipe = found["recipe"], Recipe.read(saved)
    assert chosen["bits_per_weight"] <= 8.1
    assert found["bits_per_weight"] == pytest.approx(chosen["bits_per_weight"], rel=1e-6)
    assert chosen["loss"] > 0
    for layer, spec in packed.read_config(output).specs.items():
        assert str(recipe.coding(f"blk.{layer}.ffn_up_exps")) == spec.weight_format


def test_an_importance_matrix_is_that_of_the_models_own_inputs(
    source: Path, text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "imatrix.gguf"
    command = ["imatrix", source, "--text", text, "-o", file, "--tokens", 512]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, command)])
    assert ended.value.code == 0
    found = read_imatrix(file)
    assert found.dataset == text.name
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(source)(text.read_text())["input_ids"]
    modules = dict(find_experts(model))
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: (args[0], args[1])})
        )
    with torch.no_grad():
        model(torch.tensor(windows(ids, 2, 256)), use_cache=False)
    for layer, (hidden, chosen) in enumerate(seen.values()):
        entry = found.entries[f"blk.{layer}.ffn_up_exps.weight"]
        for expert, (squares, count) in enumerate(
            zip(entry.mean_squares, entry.counts, strict=True)
        ):
            rows = hidden[(chosen == expert).any(-1)].double()
            assert count == len(rows)
            if len(rows):
                wanted = rows.square().mean(0).numpy()
                np.testing.assert_allclose(squares, wanted, rtol=1e-3, atol=1e-6)
    assert convert(source, tmp_path / "out", imatrix=file).weight_format == "nl4"


class Library:
    """A llama.cpp that notes the importance that it is given."""

    def __init__(self) -> None:
        self.given: list[np.ndarray] = []

    def quantise(self, type: str, w: np.ndarray, importance: np.ndarray) -> np.ndarray:
        assert importance.shape == (w.shape[1],)
        self.given.append(importance)
        return rows_alike(w, type)


@pytest.mark.skipif(not RUNS_GGUF, reason="LLAMAFILE does not run here")
def test_llama_cpps_types_are_rounded_by_a_file_and_measured_on_each_text(
    source: Path, text: Path, tmp_path: Path
) -> None:
    file, imatrix = tmp_path / "imatrix.gguf", record(source, Calibration(text, 256))
    write_imatrix(file, imatrix)
    library, variant = Library(), Variant("Q6_K", by="ggml", is_calibrated=True)
    floats, rows = evaluate_texts(
        source,
        [[[3, 4, 5, 6]], [[7, 8, 9]]],
        [variant],
        ggml=library,
        importance=ImportanceFile(file),
    )
    assert [row.distance.num_tokens for row in rows] == [4, 3]
    for row, before in zip(rows, floats, strict=True):
        assert row.label == "Q6_K, llama.cpp, imatrix"
        assert row.distance.kl > before.distance.kl
    seen = np.array([given[0] / given[1] for given in library.given])
    for entry in imatrix.entries.values():
        for squares, count in zip(entry.mean_squares, entry.counts, strict=True):
            assert not count or np.isclose(seen, squares[0] / squares[1], rtol=1e-4).any()


def test_eval_of_a_converted_directory_is_that_of_its_format(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "int8"
    convert(source, done, quant_method="int8")
    rows = run_json(
        capsys, "eval", source, "--text", text, "-f", "int8", "-f", done, "--tokens", 256
    )
    assert rows[str(done)]["kl"] == pytest.approx(rows["int8 channel"]["kl"], rel=1e-6)


def test_eval_rotates_what_it_packs_and_says_so(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "int4"
    convert(source, done, quant_method="int4", rotation=64)
    arguments = ("eval", source, "--text", text, "--tokens", 256, "-f", "int4")
    plain = run_json(capsys, *arguments)["int4 g32"]
    rows = run_json(capsys, *arguments, "-f", done, "--rotation", 64)
    rotated = rows["int4 g32"]
    assert rows[str(done)]["kl"] == pytest.approx(rotated["kl"], rel=1e-6)
    assert rotated["kl"] != plain["kl"]
    assert (plain["rotation"], rotated["rotation"], rows[str(done)]["rotation"]) == (0, 64, 64)
    assert rows["float"]["rotation"] == 0


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--calibrate", "TEXT"], "is the text that is measured on"),
        (["-f", "int3"], "must be one of"),
        (["--plot", "x.pdf"], "must end in .png or .svg"),
        (["--ggml", "."], "libggml-base.so"),
        (["-f", "int8", "--rotation", "32"], "rotation=32: the width must be 0, 64 or 256"),
        (["-f", "int8", "-f", "bf16", "--rotation", "64"], "rotation=64: bf16 takes 0"),
    ],
)
def test_eval_refuses_with_the_reason(
    source: Path, text: Path, arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "eval",
                str(source),
                "--text",
                str(text),
                *(a.replace("TEXT", str(text)) for a in arguments),
            ]
        )
    assert ended.value.code == 1
    assert why in " ".join(capsys.readouterr().err.split())


def test_eval_draws(source: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "accuracy.svg"
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "eval",
                str(source),
                "--text",
                str(text),
                "-f",
                "int8",
                "--tokens",
                "256",
                "--plot",
                str(plot),
            ]
        )
    assert ended.value.code == 0
    assert "KL divergence" in plot.read_text() or "<svg" in plot.read_text()


def test_each_layer_sees_what_the_layers_before_it_returned(source: Path) -> None:
    model = make_model(source.name, **CHANGES[source.name])
    seen: dict[int, np.ndarray] = {}

    def on_layer(layer: int, inputs) -> np.ndarray:
        seen[layer] = inputs.hidden.copy()
        return np.full_like(inputs.hidden, output)

    found = []
    for output in (0.0, 1.0):  # noqa: B007  # on_layer reads it
        run_layers(model, torch.full((2, 8), 5), on_layer)
        found.append(dict(seen))
    assert sorted(found[0]) == [0, 1]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert not np.allclose(found[0][1], found[1][1])
    assert all("_ktk_on_layer" not in m.__dict__ for _, m in find_experts(model))


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("ktk-experts-*"))}


def test_convert_calibrated_is_resumed_to_the_same_bytes(
    source: Path, text: Path, tmp_path: Path
) -> None:
    calibration = Calibration(text, 512)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    convert(source, whole, calibration=calibration, threads=1)
    convert(source, cut, calibration=calibration, threads=3)
    assert file_bytes(whole) == file_bytes(cut)
    first, last = sorted(cut.glob("ktk-experts-*"))
    for lost in (last, first):
        lost.unlink()
        summary = convert(source, cut, calibration=calibration, resume=True)
        assert summary.reused_layers == 1
        assert file_bytes(whole) == file_bytes(cut)
    plain = tmp_path / "plain"
    convert(source, plain)
    assert file_bytes(plain) != file_bytes(whole)
    assert {p.stat().st_size for p in plain.glob("ktk-e*")} == {
        p.stat().st_size for p in whole.glob("ktk-e*")
    }
    said = json.loads((whole / "config.json").read_text())["quantization_config"]["calibration"]
    assert said == calibration.provenance()
    packed.read_config(whole)
    with pytest.raises(ValueError, match="calibration"):
        convert(source, cut, resume=True)


@pytest.mark.skipif(not RUNS_GGUF, reason=str(backends.backends()["LLAMAFILE"].why_not()))
def test_convert_calibrated_writes_gguf_files(source: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "experts.gguf"
    summary = convert(source, file, quant_method="q4_0", calibration=Calibration(text, 512))
    assert any(note.startswith("calibrated") for note in summary.notes)
    assert "Q4_0" in repr(load_gguf(file)[1])
    plain = tmp_path / "plain.gguf"
    convert(source, plain, quant_method="q4_0")
    assert plain.stat().st_size == file.stat().st_size
    assert plain.read_bytes() != file.read_bytes()


def test_convert_says_what_cannot_be_calibrated(source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bf16 rounds nothing"):
        convert(source, tmp_path / "a", quant_method="bf16", calibration=Calibration(text))
    with pytest.raises(ValueError, match="is GGUF; it needs a Hugging Face directory"):
        convert(tmp_path / "model.gguf", tmp_path / "a", calibration=Calibration(text))
    short = write_text(tmp_path / "short.txt", 3, 100)
    with pytest.raises(ValueError, match="has 100 tokens"):
        convert(source, tmp_path / "b", calibration=Calibration(short))


def test_a_quantised_source_is_calibrated_as_its_float_twin(
    source: Path, text: Path, tmp_path: Path
) -> None:
    fp8, twin = tmp_path / "fp8", tmp_path / "twin"
    if source.name != "qwen3_moe":
        pytest.skip("fused experts have no matrix each to make fp8 of")
    make_model("qwen3_moe", **CHANGES["qwen3_moe"]).to(torch.bfloat16).save_pretrained(fp8)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, fp8)
    to_fp8(fp8)
    shutil.copytree(fp8, twin)
    with Checkpoint.open(fp8) as checkpoint:
        tensors = {}
        for name in checkpoint.tensors:
            if name.endswith("_scale_inv"):
                continue
            values = checkpoint.read(name)
            scale = f"{name}_scale_inv"
            if scale in checkpoint.tensors:
                values = (
                    as_values(values, "e4m3")
                    * np.repeat(np.repeat(checkpoint.read(scale), 128, 0), 128, 1)[
                        : len(values), : values.shape[1]
                    ]
                )
                if ".experts." not in name:  # as converters write them
                    values = f32_to_bf16(values)
            tensors[name] = values
    write_safetensors(twin / "model.safetensors", tensors)
    plain = json.loads((fp8 / "config.json").read_text())
    del plain["quantization_config"]
    (twin / "config.json").write_text(json.dumps(plain))
    for path in (fp8, twin):
        convert(path, tmp_path / f"{path.name}-out", calibration=Calibration(text, 512))
    layers = sorted(path.name for path in (tmp_path / "fp8-out").glob("ktk-experts-*"))
    assert layers
    for name in layers:
        outputs = (tmp_path / f"{path.name}-out" for path in (fp8, twin))
        got, wanted = (packed.read_layer(output, int(name[12:17])) for output in outputs)
        np.testing.assert_array_equal(got.data, wanted.data)


def row(label: str, bits: float, kl: float) -> Row:
    return Row(label, "avx2", bits, 128, Distance(kl, kl, 0.9, 20.0, 256), 1.0)


def test_the_frontier_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw([row("float", 16, 0), row("a", 4.5, 0.1), row("b", 3.5, 0.3)], tmp_path / "f.svg")
    assert "ktk's frontier" in (tmp_path / "f.svg").read_text()


def test_the_frontier_is_that_of_rows_read_again(tmp_path: Path) -> None:
    own = [row("a", 4.5, 0.1), row("b", 3.5, 0.3), row("c", 4.0, 0.4), row("d", 4.5, 0.2)]
    theirs = [row("Q4_K, llama.cpp, imatrix", 3.4, 0.01), row("float", 16, 0)]
    assert [r.label for r in frontier([*own, *theirs])] == ["b", "a"]
    lines, whole = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text("\n".join(json.dumps(r.to_json()) for r in own))
    whole.write_text(json.dumps({"model": "m", "rows": [r.to_json() for r in theirs]}))
    rows = read_rows([lines, whole])
    assert sorted(rows, key=lambda r: r.label) == sorted([*own, *theirs], key=lambda r: r.label)
    for text in ("no rows", '{"rows": [{"label": "x"}]}', "3"):
        whole.write_text(text)
        with pytest.raises(ValueError, match="holds no rows"):
            read_rows([whole])


def test_wrong_texts_and_plots_are_refused_before_any_work(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Zwölf".encode("latin-1"))
    output = tmp_path / "packed"
    model = str(tmp_path / "no-model")  # which none of these gets to
    for arguments, says in (
        (["eval", model, "--text", str(latin)], f"{latin}: byte 2 is not UTF-8"),
        (["eval", model, "--text", str(tmp_path)], "Is a directory"),
        (["eval", model, "--text", str(text), "--calibrate", "no.txt"], "no.txt: No such file"),
        (
            ["eval", model, "--text", str(text), "--plot", str(tmp_path / "no" / "x.png")],
            "must be a directory",
        ),
        (
            ["convert", "--input-path", model, "--output", str(output), "--calibrate", str(latin)],
            "byte 2 is not UTF-8",
        ),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        error = capsys.readouterr().err
        assert ended.value.code == 1 and says in error and error.count("\n") == 1, error
    assert not output.exists()
