"""Pages on the disk beneath the native engine: taken again after a restart, with the same bits;
whatever the disk does, an answer is that of an engine without one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

from ktk import log
from ktk.generate.engine import Engine, Limits, Reuse
from ktk.generate.identity import fingerprint
from ktk.generate.native import NativeEngine
from ktk.generate.open import OpenModel, open_model
from ktk.generate.sampling import Sampler, Sampling, Token
from ktk.generate.session import Session
from ktk.integration.transformers.native_batch import NativeModel
from ktk.kv.pages import PAGE
from ktk.kv.pool import NOTHING, PagePool
from ktk.kv.prefix.config import StoreConfig
from ktk.kv.prefix.disk import PAGES
from ktk.kv.prefix.elements import ElementFile
from ktk.kv.prefix.store import PrefixStore
from make.command_line import ktk
from make.serving import make_model, serving

GREEDY = Sampling(0.0, num_logprobs=0)
PROMPT = [3 + (7 * j * j) % 290 for j in range(4 * PAGE + 9)]
NEW = 6


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("kept") / "tiny-moe", is_native=True)


@pytest.fixture(scope="module")
def served(path: Path) -> OpenModel:
    opened = open_model(path)
    Session(opened.model, opened.tokenizer).generate([5, 6], Sampling(0.0), 3)  # layers are tried
    return opened


def store_at(path: Path, **changes: Any) -> PrefixStore:
    return PrefixStore(StoreConfig(path, num_token_per_page=PAGE, memory_pool_size=0, **changes))


def engine_of(
    opened: OpenModel, store: PrefixStore | None, pages: int = 64, kv_dtype: str | None = None
) -> NativeEngine:
    model = NativeModel(opened.model, kv_dtype=kv_dtype)
    page = PAGE * model.token_bytes
    model.close()
    engine = NativeEngine(opened, Limits(640, 16, 256, 96, pages * page, kv_dtype=kv_dtype))
    if store is not None:
        assert engine.keep(store, opened, "file")
    engine.start()
    return engine


async def answer(engine: Engine, prompt: list[int]) -> tuple[list[Token], Reuse]:
    told: list[Reuse] = []
    parts = engine.generate(prompt, GREEDY, NEW, told.append)
    made = [token async for tokens in parts for token in tokens]
    return made, told[0]


def answered(
    opened: OpenModel,
    store: PrefixStore | None,
    *prompts: list[int],
    pages: int = 64,
    kv_dtype: str | None = None,
) -> list[tuple[list[Token], Reuse]]:
    """By a new engine, all at once; what it kept is on the disk when it returns."""
    engine = engine_of(opened, store, pages, kv_dtype)

    async def all_of_them() -> list[tuple[list[Token], Reuse]]:
        return list(await asyncio.gather(*(answer(engine, prompt) for prompt in prompts)))

    try:
        made = asyncio.run(all_of_them())
        assert engine.running == 0 and engine.cache_pages == (pages, pages)
        return made
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def alone(served: OpenModel) -> list[Token]:
    """Without a store."""
    ((made, reuse),) = answered(served, None, PROMPT)
    assert reuse == Reuse()
    return made


@pytest.fixture(autouse=True)
def new_warnings() -> Iterator[None]:
    log.forget_warnings()
    yield
    log.forget_warnings()


def test_pages_come_back_after_a_restart_with_the_same_bits(
    served: OpenModel, alone: list[Token], tmp_path: Path
) -> None:
    with store_at(tmp_path) as store:
        assert answered(served, store, PROMPT) == [(alone, Reuse())]
    other = [*PROMPT[: 2 * PAGE], *reversed(PROMPT)]
    with store_at(tmp_path) as store:
        got = answered(served, store, PROMPT, other)
    assert got[0] == (alone, Reuse(disk=4 * PAGE))
    assert got[1] == (answered(served, None, other)[0][0], Reuse(disk=2 * PAGE))


def test_pages_of_another_dtype_are_not_taken(
    served: OpenModel, alone: list[Token], tmp_path: Path
) -> None:
    with store_at(tmp_path) as store:
        ((made, reuse),) = answered(served, store, PROMPT, kv_dtype="int8")
    assert reuse == Reuse() and made != alone
    with store_at(tmp_path) as store:
        assert answered(served, store, PROMPT) == [(alone, Reuse())]
        assert answered(served, store, PROMPT, kv_dtype="fp16")[0][1] == Reuse()
    with store_at(tmp_path) as store:
        assert answered(served, store, PROMPT, kv_dtype="int8") == [(made, Reuse(disk=4 * PAGE))]
        assert answered(served, store, PROMPT) == [(alone, Reuse(disk=4 * PAGE))]


def test_a_conversation_comes_back_with_its_answer(served: OpenModel, tmp_path: Path) -> None:
    begin = PROMPT[: 3 * PAGE - 3]
    with store_at(tmp_path) as store:
        ((made, _),) = answered(served, store, begin)
    longer = [*begin, *(token.id for token in made), 7, 8, 9]
    with store_at(tmp_path) as store:
        got = answered(served, store, longer)
    assert got == [(answered(served, None, longer)[0][0], Reuse(disk=3 * PAGE))]


def test_what_run_and_chat_keep_is_taken_by_the_server_and_back(
    served: OpenModel, alone: list[Token], tmp_path: Path
) -> None:
    def session(store: PrefixStore) -> tuple[list[Token], int]:
        own = Session.fastest(served.model, served.tokenizer)
        assert own.keep(store, served, "file")
        sampler = Sampler(GREEDY)
        computed = own.generate_tokens(PROMPT, sampler, NEW, lambda _: False)
        own.save()
        return sampler.tokens, computed

    with store_at(tmp_path / "run") as store:
        made, computed = session(store)
        assert computed == len(PROMPT) and [t.id for t in made] == [t.id for t in alone]
        assert answered(served, store, PROMPT) == [(alone, Reuse(disk=4 * PAGE))]
        assert session(store) == (made, len(PROMPT) - 4 * PAGE)
    with store_at(tmp_path / "served") as store:
        answered(served, store, PROMPT)
        assert session(store) == (made, len(PROMPT) - 4 * PAGE)


def test_memory_comes_first_and_the_disk_has_the_rest(
    served: OpenModel, alone: list[Token], tmp_path: Path
) -> None:
    with store_at(tmp_path) as store:
        answered(served, store, PROMPT)
    with store_at(tmp_path) as store:
        engine = engine_of(served, store)
        try:
            asyncio.run(answer(engine, PROMPT[: 2 * PAGE + 1]))
            assert asyncio.run(answer(engine, PROMPT)) == (alone, Reuse(2 * PAGE, 2 * PAGE))
            assert engine.reuse == Reuse(2 * PAGE, 4 * PAGE)
        finally:
            engine.stop()


def test_for_want_of_pages_texts_come_from_the_disk(served: OpenModel, tmp_path: Path) -> None:
    """Ten pages for six sequences of three, twice."""
    prompts = [[n, *PROMPT[: 2 * PAGE]] for n in range(6)]
    want = [answered(served, None, prompt)[0][0] for prompt in prompts]
    with store_at(tmp_path) as store:
        engine = engine_of(served, store, pages=10)

        async def all_of_them() -> list[tuple[list[Token], Reuse]]:
            return list(await asyncio.gather(*(answer(engine, prompt) for prompt in prompts)))

        try:
            for _ in range(2):
                assert [made for made, _ in asyncio.run(all_of_them())] == want
        finally:
            engine.stop()
    with store_at(tmp_path) as store:
        for prompt, made in zip(prompts, want, strict=True):
            ((again, reuse),) = answered(served, store, prompt)
            assert again == made
            assert reuse.disk in (0, PAGE, 2 * PAGE)  # who left the pool first was not saved


def test_a_text_of_other_weights_is_never_found(
    served: OpenModel, path: Path, tmp_path: Path
) -> None:
    before = fingerprint(path)
    assert fingerprint(path) == before
    with store_at(tmp_path) as store:
        answered(served, store, PROMPT)
        folder = tmp_path / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        tuned = dataclasses.replace(served, adapter=folder)
        assert answered(tuned, store, PROMPT)[0][1] == Reuse()
        (weights,) = path.glob("*.safetensors")
        own = weights.read_bytes()
        try:
            weights.write_bytes(own[:-1] + bytes([own[-1] ^ 1]))
            assert fingerprint(path) != before
            assert answered(served, store, PROMPT)[0][1] == Reuse()
        finally:
            weights.write_bytes(own)


def test_damaged_pages_are_a_miss_and_one_line(
    served: OpenModel, alone: list[Token], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with store_at(tmp_path) as store:
        answered(served, store, PROMPT)
        data = np.memmap(tmp_path / PAGES, np.uint8, "r+")
        data[store.config.element_bytes + 100 :: store.config.element_bytes] ^= 1  # each page's
        data.flush()
        with caplog.at_level(logging.WARNING):
            assert answered(served, store, PROMPT) == [(alone, Reuse())]
        assert "its checksum is another" in caplog.messages[0]
        assert len(caplog.messages) == 1
        # It was computed and written once more.
        assert answered(served, store, PROMPT) == [(alone, Reuse(disk=4 * PAGE))]


def test_a_full_disk_is_one_line_and_no_answer_fails(
    served: OpenModel,
    alone: list[Token],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with store_at(tmp_path) as store:
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(ElementFile, "write", write)
            for _ in range(2):
                assert answered(served, store, PROMPT) == [(alone, Reuse())]
        assert len(caplog.messages) == 1 and "No space left" in caplog.messages[0]
        answered(served, store, PROMPT)
        assert answered(served, store, PROMPT) == [(alone, Reuse(disk=4 * PAGE))]


def test_a_disk_limit_lets_old_texts_go(served: OpenModel, tmp_path: Path) -> None:
    element = 64 << 10
    with store_at(tmp_path, disk_limit=6 * element) as store:  # the head and five pages
        for n in range(3):
            answered(served, store, [n, *PROMPT])
        assert answered(served, store, [0, *PROMPT])[0][1].disk == 0
        assert (tmp_path / PAGES).stat().st_size <= 6 * element


def test_a_page_that_changes_while_it_is_copied_is_not_taken_for_whole() -> None:
    pool = PagePool(1, [((1, 2), (1, 2))], np.dtype(np.float32))
    page = pool.take()
    assert page is not None
    content = pool.keep(page, NOTHING, PROMPT[:PAGE])
    (full,) = pool.pages_of(content)
    frame = np.empty(pool.page_bytes, np.uint8)
    assert pool.copy_out(full, frame)
    pool.give_back([page])
    assert pool.copy_out(full, frame), "nobody needed it"
    assert pool.take() == page
    assert not pool.copy_out(full, frame) and pool.pages_of(content) == []


def test_a_served_text_survives_a_kill(
    path: Path, served: OpenModel, alone: list[Token], tmp_path: Path
) -> None:
    """In the midst of saves: what is there is right."""
    body = {"prompt": PROMPT, "max_tokens": NEW, "temperature": 0}
    options = ("--kv-disk", str(tmp_path), "--kv-disk-limit", "64MiB", "--context", "640")
    with serving(path, *options) as server:
        status, first = server.request("/v1/completions", body)
        assert status == 200 and first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        _, again = server.request("/v1/completions", body)
        assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": 4 * PAGE}
        assert again["choices"] == first["choices"]
        _, text = server.request("/metrics")
        assert 'ktk_kv_reused_tokens_total{from="memory"} 256.0' in text
        assert "ktk_kv_lookup_prefixmatch_length_count 1.0" in text, "memory had all, the 2nd time"
        told = server.info()["kv_disk"]
        assert told["page_tokens"] == PAGE and told["path"] == str(tmp_path)
        assert told["limit_bytes"] == 64 * 2**20
        for n in range(6):
            server.request("/v1/completions", {**body, "prompt": [n, *PROMPT]})
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
    with store_at(tmp_path) as store:
        assert answered(served, store, PROMPT) == [(alone, Reuse(disk=4 * PAGE))]
        for n in range(6):
            made, reuse = answered(served, store, [n, *PROMPT])[0]
            assert made == answered(served, None, [n, *PROMPT])[0][0]
            assert reuse.disk in (0, 4 * PAGE)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--kv-disk-limit", "1GiB"), "--kv-disk-limit needs --kv-disk"),
        (("--kv-disk", "kv", "--kv-disk-limit", "much"), "much"),
    ],
)
@pytest.mark.parametrize("command", [("serve",), ("run", "Why?")])
def test_a_limit_that_makes_no_sense_is_told_before_a_model_loads(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    options: tuple[str, ...],
    why: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *prompt = command
    port = ("--port", "0") if name == "serve" else ()
    done = ktk(name, str(path), *prompt, *port, *options)
    assert done.returncode and why in " ".join(done.stderr.split()) and not done.stdout
