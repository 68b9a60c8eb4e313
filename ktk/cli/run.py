"""``ktk run``: one prompt, its answer as it comes."""

from __future__ import annotations

import json
import signal
import sys
from typing import Annotated, Any

import typer

from ktk.cli import opening

EPILOG = """Examples:

  ktk run Qwen3-30B-A3B-int4 "Why is the sky blue?"

  ktk run model.gguf "Write a haiku." --temperature 0.8 --seed 1 --max-tokens 64

  cat notes.txt | ktk run Qwen3-30B-A3B - --system "Summarise in one sentence."

  ktk run Qwen3-30B-A3B "def fib(n):" --raw --stop $'\\ndef'
"""


def command(
    call: typer.Context,
    model: opening.Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help='The prompt; "-" reads stdin.')],
    max_tokens: opening.MaxTokens = opening.ANSWER_TOKENS,
    temperature: opening.Temperature = None,
    top_p: opening.TopP = None,
    top_k: opening.TopK = None,
    seed: opening.Seed = None,
    stop: opening.Stop = None,
    system: opening.System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without chat template.")
    ] = False,
    method: opening.Method = "auto",
    weight_format: opening.WeightFormat = "auto",
    linear: opening.Linear = "file",
    dtype: opening.Dtype = None,
    adapter: opening.Adapter = None,
    force: opening.Force = False,
    expert_memory: opening.ExpertLimit = None,
    residency_policy: opening.Policy = None,
    gpu_experts: opening.GpuExperts = None,
    placement: opening.Placement = None,
    device: opening.Device = None,
    max_deferred_experts: opening.Deferred = 0,
    kv_dtype: opening.KvDtype = None,
    kv_disk: opening.KvDisk = None,
    kv_disk_limit: opening.KvDiskLimit = None,
    prompt_lookup: opening.PromptLookup = 8,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end, nothing before.")
    ] = False,
) -> None:
    """Answer one prompt: the text to stdout as it comes, then the speed to stderr.

    Ctrl-C ends it.
    """
    if raw and system is not None:
        raise typer.BadParameter("--raw takes no --system: it adds nothing to the prompt")
    text = sys.stdin.read() if prompt == "-" else prompt
    opened, session = opening.session_of(call)
    if raw or not opened.tokenizer.chat_template:
        if system is not None:
            raise ValueError("--system needs a chat template, which this model's tokenizer has not")
        ids = session.encode(text)
    else:
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        ids = session.encode_chat(messages)

    def show(piece: str) -> None:
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()

    before = signal.signal(signal.SIGINT, interrupting(session))
    try:
        made = session.generate(
            ids,
            opening.sampling_of(opened.model, temperature, top_p, top_k, seed),
            max_tokens or None,
            stop or (),
            show,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    if as_json:
        found = opened.description
        figures = {
            "model": opened.name,
            "text": made.text,
            "finish_reason": made.finish_reason,
            "prompt_tokens": made.prompt_tokens,
            "generated_tokens": made.generated_tokens,
            "prefill_tokens_per_second": round(made.prefill_speed, 2),
            "decode_tokens_per_second": round(made.decode_speed, 2),
            "guessed_tokens": made.guessed_tokens,
            "guessed_true_tokens": made.came_true,
            "kernel": found.kernel,
        }
        if (report := opened.residency()) is not None:
            figures["expert_memory"] = report.to_json()
        typer.echo(json.dumps(figures, indent=2))
    else:
        show("\n")
        typer.echo(speeds(made, max_tokens), err=True)
        if (report := opened.residency()) is not None:
            typer.echo(f"[experts: {report.use()}]", err=True)
    session.save()
    if made.finish_reason == "interrupted":
        raise typer.Exit(130)


def interrupting(session: Any) -> Any:
    """A SIGINT handler: the first one ends the generation, a second one is KeyboardInterrupt."""

    def handle(*_: object) -> None:
        if session.stopped:
            raise KeyboardInterrupt
        session.stop()

    return handle


def speeds(made: Any, max_tokens: int) -> str:
    """One line of figures about a ``Generated``, and what ended it if the model did not.

    max_tokens : 0: no limit was set.
    """
    cached = made.prompt_tokens - made.prefilled_tokens
    kept = f" ({cached} more from the cache)" if cached else ""
    ended = {"interrupted": ", interrupted", "stop": ""}.get(made.finish_reason)
    if ended is None:
        is_limit = 0 < max_tokens <= made.generated_tokens
        ended = ", ended by --max-tokens (0: no limit)" if is_limit else ", the context is full"
    if made.guessed_tokens:
        ended = f", {made.came_true} of {made.guessed_tokens} guessed came true{ended}"
    return (
        f"[prompt {made.prefilled_tokens} tokens{kept}, {made.prefill_speed:.1f} tokens/s; "
        f"answer {made.generated_tokens} tokens, {made.decode_speed:.1f} tokens/s{ended}]"
    )
