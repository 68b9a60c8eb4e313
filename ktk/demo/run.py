"""The demo's flow: a checkpoint, its experts converted,
and each method run and compared in turn.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ktk import backends, env
from ktk.demo import evaluate, smollm2
from ktk.errors import CheckpointError
from ktk.machine import cpu
from ktk.paths import user_path
from ktk.quantise.texts import stdlib_text, windows

WINDOW = 256
ANSWER_TOKENS = 32
FORMATS = ("int8", "nl4")
GGUF_FORMATS = ("q8_0", "q4_0")
GGUF_METHOD = "LLAMAFILE"


@dataclass(frozen=True)
class Row:
    """One method's results. kl and top1 are None where the reference did not fit in memory."""

    method: str
    kernel: str
    bits_per_weight: float
    expert_bytes: int
    answer: str
    kl: float | None
    top1: float | None
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Options:
    """model None: SmolLM2 as a mixture of experts. text None: the standard library's docstrings."""

    model: Path | None
    method: str
    text: Path | None
    work_dir: Path
    num_tokens: int

    def __post_init__(self) -> None:
        for name in ("model", "text", "work_dir"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, user_path(given))


class Reporter:
    """What the flow tells while it runs; the command line shows it."""

    def step(self, text: str) -> contextlib.AbstractContextManager[Callable[[int, int], None]]:
        """A step that takes a while; yields a function for (done, total)."""
        return contextlib.nullcontext(lambda done, total: None)

    def row(self, row: Row) -> None:
        """A method is done."""


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings from transformers, while it lasts."""
    from transformers import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def prepare_source(options: Options, reporter: Reporter) -> Path:
    """The unquantised checkpoint's directory, written first if it is the demo's own."""
    if options.model is not None:
        if not (options.model / "config.json").is_file():
            raise CheckpointError(
                f"{options.model}: must be a Hugging Face directory with a config.json"
            )
        return options.model
    source = options.work_dir / "smollm2-moe"
    if not (source / "config.json").is_file():
        with reporter.step("SmolLM2-135M-Instruct to 30 layers of 6 experts") as progress:
            smollm2.build(source, progress)
    return source


def prepare_packed(source: Path, weight_format: str, options: Options, reporter: Reporter) -> Path:
    """The packed directory of a source, converted unless the same conversion lies in the work
    directory.
    """
    from ktk.checkpoint.packed import STATE_FILE
    from ktk.convert.run import Progress, convert

    packed = options.work_dir / f"{source.resolve().name}-{weight_format}"
    with reporter.step(f"experts to {weight_format}") as progress:

        def show(done: Progress) -> None:
            progress(done.done_bytes >> 20, done.total_bytes >> 20)

        try:
            convert(source, packed, quant_method=weight_format, resume=True, progress=show)
        except CheckpointError:
            raise
        except (
            ValueError
        ):  # of another source or other options: make it anew, but only what convert made
            if not (packed / STATE_FILE).is_file():
                raise
            shutil.rmtree(packed)
            convert(source, packed, quant_method=weight_format, progress=show)
    return packed


def prepare_gguf(source: Path, ggml_type: str, options: Options, reporter: Reporter) -> Path:
    """The GGUF file of a source's experts, written unless one of the same source lies in the
    work directory.
    """
    from ktk.convert.run import Progress, convert
    from ktk.convert.sources import open_source

    file = options.work_dir / f"{source.resolve().name}-{ggml_type}.gguf"
    made_from = file.with_suffix(".gguf.source")  # what tells the demo's own file from another's
    with open_source(source, None) as opened:
        stamp = json.dumps(opened.fingerprint())
    if made_from.is_file():
        if file.is_file() and made_from.read_text(encoding="utf-8") == stamp:
            return file
        file.unlink(missing_ok=True)
    with reporter.step(f"experts to GGUF {ggml_type.upper()}") as progress:

        def show(done: Progress) -> None:
            progress(done.done_bytes >> 20, done.total_bytes >> 20)

        if not file.exists():  # else convert refuses
            made_from.parent.mkdir(parents=True, exist_ok=True)
            made_from.write_text(stamp, encoding="utf-8")
        convert(source, file, quant_method=ggml_type, progress=show)
    return file


def chosen_formats(method: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Packed formats and types of GGUF files that a method runs here as they are."""
    backend = backends.backends()[GGUF_METHOD]
    key = backends.check_method(method)
    if key == GGUF_METHOD:
        return (), GGUF_FORMATS
    is_run = key == "auto" and env.backend() is None and backend.why_not() is None
    return FORMATS, GGUF_FORMATS if is_run else ()


