"""What most tests of answers ask: a model, made once, an app over it, a process that serves one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from make.serving import CONTEXT, Server, make_model, serving


@pytest.fixture(scope="package")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random model that ktk's own decoder layers run (``make.serving``)."""
    pytest.importorskip("transformers")
    from ktk.generate.open import open_model

    return open_model(make_model(tmp_path_factory.mktemp("opened") / "tiny-moe", is_native=True))


@pytest.fixture(scope="module")
def client(opened: Any) -> Iterator[Any]:
    """An httpx client of an app over ``opened``, in this process."""
    from ktk.generate.engine import Limits
    from ktk.generate.trial import start_engine
    from make.serving import asking

    yield from asking(opened, start_engine(opened, Limits(context=1024, running=8)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a model of which transformers runs the decoder layers."""
    return make_model(tmp_path_factory.mktemp("serve") / "tiny-moe")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    """`ktk serve` of it, ended by Ctrl-C."""
    with serving(model, "--context", str(CONTEXT), "--max-requests", "8") as running:
        yield running
        assert running.end(signal.SIGINT) == 0


@pytest.fixture(scope="module")
def openai_client(server: Server) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def says(opened: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """says(text): from now on every answer is this text, whatever the model finds."""
    from ktk.generate.sampling import Sampler, Token

    def script(text: str) -> None:
        ids = [*opened.tokenizer(text)["input_ids"], opened.tokenizer.eos_token_id]

        def choose(self: Sampler, logits: Any) -> int:
            self.tokens.append(Token(ids[len(self.tokens)], -0.5))
            return self.tokens[-1].id

        monkeypatch.setattr(Sampler, "choose", choose)
        monkeypatch.setattr(Sampler, "takes_largest", False)

    return script
