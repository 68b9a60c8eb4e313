"""A tiny random MoE model with a real tokenizer, and `ktk serve` of it as a process of its own."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from ktk.cli import main
from make.forked import Child, forked

SEED = 7
CONTEXT = 8192  # of the server that tests share
TEXT = [
    "The experts of a mixture are most of its weights, of which a token uses a few.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 𝛼𝛽𝛾 — “quoted” 東京",
]
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>\n{{ c['function'] | tojson }}\n</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> Any:
    """Byte-level BPE with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|end|>"
    )
    fast.chat_template = TEMPLATE
    return fast


def make_model(directory: Path, longest: int = 32768, is_native: bool = False) -> Path:
    """A Qwen3-MoE of two layers whose text is endless: it never chooses the end token.

    is_native : in bf16 and so large that ktk's own decoder layers run it.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    fast, make_config = make_tokenizer(), cast("Any", Qwen3MoeConfig)
    config = make_config(
        vocab_size=len(fast),
        hidden_size=128 if is_native else 64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=8 if is_native else 4,
        num_key_value_heads=8 if is_native else 2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=longest,
        eos_token_id=fast.eos_token_id,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.25 if is_native else 0.15)
        # By a channel that is 5 (or 1: of wide rows 5 would drown the text) in every token and that
        # no layer writes. With a logit of 0, 0.13 % a token, one answer in six ended.
        model.model.embed_tokens.weight[:, 0] = 1 if is_native else 5
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.experts.down_proj[:, 0] = 0
        model.lm_head.weight[fast.eos_token_id] = 0
        model.lm_head.weight[fast.eos_token_id, 0] = -50
    if is_native:
        model = model.to(torch.bfloat16)
    model.save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


class Server:
    """A running `ktk serve`. ``request`` is (status, JSON or text)."""

    def __init__(self, process: Child, url: str, key: str | None) -> None:
        self.process, self.url, self.key = process, url, key
        self.port = int(url.rsplit(":", 1)[1])

    def request(
        self,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = 60,
    ) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        own = {"content-type": "application/json", **(headers or {})}
        if self.key is not None:
            own.setdefault("authorization", f"Bearer {self.key}")
        request = urllib.request.Request(self.url + path, data, own)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                status, raw, kind = (
                    response.status,
                    response.read(),
                    response.headers["content-type"],
                )
        except urllib.error.HTTPError as error:
            status, raw, kind = error.code, error.read(), error.headers["content-type"]
        return status, json.loads(raw) if "json" in kind else raw.decode()

    def info(self) -> dict[str, Any]:
        return self.request("/v1/ktk")[1]

    def settle(self, timeout: float = 20) -> dict[str, Any]:
        """The server's description once nothing runs and every page of the KV cache is free."""
        end = time.monotonic() + timeout
        while True:
            found = self.info()
            idle = found["requests_running"] == found["requests_waiting"] == 0
            if idle and found["kv_cache_pages_free"] == found["kv_cache_pages"]:
                return found
            assert time.monotonic() < end, f"still busy after {timeout} s: {found}"
            time.sleep(0.05)

    def memory(self) -> int:
        """Bytes that the process holds and no file backs."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"RssAnon:\s+(\d+) kB", text)
        assert found
        return int(found[1]) * 1024

    def end(self, number: int = signal.SIGTERM, timeout: float = 20) -> int:
        """Its exit code after a signal."""
        self.process.signal(number)
        return self.process.wait(timeout)


@contextlib.contextmanager
def serving(model: Path, *options: str, key: str | None = None) -> Iterator[Server]:
    """`ktk serve model`, from when it answers to the end of the block."""
    environment = {} if key is None else {"KTK_API_KEY": key}
    command = ["serve", str(model), "--port", "0", *options]
    with forked(main, command, environment=environment) as process:
        process.until(lambda: re.search(r"API http\S+\n", process.err) is not None)
        url = process.err.rsplit("API ", 1)[1].split()[0].removesuffix("/v1")
        server = Server(process, url, key)

        def answers() -> bool:
            with contextlib.suppress(OSError):
                return server.request("/health")[0] == 200
            return False

        process.until(answers)
        yield server


def asking(opened: Any, engine: Any) -> Iterator[Any]:
    """The body of a fixture: a client of an app over the engine, which stops after it."""
    from fastapi.testclient import TestClient

    from ktk.server.app import Access, build_app

    with TestClient(build_app(opened, engine, Access()), raise_server_exceptions=False) as client:
        yield client
    engine.stop()


def question(text: str = "Why?") -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
