"""A leading ~ is the home directory at every door: of the Python API, and of the command line,
where no shell expanded it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ktk
from ktk import backends
from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.checkpoint.packed import layer_path, list_layers, read_config, read_layer
from ktk.checkpoint.safetensors import Checkpoint
from ktk.cli import main
from ktk.cli.chat import Chat
from ktk.convert.run import convert
from ktk.demo.run import Options
from ktk.evaluate.variants import Variant
from ktk.generate.describe import describe_model
from ktk.generate.open import open_model
from ktk.integration.kt_kernel.sglang_arguments import checked_arguments
from ktk.integration.transformers import KtkConfig
from ktk.integration.transformers.gguf import load_gguf_model
from ktk.integration.transformers.gguf_tokenizer import load_gguf_tokenizer
from ktk.integration.transformers.loading import load_model
from ktk.integration.transformers.tokens import load_tokenizer
from ktk.kv.prefix.config import StoreConfig
from ktk.kv.prefix.store import PrefixStore
from ktk.ops.gguf_model import load_gguf
from ktk.paths import user_path
from ktk.placement.masks.files import (
    read_masks,
    read_masks_or_statistics,
    read_statistics,
    recorder_directory,
    write_masks,
    write_statistics,
)
from ktk.placement.masks.grid import ExpertGrid
from ktk.placement.masks.recorder import ExpertRecorder
from ktk.placement.residency.synthetic import Synthetic, synthetic_trace
from ktk.placement.residency.trace import read_trace
from ktk.quantise.ggml_library import GgmlLibrary
from ktk.quantise.texts import read_text
from ktk.train import add_expert_lora, save_expert_lora
from ktk.train.adapter import read_adapter
from ktk.train.data import read_examples
from make import whole_models, wrapper_cases


@pytest.fixture(scope="module")
def model_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home directory with a model in three forms."""
    home = tmp_path_factory.mktemp("home")
    whole_models.write(home / "hf", "qwen3moe")
    convert(home / "hf", home / "packed", quant_method="int8")
    convert(home / "hf", home / "m.gguf", quant_method="q8_0", whole="q8_0")
    (home / "text.txt").write_text("text")
    return home


