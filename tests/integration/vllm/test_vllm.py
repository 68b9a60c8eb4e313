"""vLLM itself with ktk's experts: its greedy tokens, a packed directory, its server's routes.

`make test-vllm` makes vLLM's environment and runs these; elsewhere they skip.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from make.serving import make_tokenizer

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
vllm = pytest.importorskip("vllm")

PROMPTS = ([5, 6, 7, 8], [100, 200, 300], [9] * 20)
NEW_TOKENS = 24
TEXT = "The experts of a mixture"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of random float32 weights whose greedy text goes on and does not repeat soon."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    tokenizer, make_config = make_tokenizer(), cast("Any", Qwen3MoeConfig)
    config = make_config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(7)
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.08)
        made.lm_head.weight.normal_(0, 0.5)
    directory = tmp_path_factory.mktemp("vllm") / "model"
    made.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@contextlib.contextmanager
def opened(path: Path, **options: Any) -> Iterator[Any]:
    """vLLM in this process; eager unless asked otherwise."""
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"enforce_eager": True, "dtype": "float32", "max_model_len": 256, **options}
    llm = vllm.LLM(str(path), **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def greedy(llm: Any) -> list[list[int]]:
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    prompts = [{"prompt_token_ids": list(p)} for p in PROMPTS]
    return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, sampling, use_tqdm=False)]


def ktk(**options: Any) -> dict[str, Any]:
    return {"quantization": "ktk", "additional_config": {"ktk": options}}


def operators(llm: Any) -> list[Any]:
    """``ktk.MoE`` of each layer."""

    def found(worker: Any) -> list[Any]:
        modules = worker.get_model().modules()
        methods = [getattr(m, "quant_method", None) for m in modules]
        return [m.moe_operator for m in methods if hasattr(m, "moe_operator")]

    return list(llm.collective_rpc(found)[0])


@pytest.fixture(scope="session")
def own_tokens(model: Path) -> list[list[int]]:
    """By vLLM's own experts, in float32."""
    with opened(model) as llm:
        return greedy(llm)


@pytest.mark.parametrize("is_eager", [True, False], ids=["eager", "compiled"])
def test_greedy_tokens_are_those_of_vllms_own_experts(
    model: Path, own_tokens: list[list[int]], is_eager: bool
) -> None:
    assert len({tuple(row) for row in own_tokens}) == len(PROMPTS)
    with opened(model, enforce_eager=is_eager, **ktk(weight_format="fp32")) as llm:
        assert [m.spec.weight_format for m in operators(llm)] == ["fp32", "fp32"]
        assert greedy(llm) == own_tokens


def test_bf16_has_vllms_own_logits_within_its_rounding(model: Path) -> None:
    """Of the last prompt token; what separates its two likeliest tokens is larger."""
    sampling = vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=5)
    prompts = [{"prompt_token_ids": list(p)} for p in PROMPTS]
    found = []
    for options in ({}, ktk(weight_format="bf16")):
        with opened(model, dtype="bfloat16", **options) as llm:
            rows = [o.outputs[0] for o in llm.generate(prompts, sampling, use_tqdm=False)]
        found.append([{t: p.logprob for t, p in row.logprobs[0].items()} for row in rows])
    for want, got in zip(*found, strict=True):
        assert max(want, key=want.__getitem__) == max(got, key=got.__getitem__)
        shared = want.keys() & got.keys()
        assert len(shared) >= 4
        assert max(abs(want[t] - got[t]) for t in shared) < 0.1


def test_a_packed_directory_runs_as_its_experts_do_when_vllm_reads_them(
    model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "ktk", "convert", "-i", str(model), "--quant-method", "int8"]
    subprocess.run([*command, "-o", str(tmp_path / "packed")], check=True, capture_output=True)
    with opened(model, **ktk(method="INT8")) as llm:
        want = greedy(llm)
    with opened(tmp_path / "packed") as llm:  # config.json says that it is ktk's
        assert [m.spec.weight_format for m in operators(llm)] == ["int8", "int8"]
        assert greedy(llm) == want


def test_options_that_cannot_be_end_the_start(model: Path) -> None:
    with pytest.raises(Exception, match="no option format"), opened(model, **ktk(format="int4")):
        pass
    with (
        pytest.raises(Exception, match="enable_lora: quantization ktk"),
        opened(model, enable_lora=True, **ktk()),
    ):
        pass


def test_vllms_server_answers_by_ktks_experts(model: Path) -> None:
    with opened(model, **ktk(weight_format="fp32")) as llm:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=16)
        want = llm.generate(TEXT, sampling, use_tqdm=False)[0].outputs[0].text
    with served(model, "--quantization", "ktk", weight_format="fp32") as url:
        body = {"model": str(model), "prompt": TEXT, "max_tokens": 16, "temperature": 0}
        assert post(f"{url}/v1/completions", body)["choices"][0]["text"] == want
        messages = [{"role": "user", "content": TEXT}]
        answer = post(
            f"{url}/v1/chat/completions",
            {"model": str(model), "messages": messages, "max_tokens": 8, "temperature": 0},
        )
        assert answer["usage"]["completion_tokens"] in range(1, 9)
        assert answer["choices"][0]["message"]["content"]


@contextlib.contextmanager
def served(model: Path, *options: str, **ktk_options: Any) -> Iterator[str]:
    """The address of vLLM's server. `vllm serve` itself asks for the version of a distribution
    named vllm, which vllm-cpu 0.32.0 is not.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    asked = ["--port", str(port), "--host", "127.0.0.1", "--enforce-eager", "--dtype", "float32"]
    extra = ["--max-model-len", "256", "--additional-config", json.dumps({"ktk": ktk_options})]
    with subprocess.Popen([*program, *asked, *options, *extra]) as process:
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + 240
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                    break
                assert process.poll() is None and time.monotonic() < end, "vLLM's server: no answer"
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def post(url: str, body: dict[str, Any]) -> Any:
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
