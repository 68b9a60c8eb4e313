"""`ktk run`, `ktk chat` and `ktk doctor MODEL`, and what they are made of."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktk.cli import main
from make.command_line import ktk
from make.forked import Child, forked
from make.serving import make_model

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("run") / "tiny-moe")


@pytest.fixture(scope="module")
def opened(model: Path) -> Any:
    from ktk.generate.open import open_model

    return open_model(model)


# --- text from tokens -----------------------------------------------------------------------------


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode(errors="replace")


def test_text_comes_in_whole_characters() -> None:
    from ktk.generate.text import Detokenizer

    text = "Zwölf 東京 𝛼!"
    made = Detokenizer(Bytes())
    pieces = [made.add(byte) for byte in text.encode()] + [made.finish()]
    assert "".join(pieces) == text
    assert all(len(p) <= 1 for p in pieces)
    cut = Detokenizer(Bytes())
    assert "".join([cut.add(b) for b in "a東".encode()[:3]]) == "a"
    assert cut.finish() == "�"


@pytest.mark.parametrize(
    ("stops", "text", "want", "found"),
    [
        (["END"], "abcENDdef", "abc", True),
        (["END"], "abcEN", "abcEN", False),
        (["aab"], "aaab", "a", True),
        (["bc", "abcd"], "xabcd", "xa", True),
        (["x"], "xyz", "", True),
        ([], "abc", "abc", False),
    ],
)
def test_stop_strings_cut_whatever_the_pieces(
    stops: list[str], text: str, want: str, found: bool
) -> None:
    from ktk.generate.text import StopStrings

    for size in (1, 2, 3, len(text)):
        cutter = StopStrings(stops)
        got = ""
        for i in range(0, len(text), size):
            got += cutter.add(text[i : i + size])
            assert want.startswith(got)  # nothing is given that would have to be taken back
        assert got + cutter.finish() == want
        assert cutter.found == found


def test_a_sampler_follows_the_distribution_and_its_seed() -> None:
    import torch

    from ktk.generate.sampling import Sampler, Sampling

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])

    def draws(sampling: Sampling, count: int = 4000) -> torch.Tensor:
        sampler = Sampler(sampling)
        return (
            torch.bincount(
                torch.tensor([sampler.choose(logits) for _ in range(count)]), minlength=4
            )
            / count
        )

    for temperature in (1.0, 0.5):
        want = (logits / temperature).softmax(-1)
        assert (draws(Sampling(temperature, seed=3)) - want).abs().max() < 0.03
    assert draws(Sampling(1.0, top_k=2, seed=3))[2:].sum() == 0
    assert draws(Sampling(1.0, top_p=0.6, seed=3))[1:].sum() == 0
    assert draws(Sampling(0.0))[0] == 1
    assert torch.equal(draws(Sampling(1.0, seed=3), 50), draws(Sampling(1.0, seed=3), 50))
    assert not torch.equal(draws(Sampling(1.0), 200), draws(Sampling(1.0), 200))


# --- a session ------------------------------------------------------------------------------------


@contextlib.contextmanager
def forwarded(model: Any) -> Iterator[list[int]]:
    """How many tokens each forward pass inside the block got."""
    lengths: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        lengths.append(kwargs["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield lengths
    finally:
        hook.remove()


def test_a_second_turn_prefills_only_what_is_new(opened: Any) -> None:
    from ktk.generate.sampling import Sampling
    from ktk.generate.session import Session

    session = Session(opened.model, opened.tokenizer)
    prompt = list(range(5, 45))
    with forwarded(opened.model) as lengths:
        first = session.generate(prompt, Sampling(0.0), 6)
    assert lengths == [40, 1, 1, 1, 1, 1]
    assert (first.prefilled_tokens, first.generated_tokens) == (40, 6)
    answer = session._sequence.cached[40:]
    assert len(answer) == 5  # the last token has not been run
    longer = prompt + answer + [50, 51, 52]
    with forwarded(opened.model) as lengths:
        second = session.generate(longer, Sampling(0.0), 2)
    assert lengths == [3, 1]
    assert second.prefilled_tokens == 3
    changed = [*longer[:30], 60, 61, 62]  # an edited conversation: all up to the change is kept
    with forwarded(opened.model) as lengths:
        third = session.generate(changed, Sampling(0.0), 8)
    assert lengths[0] == 3
    fresh = Session(opened.model, opened.tokenizer).generate(changed, Sampling(0.0), 8)
    assert third.text == fresh.text and fresh.prefilled_tokens == 33


def test_a_long_prompt_is_read_in_chunks_behind_what_is_cached(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ktk.generate.sampling import Sampling
    from ktk.generate.session import Session
    from ktk.integration.transformers import sequence

    prompt = list(range(5, 45))
    longer = [*prompt, *range(50, 90)]
    whole = [
        Session(opened.model, opened.tokenizer).generate(ids, Sampling(0.0), 4)
        for ids in (prompt, longer)
    ]
    monkeypatch.setattr(sequence, "PREFILL_CHUNK", 16)
    session = Session(opened.model, opened.tokenizer)
    for ids, want, expected in zip(
        (prompt, longer), whole, ([16, 16, 8], [16, 16, 8]), strict=True
    ):
        with forwarded(opened.model) as lengths:
            got = session.generate(ids, Sampling(0.0), 4)
        assert lengths == [*expected, 1, 1, 1]
        assert got.text == want.text


def test_a_stopped_answer_leaves_a_usable_cache(opened: Any) -> None:
    from ktk.generate.sampling import Sampling
    from ktk.generate.session import Session

    session = Session(opened.model, opened.tokenizer)
    pieces: list[str] = []

    def show(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 5:
            session.stop()

    prompt = list(range(5, 25))
    made = session.generate(prompt, Sampling(0.0), 500, show=show)
    assert made.finish_reason == "interrupted"
    assert made.text == "".join(pieces) and made.generated_tokens < 20
    again = session.generate(prompt, Sampling(0.0), 12)
    fresh = Session(opened.model, opened.tokenizer).generate(prompt, Sampling(0.0), 12)
    assert again.text == fresh.text and again.prefilled_tokens == 1


def test_a_prompt_longer_than_the_context_is_refused(opened: Any) -> None:
    from ktk.generate.sampling import Sampling
    from ktk.generate.session import Session

    session = Session(opened.model, opened.tokenizer)
    with pytest.raises(ValueError, match=r"has 40000 tokens.*context is 32768"):
        session.generate([5] * 40000, Sampling())
    with pytest.raises(ValueError, match="empty"):
        session.generate([], Sampling())


# --- run ------------------------------------------------------------------------------------------


def test_run_prints_the_text_and_its_speed(model: Path) -> None:
    done = ktk("run", str(model), "Why?", "--max-tokens", "12", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 8
    assert "answer 12 tokens" in done.stderr and "tokens/s" in done.stderr
    found = json.loads(ktk("run", str(model), "-", "-n", "12", "--json", given="Why?").stdout)
    assert found["text"] + "\n" == done.stdout
    assert found["generated_tokens"] == 12 and found["finish_reason"] == "length"
    assert "int8" in found["kernel"]


def test_what_ended_an_answer_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short"
    shutil.copytree(model, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    for limit in ("0", "2048"):
        done = ktk("run", str(short), "The experts", "--raw", "-n", limit)
        assert "the context is full]" in done.stderr, done.stderr
    done = ktk("run", str(short), "The experts", "--raw", "-n", "9")
    assert (
        "answer 9 tokens" in done.stderr and "ended by --max-tokens (0: no limit)]" in done.stderr
    )
    done = ktk("chat", str(model), "-n", "9", given="Why?\n")
    assert "ended by --max-tokens" in done.stderr
    asked: list[int] = []

    def generate(self: Any, ids: Any, sampling: Any, max_tokens: int, *_: Any, **__: Any) -> Any:
        asked.append(max_tokens)
        return Generated("", 1, 1, 1, 1.0, 1.0, "stop")

    from ktk.generate.session import Generated, Session

    monkeypatch.setattr(Session, "generate", generate)
    done = ktk("run", str(short), "Why?")
    assert asked == [2048] and "ended" not in done.stderr and "full" not in done.stderr
    ktk("chat", str(short), given="Why?\n")
    assert asked == [2048, 2048]


def test_run_options_reach_the_generation(model: Path, opened: Any) -> None:
    def text(*options: str) -> str:
        done = ktk("run", str(model), "The experts", "--raw", "-n", "20", *options)
        assert done.returncode == 0, done.stderr
        return done.stdout[:-1]

    greedy = text()
    ids = opened.tokenizer("The experts", return_tensors="pt")
    made = opened.model.generate(**ids, max_new_tokens=20, do_sample=False)
    assert greedy == opened.tokenizer.decode(made[0, ids["input_ids"].shape[1] :])
    assert text("--stop", greedy[6:9]) == greedy[: greedy.index(greedy[6:9])]
    sampled = text("--temperature", "1", "--seed", "5")
    assert sampled == text("--temperature", "1", "--seed", "5") != greedy
    assert text("--temperature", "1", "--top-k", "1") == greedy


def test_mistakes_are_one_line(model: Path, tmp_path: Path) -> None:
    for arguments, says in (
        (("run", "/nowhere", "x"), "no such file or directory"),
        (("run", str(tmp_path), "x"), "config.json"),
        (("run", str(model), "x", "--method", "CUDA"), "unknown"),
        (("run", str(model), "x", "--weight-format", "int3"), "int3"),
        (("run", str(model), "x", "--dtype", "int8"), "bfloat16"),
    ):
        done = ktk(*arguments)
        assert done.returncode == 1, done
        assert done.stderr.startswith("ktk: error: ") and says in done.stderr
        assert "Traceback" not in done.stderr and done.stdout == ""


def test_what_is_wrong_with_a_directory_is_said_before_the_model_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def says(change: Any) -> str:
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(model, broken)
        change(broken)
        done = ktk("run", str(broken), "Why?", "-n", "1")
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    def without_tokenizer(directory: Path) -> None:
        for file in directory.glob("token*"):
            file.unlink()

    def of_another_kind(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "model_type": "frobnicate"}))

    monkeypatch.setattr("ktk.generate.open.load_model", lambda *_, **__: pytest.fail("loaded"))
    assert "has no tokenizer" in says(without_tokenizer)
    assert "tokenizer cannot be read" in says(lambda d: (d / "tokenizer.json").write_text("{}"))
    assert "has no config.json" in says(lambda d: (d / "config.json").unlink())
    assert "does not know model_type 'frobnicate'" in says(of_another_kind)
    assert "path is empty" in ktk("run", "", "Why?").stderr


def test_help_has_examples() -> None:
    for name in ("run", "chat", "serve", "doctor"):
        assert "Examples:" in ktk(name, "--help").stdout


def test_ctrl_c_ends_a_run_with_what_is_there_and_130(model: Path) -> None:
    with forked(main, ["run", str(model), "Why?"]) as child:
        child.until(lambda: len(child.out) >= 20)
        child.signal(signal.SIGINT)
        assert child.wait() == 130
        assert child.out.endswith("\n")
        assert "interrupted]" in child.err and "Traceback" not in child.err


# --- chat -----------------------------------------------------------------------------------------


def test_chat_remembers_and_obeys_its_commands(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    typed = (
        f"Why?\nAnd\\\nthen?\n/history\n/retry\n/info\n/help\n/nonsense\n/save {saved}\n/system "
        "Be brief.\n/system\n/history\n/clear\n/retry\n/quit\nnever\n"
    )
    done = ktk("chat", str(model), "-n", "5", given=typed)
    assert done.returncode == 0, done.stderr
    assert "user: Why?" in done.stdout and "user: And\nthen?" in done.stdout
    assert "run by" in done.stdout and "/retry" in done.stdout
    assert "/nonsense is unknown" in done.stderr
    assert "more from the cache" in done.stderr
    messages = json.loads(saved.read_text())
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert messages[2]["content"] == "And\nthen?"
    assert "system: Be brief." in done.stdout and "never" not in done.stdout
    assert "no question to answer again" in done.stderr


PROMPT = "\x1b[?2004h"  # prompt_toolkit begins to read


class Terminal:
    """A program at a pseudo-terminal, as a person has it."""

    def __init__(self) -> None:
        self._file, self._program_side = pty.openpty()  # held: without one, reading is an error
        self.path = os.ttyname(self._program_side)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def until(self, text: str, seconds: float = 90) -> None:
        """Read until ``text`` appears; what follows it stays for the next call."""
        end = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < end, f"no {text!r} in {self.text!r}"
            if select.select([self._file], [], [], 0.5)[0]:
                self.text += self._read()
        self.text = self.text.partition(text)[2]

    def _read(self) -> str:
        data = os.read(self._file, 65536)
        if b"\x1b[6n" in data:  # where is the cursor? a terminal answers
            self.type("\x1b[1;1R")
        return data.decode(errors="replace")

    def exit_code(self, child: Child, seconds: float = 30) -> int:
        end = time.monotonic() + seconds
        while child.exit_code is None:
            assert time.monotonic() < end, f"still there: {self.text[-500:]!r}"
            if select.select([self._file], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self._read()
        os.close(self._program_side)
        os.close(self._file)
        return child.exit_code


def test_ctrl_c_stops_an_answer_and_not_the_chat_and_ctrl_d_leaves(model: Path) -> None:
    terminal = Terminal()
    command = ["chat", str(model)]
    more = {"COLUMNS": "200", "TERM": "xterm"}
    with forked(main, command, environment=more, terminal=terminal.path) as child:
        terminal.until(PROMPT)
        terminal.type("Why?\r")
        terminal.until("Why?")
        time.sleep(1)  # some of 32,000 tokens
        terminal.type("\x03")
        terminal.until("interrupted]")
        terminal.until(PROMPT)
        terminal.type("\x03")  # at the prompt it drops the line
        terminal.until(PROMPT)
        terminal.type("/history\r")
        terminal.until("assistant: ")
        terminal.until(PROMPT)
        terminal.type("\x04")
        assert terminal.exit_code(child) == 0


# --- doctor MODEL ---------------------------------------------------------------------------------


def test_doctor_tells_what_a_model_is_and_needs(model: Path, opened: Any) -> None:
    done = ktk("doctor", str(model), "--json", "--context", "1000")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["kind"], found["weight_format"], found["fits"]) == ("float", "int8", True)
    assert (found["num_layers"], found["num_experts"], found["num_experts_per_tok"]) == (2, 8, 2)
    config = opened.model.config
    assert found["kv_bytes"] == 1000 * 2 * config.num_key_value_heads * config.head_dim * 4 * 2
    others = [p for n, p in opened.model.named_parameters() if ".experts." not in n]
    assert found["rest_bytes"] == sum(p.numel() for p in others) * 4
    from ktk.integration.transformers.loading import packed_modules

    assert found["expert_bytes"] == sum(row.bytes for row in packed_modules(opened.model))
    assert found["kernel"] == packed_modules(opened.model)[0].kernel
    table = ktk("doctor", str(model)).stdout
    assert found["kernel"] in table and "fits" in table


def test_doctor_knows_packed_directories_and_gguf_files(model: Path, tmp_path: Path) -> None:
    from ktk.convert.run import convert

    packed = tmp_path / "packed"
    convert(model, packed, quant_method="int4")
    found = json.loads(ktk("doctor", str(packed), "--json").stdout)
    assert (found["kind"], found["weight_format"]) == ("packed", "int4")
    assert 4 < found["bits_per_weight"] < 10  # tiny experts are mostly padding
    done = ktk("run", str(packed), "Why?", "-n", "3")
    assert done.returncode == 0 and "answer 3 tokens" in done.stderr
    assert "packed already" in ktk("doctor", str(packed), "--weight-format", "int8").stderr
    experts = tmp_path / "experts.gguf"
    convert(model, experts, quant_method="q8_0")
    done = ktk("doctor", str(experts), "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["kind"], found["weight_format"]) == (1, "gguf", "GGUF Q8_0")
    assert found["expert_bytes"] > 0 and "token_embd.weight" in found["reason"]
    assert "token_embd.weight" in ktk("doctor", str(experts)).stdout
    assert "token_embd.weight" in ktk("run", str(experts), "Why?").stderr


def test_a_model_that_does_not_fit_is_refused_with_the_figures(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ktk.generate.describe import OVERHEAD, describe_model
    from ktk.generate.open import open_model
    from ktk.machine import cpu

    needs = describe_model(model, weight_format="nl4").needed_bytes
    int8 = describe_model(model, weight_format="int8").needed_bytes
    assert needs < int8
    monkeypatch.setattr(cpu, "memory", lambda *_: (64 << 30, int8))
    assert describe_model(model).weight_format == "int8"
    monkeypatch.setattr(cpu, "memory", lambda *_: (64 << 30, needs))
    assert describe_model(model).weight_format == "nl4"
    monkeypatch.setattr(cpu, "memory", lambda *_: (64 << 30, 50 << 20))
    with pytest.raises(
        MemoryError, match=rf"needs {needs / 1e6:.0f} MB.*52 MB of 68.7 GB are free"
    ):
        open_model(model)
    assert needs > OVERHEAD
    assert open_model(model, force=True).description.fits is False


def test_linear_layers_are_packed_of_every_kind_of_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from ktk.convert.run import convert
    from ktk.generate.open import open_model
    from ktk.integration.transformers import linear

    monkeypatch.setattr(linear, "SMALLEST", 1)
    convert(model, tmp_path / "packed", quant_method="int8")
    for path in (model, tmp_path / "packed"):
        made = open_model(path, linear="int8").model
        kinds = {type(m) for name, m in made.named_modules() if name.endswith("q_proj")}
        assert kinds == {linear.KtkLinear}
        with torch.inference_mode():
            assert made(torch.ones(1, 3, dtype=torch.int64)).logits.isfinite().all()
    assert type(open_model(model, linear="none").model.lm_head) is torch.nn.Linear
    with pytest.raises(ValueError, match="linear='int3': must be one of file, int8, int4, none"):
        open_model(model, linear="int3")