@pytest.fixture
def home(model_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That home, and another working directory, in which nothing called ~ may appear."""
    monkeypatch.setenv("HOME", str(model_home))
    monkeypatch.chdir(tmp_path)
    return model_home


def converted(output: str, **options: Any) -> None:
    path = user_path(output)
    convert("~/hf", output, **options)
    assert path.exists()
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def saved(home_path: str) -> None:
    model = load_model("~/packed")
    model.save_pretrained(home_path)
    assert (user_path(home_path) / "config.json").exists()
    assert list_layers(home_path) == (0, 1, 2)


def wrapper_reads() -> None:
    shape = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_size": 256,
        "moe_intermediate_size": 256,
    }
    wrapper = wrapper_cases.make(1, weight_path="~/packed", **shape)
    wrapper.load_weights()
    assert wrapper.moe is not None


def wrapper_saves() -> None:
    wrapper_cases.loaded(5, weight_path="~/layers", cpu_save=True)
    assert layer_path("~/layers", 5).is_file()


def chat_saves() -> None:
    chat = Chat.__new__(Chat)
    chat.messages = []
    chat._save("~/messages.json")
    assert (Path.home() / "messages.json").is_file()


def masks_and_statistics() -> None:
    masks = np.eye(2, dtype=np.bool_)
    write_masks(Path("~/masks.pt"), masks)
    assert (Path.home() / "masks.pt").is_file()
    assert (read_masks(Path("~/masks.pt")) == masks).all()
    assert (read_masks_or_statistics(Path("~/masks.pt")) == masks).all()
    write_statistics(Path("~/counts.pt"), np.ones((1, 2, 2), np.int64))
    assert (read_statistics(Path("~/counts.pt")) == 1).all()


def recorder_dumps(directory: Path) -> None:
    recorder = ExpertRecorder(ExpertGrid(1, 2, (0,)), 1)
    recorder.start()
    recorder.begin_pass()
    recorder.note(0, np.array([[1]]))
    recorder.end_pass()
    assert recorder.dump(directory).parent == Path.home() / "recorded"


def of_environment() -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", "~/recorded")
        return recorder_directory()


def trace_is_kept() -> None:
    made = synthetic_trace(Synthetic(num_layers=2, num_experts=4, top_k=1, num_tokens=3))
    made.save(Path("~/trace"))
    assert read_trace(Path("~/trace")).num_layers == 2


def store_is_kept() -> None:
    config = StoreConfig(path="~/pages", memory_pool_size=1 << 20)
    PrefixStore(config).close()
    assert (Path.home() / "pages").is_dir()


def adapter_is_kept() -> None:
    model = load_model("~/packed")
    add_expert_lora(model, r=1)
    save_expert_lora(model, "~/adapter")
    assert read_adapter("~/adapter").path == Path.home() / "adapter"


def examples_are_read() -> None:
    (Path.home() / "data.jsonl").write_text('{"text": "experts"}\n')
    assert read_examples("~/data.jsonl", load_tokenizer(Path.home() / "hf"), 64)


def command(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code


DOORS: dict[str, Callable[[], object]] = {
    "Checkpoint.open": lambda: Checkpoint.open("~/hf").close(),
    "GgufCheckpoint.open": lambda: GgufCheckpoint.open("~/m.gguf"),
    "read_config": lambda: read_config("~/packed"),
    "read_layer": lambda: read_layer("~/packed", 0),
    "MoE.load": lambda: ktk.MoE.load("~/packed", 0),
    "load_gguf": lambda: load_gguf("~/m.gguf"),
    "load_model": lambda: load_model("~/hf"),
    "load_model packed": lambda: load_model("~/packed"),
    "load_model gguf=": lambda: load_model("~/hf", gguf="~/m.gguf"),
    "KtkConfig": lambda: KtkConfig(gguf="~/m.gguf").gguf == str(Path.home() / "m.gguf") or 1 / 0,
    "load_gguf_model": lambda: load_gguf_model("~/m.gguf"),
    "load_gguf_tokenizer": lambda: load_gguf_tokenizer("~/m.gguf"),
    "describe_model": lambda: describe_model("~/hf"),
    "open_model": lambda: open_model("~/packed"),
    "open_model gguf": lambda: open_model("~/m.gguf"),
    "convert": lambda: converted("~/new/out"),
    "convert to GGUF": lambda: converted("~/new.gguf", quant_method="q8_0"),
    "save_pretrained": lambda: saved("~/saved"),
    "KTMoEWrapper": wrapper_reads,
    "KTMoEWrapper cpu_save": wrapper_saves,
    "read_text": lambda: read_text(Path("~/text.txt")),
    "Variant.parse": lambda: Variant.parse("~/packed").by == str(Path.home() / "packed") or 1 / 0,
    "Options": lambda: (
        Options(Path("~/hf"), "auto", None, Path("~/work"), 1).work_dir == Path.home() / "work"
        or 1 / 0
    ),
    "chat /save": chat_saves,
    "masks and statistics": masks_and_statistics,
    "recorder": lambda: recorder_dumps(Path("~/recorded")),
    "recorder of the environment": lambda: recorder_dumps(of_environment()),
    "trace": trace_is_kept,
    "PrefixStore": store_is_kept,
    "adapter": adapter_is_kept,
    "examples": examples_are_read,
    "ktk sglang": lambda: checked_arguments(
        ["--kt-weight-path", "~/packed", "--kt-threadpool-count", "1"]
    ),
    "ktk doctor": lambda: command("doctor", "~/hf"),
    "ktk run": lambda: command("run", "~/m.gguf", "hello", "-n", "1"),
    "ktk convert": lambda: command("convert", "--input-path=~/hf", "--output=~/cli-out"),
}
RUN_FILES = {"load_gguf_model", "load_model gguf=", "open_model gguf", "ktk run"}


@pytest.mark.parametrize("door", DOORS)
def test_a_leading_tilde_is_home(door: str, home: Path) -> None:
    if door in RUN_FILES and (reason := backends.backends()["LLAMAFILE"].why_not()):
        pytest.skip(f"LLAMAFILE: {reason}")
    DOORS[door]()
    assert os.listdir() == []


@pytest.mark.parametrize(
    "door",
    [
        lambda path: load_model(path),
        lambda path: describe_model(path),
        lambda path: load_gguf(path),
        lambda path: convert(path, "out"),
        lambda path: convert("~/hf", path),
        lambda path: wrapper_cases.make(0, weight_path=path),
        lambda path: KtkConfig(gguf=path),
        lambda path: GgmlLibrary(Path(path)),
    ],
)
def test_the_home_of_nobody_is_refused_and_nothing_is_made(
    door: Callable[[str], object], home: Path
) -> None:
    with pytest.raises(ValueError, match="~nobody-here is no user's home directory: must be ~"):
        door("~nobody-here/x")
    assert os.listdir() == []


def test_only_a_leading_tilde_is_home(home: Path) -> None:
    for given in ("a~b", "./~", "x/~/y", "/~"):
        assert user_path(given) == Path(given)
    assert user_path("~") == home and user_path(Path("~/x")) == home / "x"
    Path("~lock").write_text("")
    assert user_path("~lock") == Path("~lock")  # it is there, whoever called it so


def test_a_command_that_names_a_text_by_tilde_reads_it(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "latin").write_bytes(b"\xff")
    with pytest.raises(SystemExit):
        main(["eval", "~/hf", "--text=~/latin"])
    assert f"{home}/latin" in capsys.readouterr().err.replace("\n", "")


def test_the_description_names_the_path_in_full(home: Path) -> None:
    assert describe_model("~/hf").path == str(home / "hf")
    assert json.loads(json.dumps(describe_model("~/m.gguf").to_json()))["path"] == f"{home}/m.gguf"