def available_bytes() -> int:
    """Memory this process could still take; where the OS does not tell,
    as if there were no limit.
    """
    return cpu.memory()[1] or 1 << 62


def has_reference(source: Path) -> bool:
    """Whether transformers can run the source itself here: float weights,
    and room for their fp32 copy too.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    return "quantization_config" not in config and 3 * size < available_bytes()


def run(options: Options, reporter: Reporter) -> list[Row]:
    """Convert, run and compare; one row per method, the reference first.

    Raises CheckpointError, BackendError, ValueError.
    """
    with quiet_transformers():
        return _run(options, reporter)


def _run(options: Options, reporter: Reporter) -> list[Row]:
    import torch
    from transformers import AutoTokenizer

    from ktk.evaluate.distance import distance, window_logits
    from ktk.integration.transformers import names as hf
    from ktk.integration.transformers.attention import use_attention
    from ktk.integration.transformers.decoder_layers import fuse_decoder_layers
    from ktk.integration.transformers.linear import share_linears
    from ktk.integration.transformers.loading import load_model, packed_modules

    formats, types = chosen_formats(options.method)
    source = prepare_source(options, reporter)
    packed = {name: prepare_packed(source, name, options, reporter) for name in formats}
    files = {name: prepare_gguf(source, name, options, reporter) for name in types}
    tokenizer = AutoTokenizer.from_pretrained(str(source))
    text = stdlib_text() if options.text is None else options.text.read_text(encoding="utf-8")
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    parts = windows(token_ids, max(options.num_tokens // WINDOW, 1), WINDOW)
    rows: list[Row] = []
    reference: list[torch.Tensor] = []

    def measure(model: Any, method: str, kernel: str, bits: float, expert_bytes: int) -> None:
        with reporter.step(f"{method}: answer and speed"):
            evaluate.answer(model, tokenizer, evaluate.QUESTION, 3)  # warm up
            said, decode = evaluate.answer(model, tokenizer, evaluate.QUESTION, ANSWER_TOKENS)
            prefill = evaluate.prefill_rate(model, parts[0])
        kl = top1 = None
        if method == "bf16" or reference:
            with reporter.step(
                f"{method}: next-token distributions of {len(parts) * WINDOW} tokens"
            ):
                model.to(torch.float32)  # all but packed experts: then only the experts differ
                if method == "bf16":
                    reference.extend(window_logits(model, part) for part in parts)
                    kl, top1 = 0.0, 1.0
                else:
                    found = distance(model, parts, reference)
                    kl, top1 = found.kl, found.top1
        rows.append(Row(method, kernel, bits, expert_bytes, said, kl, top1, prefill, decode))
        reporter.row(rows[-1])

    if has_reference(source):
        model = _load_plain(source)
        experts = expert_parameters(model)
        size = sum(w.numel() * w.element_size() for w in experts)
        bits = 8 * size / sum(w.numel() for w in experts)
        name = f"torch {hf.experts_implementation(model.config)}"
        measure(model, "bf16", name, bits, size)
        del model, experts
        gc.collect()
    loads: dict[str, Callable[[], Any]] = {
        name: partial(load_model, directory, method=options.method)
        for name, directory in packed.items()
    }
    for name, file in files.items():
        loads[name] = partial(load_model, source, method=GGUF_METHOD, gguf=file)
    for weight_format, load in loads.items():
        model = load()
        share_linears(model)
        use_attention(model)
        fuse_decoder_layers(model)
        modules = packed_modules(model)
        size = sum(m.bytes for m in modules)
        weights = sum(8 * m.bytes / m.bits_per_weight for m in modules)
        kernels = " + ".join(sorted({m.kernel for m in modules}))
        measure(model, f"ktk {weight_format.upper()}", kernels, 8 * size / weights, size)
        del model
        gc.collect()
    return rows


def _load_plain(source: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(source), dtype="auto")


def expert_parameters(model: Any) -> list[Any]:
    """The float weight matrices of all experts."""
    from ktk.integration.transformers.experts import find_experts, weight_names

    modules = [module for _, module in find_experts(model)]
    if not modules:
        raise CheckpointError(f"{type(model).__name__} has no experts that ktk can run")
    return [getattr(module, name) for module in modules for name in weight_names(module)[:2]]
