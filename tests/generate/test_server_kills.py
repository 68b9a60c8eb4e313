"""A server that keeps texts on the disk, killed at any moment: what it says before and after is
what it says without a disk.
"""

from __future__ import annotations

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from ktk.kv.pages import PAGE
from make.serving import make_model, serving

KILLS = int(os.environ.get("KILLS", 0))
PROMPTS = [
    [3 + (7 * j * j + (n % 4) * (j > PAGE)) % 290 for j in range(2 * PAGE + 9 + n)]
    for n in range(12)
]


def body(prompt: list[int]) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": PAGE, "temperature": 0, "logprobs": 0}


@pytest.mark.skipif(not KILLS, reason="KILLS=200 kills a server as often, which takes minutes")
def test_a_server_killed_at_any_moment_leaves_no_wrong_page(tmp_path: Path) -> None:
    draw = random.Random(7)
    path = make_model(tmp_path / "tiny-moe", is_native=True)
    options = ("--kv-disk", str(tmp_path / "kv"), "--kv-disk-limit", "6MiB", "--context", "640")
    with serving(path, "--context", "640") as server:
        alone = [server.request("/v1/completions", body(p))[1]["choices"] for p in PROMPTS]
    answers = unanswered = reused = 0
    for kill in range(KILLS + 1):
        with serving(path, *options) as server, ThreadPoolExecutor(4) as pool:
            chosen = [draw.randrange(len(PROMPTS)) for _ in range(8)]
            ask = [pool.submit(server.request, "/v1/completions", body(PROMPTS[n])) for n in chosen]
            if kill < KILLS:
                time.sleep(draw.random() * 1.5)
                assert server.end(signal.SIGKILL) == -signal.SIGKILL
            for n, one in zip(chosen, ask, strict=True):
                if one.exception() is not None:
                    unanswered += 1
                    continue
                status, made = one.result()
                assert status == 200 and made["choices"] == alone[n], f"kill {kill}, prompt {n}"
                answers += 1
                reused += made["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        print(f"{kill} kills: {answers} answers, {reused} from kept pages; {unanswered} cut off")
    assert answers and reused and unanswered
