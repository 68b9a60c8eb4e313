"""Which engine serves a model: found by trying.

ktk's own decoder layers run the models that they describe. transformers' continuous batching takes
more, some of which it then computes wrongly or fails on in the first forward pass, and which ones
is nowhere written down. So a short text is continued by generate() and by the engine, before the
server answers anybody.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from ktk.generate.batching import BatchingEngine
from ktk.generate.engine import Engine, Limits
from ktk.generate.native import NativeEngine
from ktk.generate.open import OpenModel
from ktk.generate.sampling import Sampler, Sampling, Token
from ktk.generate.sequential import SequentialEngine
from ktk.generate.session import Session
from ktk.integration.transformers.batches import CannotBatch
from ktk.integration.transformers.native_sequence import check_own_dtype
from ktk.integration.transformers.tokens import encode

# In the order in which they are tried.
NATIVE = "natively"
BATCHING: dict[str, Callable[[OpenModel, Limits], Engine]] = {
    NATIVE: NativeEngine,
    "by transformers": BatchingEngine,
}
TEXT = (
    "The cat sat on the mat, and the dog lay at the door. In 1969 two people walked on the moon; "
    "a third waited in orbit. def add(a, b): return a + b\n"
)
PROMPT_TOKENS = 160  # more than gpt-oss' sliding window of 128
STEPS = 4
# Nats between log probabilities of one token. bf16 and 8-bit activations, rounded in another order,
# differ by some hundredths.
TOLERANCE = 0.25


def start_engine(opened: OpenModel, limits: Limits) -> Engine:
    """A started engine; its ``why_alone`` says why it takes one request at a time, if it does.

    Raises RequestError if the KV cache is too small, ValueError for a kv_dtype other than the
    model's where its layers do not run natively, RuntimeError if it does not generate at all.
    """
    ids = _prompt(opened, max(1, min(PROMPT_TOKENS, limits.context - STEPS)))
    expected = _continue_alone(opened, ids)
    reasons: dict[str, str] = {}
    for name, kind in BATCHING.items():
        engine, reason = _tried(kind, opened, limits, ids, expected)
        if engine is not None:
            engine.why_not_native = reasons.get(NATIVE)
            return engine
        reasons[name] = reason
        check_own_dtype(opened.model, limits.kv_dtype, reason)
    sequential = SequentialEngine(opened, limits)
    sequential.start()
    sequential.why_not_native = reasons[NATIVE]
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    sequential.why_alone = f"{type(opened.model).__name__} cannot be batched ({why})"
    return sequential


def _tried(
    kind: Callable[[OpenModel, Limits], Engine],
    opened: OpenModel,
    limits: Limits,
    ids: list[int],
    expected: list[Token],
) -> tuple[Engine | None, str]:
    """A started engine, or why it is not for this model."""
    try:
        engine = kind(opened, limits)
        engine.start()
    except CannotBatch as error:
        return None, str(error)
    try:
        reason = difference(expected, asyncio.run(_continue(engine, ids)))
    except RuntimeError as error:
        reason = str(error)
    if reason is None:
        return engine, ""
    engine.stop()
    return None, reason


def difference(expected: list[Token], got: list[Token]) -> str | None:
    """How two greedy continuations differ beyond rounding, or None.

    Tokens after the first different one are not compared.
    """
    if not got:
        return "no token came"
    for step, (want, have) in enumerate(zip(expected, got, strict=False)):
        likely = dict(want.top)
        if have.id not in likely or abs(likely[have.id] - (have.logprob or 0.0)) > TOLERANCE:
            return f"its token {step + 1} of a trial is not that of generate()"
        if have.id != want.id:
            break
    return None


def _prompt(opened: OpenModel, length: int) -> list[int]:
    once = encode(opened.tokenizer, TEXT)
    return (once * (length // len(once) + 1))[:length]


def _greedy() -> Sampling:
    return Sampling(temperature=0.0, num_logprobs=20)


def _continue_alone(opened: OpenModel, ids: list[int]) -> list[Token]:
    """By generate(). In a thread that ends: the OpenMP team of one that stays spins beside the
    engine's.
    """
    sampler = Sampler(_greedy())
    failures: list[Exception] = []

    def run() -> None:
        try:
            generate()
        except Exception as error:  # whatever the model makes of it
            failures.append(error)

    def generate() -> None:
        Session(opened.model, opened.tokenizer).generate_tokens(
            ids, sampler, STEPS, lambda _: False
        )

    thread = threading.Thread(target=run, name="ktk-trial")
    thread.start()
    thread.join()
    if failures:
        kind = type(opened.model).__name__
        raise RuntimeError(
            f"{kind} cannot be served, its generate() fails: {failures[0]}"
        ) from failures[0]
    return sampler.tokens


async def _continue(engine: Engine, ids: list[int]) -> list[Token]:
    return [token async for tokens in engine.generate(ids, _greedy(), STEPS) for token in tokens]
