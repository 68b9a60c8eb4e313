"""A server of a model with an adapter gives the adapter's answers, by ktk's own layers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
import torch
from fastapi.testclient import TestClient

import ktk.train
from ktk.generate.engine import Limits
from ktk.generate.native import NativeEngine
from ktk.generate.open import OpenModel, open_model
from ktk.generate.sampling import Sampling
from ktk.generate.session import Session
from ktk.generate.trial import start_engine
from ktk.ops import linear
from ktk.server.app import Access, build_app
from make.serving import make_model

PROMPT, COUNT = list(range(20, 30)), 12
ASKED = {"prompt": PROMPT, "max_tokens": COUNT, "temperature": 0}


def served(opened: OpenModel) -> str:
    engine = start_engine(opened, Limits(context=128, running=2))
    try:
        assert isinstance(engine, NativeEngine)
        client = TestClient(build_app(opened, engine, Access()))
        answers = [client.post("/v1/completions", json=ASKED) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
        texts = {answer.json()["choices"][0]["text"] for answer in answers}
        assert len(texts) == 1
        return texts.pop()
    finally:
        engine.stop()


@pytest.mark.skipif(linear.why_not() is not None, reason=str(linear.why_not()))
def test_answers_are_the_adapters(tmp_path: Path) -> None:
    path = make_model(tmp_path / "tiny-moe", is_native=True)
    plain = open_model(path)
    without = served(plain)
    ktk.train.add_expert_lora(plain.model, 4, 64, ("gate", "up"))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in ktk.train.expert_lora_parameters(plain.model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    ktk.train.save_expert_lora(plain.model, tmp_path / "adapter")
    tuned = open_model(path, adapter=tmp_path / "adapter")
    made = Session(tuned.model, tuned.tokenizer).generate(PROMPT, Sampling(0.0), COUNT)
    found = served(tuned)
    assert found != without
    assert found == made.text
