"""Models with towers, opened for text: the same tokens as the whole model,
without the towers' weights.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", minversion="5")

import torch

from ktk.cli import main
from ktk.convert.run import convert
from ktk.evaluate.run import load_float
from ktk.generate.batching import BatchingEngine
from ktk.generate.engine import Limits
from ktk.generate.open import open_model
from ktk.generate.sampling import Sampler, Sampling
from ktk.generate.sequential import SequentialEngine
from ktk.generate.session import Session
from ktk.generate.trial import start_engine
from ktk.integration.transformers import linear, load_model
from ktk.integration.transformers.calibration import Calibration
from ktk.integration.transformers.decoder_layers import fuse_decoder_layers
from ktk.integration.transformers.multimodal import LeftOut, run_on_text, towers
from ktk.integration.transformers.sequence import PREFILL_CHUNK
from make.fp8_directory import to_fp8
from make.multimodal_cases import WRAPPERS, make_wrapper

PROMPT = "The experts of a mixture are most of its weights, of which a token uses a few."
LONG = PROMPT * 25  # is read in two chunks
STEPS = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """kind -> its directory, made once."""
    directories: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in directories:
            directories[kind] = make_wrapper(kind, tmp_path_factory.mktemp("wrappers") / kind)
        return directories[kind]

    return make


def generated(session: Session, ids: list[int], steps: int = STEPS) -> list[int]:
    sampler = Sampler(Sampling(temperature=0.0))
    session.generate_tokens(ids, sampler, steps, lambda _: False)
    return [token.id for token in sampler.tokens]


def greedy(opened: Any, text: str = PROMPT) -> list[int]:
    return generated(Session(opened.model, opened.tokenizer), opened.tokenizer(text)["input_ids"])


def of_the_whole_model(directory: Path, ids: list[int]) -> list[int]:
    """Greedy tokens by transformers alone."""
    from transformers import AutoModelForMultimodalLM

    model = AutoModelForMultimodalLM.from_pretrained(directory).eval()
    model.generation_config.eos_token_id = None
    tokens = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=STEPS,
        do_sample=False,
        pad_token_id=0,
    )
    return tokens[0, len(ids) :].tolist()


@pytest.mark.parametrize("kind", WRAPPERS)
def test_text_is_that_of_the_whole_model_and_memory_that_of_what_is_loaded(
    kind: str, made: Any
) -> None:
    opened = open_model(made(kind), weight_format="fp32")
    for text in (PROMPT, LONG):
        ids = opened.tokenizer(text)["input_ids"]
        assert greedy(opened, text) == of_the_whole_model(made(kind), ids)
    assert len(ids) > PREFILL_CHUNK
    held = sum(t.numel() * t.element_size() for t in opened.model.state_dict().values())
    assert opened.description.rest_bytes == held
    assert not towers(opened.model)
    assert Session(opened.model, opened.tokenizer).max_context == 1024


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_packed_directory_says_what_it_was_packed_of(
    kind: str, made: Any, tmp_path: Path
) -> None:
    convert(made(kind), tmp_path / "packed", quant_method="int8")
    packed = open_model(tmp_path / "packed")
    assert greedy(packed) == greedy(open_model(made(kind), weight_format="int8"))
    assert packed.description.kind == "packed" and not towers(packed.model)


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "glm4v_moe", "llava"])
def test_decoder_layers_are_decoded_in_one_call(
    kind: str, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "SMALLEST", 1)
    opened = open_model(made(kind), weight_format="fp32", linear="none")
    linear.replace_linears(opened.model, "fp32")
    fuse_decoder_layers(opened.model)
    layers = [m for m in opened.model.modules() if hasattr(m, "self_attn")]
    tokens = greedy(opened)
    assert all(layer.forward.calls and layer.forward.reason is None for layer in layers)
    for layer in layers:
        layer.forward = layer.forward.own_forward
    assert greedy(opened) == tokens


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_prompt_that_shares_a_beginning_continues_from_the_cache(kind: str, made: Any) -> None:
    """Positions of three axes count on from what is kept."""
    opened = open_model(made(kind), weight_format="fp32")
    ids = opened.tokenizer(PROMPT)["input_ids"]
    session = Session(opened.model, opened.tokenizer)
    first = generated(session, ids)
    assert generated(session, [*ids, *first[:6], 77]) == generated(
        Session(opened.model, opened.tokenizer), [*ids, *first[:6], 77]
    )


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "glm4v_moe"])
def test_requests_are_batched(kind: str, made: Any) -> None:
    engine = start_engine(open_model(made(kind)), Limits(context=256))
    reason = engine.why_alone
    engine.stop()
    assert isinstance(engine, BatchingEngine) and reason is None


def test_linear_attention_is_served_one_by_one(made: Any) -> None:
    engine = start_engine(open_model(made("qwen3_5_moe")), Limits(context=256))
    reason = engine.why_alone
    engine.stop()
    assert isinstance(engine, SequentialEngine)
    assert reason is not None and "linear_attention" in reason


@pytest.mark.parametrize("kind", ["llava", "qwen3_5_moe"])
def test_a_quantised_checkpoint_says_what_its_conversion_says(kind: str, tmp_path: Path) -> None:
    make_wrapper(kind, tmp_path / "in", "bfloat16")
    to_fp8(tmp_path / "in")
    opened = open_model(tmp_path / "in")
    assert opened.description.kind == "quantised" and not towers(opened.model)
    convert(tmp_path / "in", tmp_path / "out")  # fp8 codes stay
    assert greedy(opened) == greedy(open_model(tmp_path / "out"))


def test_calibration_runs_the_language_model(made: Any, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(PROMPT * 80)
    convert(
        made("glm4v_moe"), tmp_path / "out", quant_method="int4", calibration=Calibration(text, 256)
    )
    assert greedy(open_model(tmp_path / "out"))


def test_the_float_reference_is_the_whole_model(made: Any) -> None:
    assert type(load_float(made("qwen3_vl_moe"))).__name__ == "Qwen3VLMoeForConditionalGeneration"


def test_load_model_keeps_towers_and_saves_them(made: Any, tmp_path: Path) -> None:
    whole = load_model(made("qwen3_vl_moe"))
    assert list(towers(whole)) == ["model.visual"]
    whole.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert torch.equal(again.model.visual.pos_embed.weight, whole.model.visual.pos_embed.weight)
    opened = open_model(made("qwen3_vl_moe")).model
    assert isinstance(opened.model.visual, LeftOut)
    with pytest.raises(ValueError, match=r"model\.visual was left out"):
        opened.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="opened for text, without its towers"):
        opened.model.visual(torch.ones(1))


def ktk(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(arguments))
        except SystemExit as ended:
            code = ended.code
    return int(code or 0), out.getvalue(), err.getvalue()


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "glm4v_moe"])
def test_doctor_says_fits_and_run_answers(kind: str, made: Any) -> None:
    code, said, _ = ktk("doctor", str(made(kind)))
    assert code == 0 and "fits" in said
    code, answer, errors = ktk("run", str(made(kind)), "Why?", "-n", "5")
    assert code == 0 and answer.strip(), errors


def test_eval_measures_formats_and_a_packed_directory(made: Any, tmp_path: Path) -> None:
    convert(made("qwen3_vl_moe"), tmp_path / "packed", quant_method="int8")
    (tmp_path / "text").write_text(PROMPT * 40)
    code, said, errors = ktk(
        "eval",
        str(made("qwen3_vl_moe")),
        "--text",
        str(tmp_path / "text"),
        "--tokens",
        "256",
        "-f",
        "int8",
        "-f",
        str(tmp_path / "packed"),
        "--json",
    )
    assert code == 0, errors
    of_int8, of_packed = (row["kl"] for row in json.loads(said)["rows"][1:])
    assert 0 < of_int8 == of_packed


REFUSED = {
    "openai_privacy_filter": "no class that makes text with model_type 'openai_privacy_filter'",
    "qwen3_omni_moe": "Qwen3OmniMoeForConditionalGeneration generates in a way of its own",
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion generates in a way of its own",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_makes_no_text_token_by_token_is_refused(kind: str, tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    assert REFUSED[kind] in (run_on_text(tmp_path, {"model_type": kind})[0] or "")


def test_run_says_what_doctor_says_in_one_line(made: Any, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    for file in made("qwen3_vl_moe").iterdir():
        (directory / file.name).symlink_to(file)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").unlink()
    config["model_type"] = "openai_privacy_filter"
    (directory / "config.json").write_text(json.dumps(config))
    code, said, _ = ktk("doctor", str(directory), "--json")
    reason = json.loads(said)["reason"]
    assert code == 1 and "no class that makes text" in reason
    for command in (("run", str(directory), "Why?"), ("serve", str(directory), "--port", "0")):
        code, _, errors = ktk(*command)
        assert code == 1 and errors.count("\n") == 1 and reason in errors
