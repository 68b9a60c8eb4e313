"""Run a model on a calibration text, one layer after the other, its experts supplied from outside.

One forward pass of all windows at once: when it comes to a layer's experts, ``on_layer`` gets the
inputs of all tokens, does with that layer what it wants and returns the experts' output, from which
the next layers go on. So a layer sees the inputs that the quantised layers before it make, and no
more than one layer's experts need to be in memory. All else of the model is, in float32.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ktk.checkpoint import Checkpoint
from ktk.errors import CheckpointError
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts
from ktk.integration.transformers import names as hf
from ktk.integration.transformers.experts import find_experts
from ktk.integration.transformers.multimodal import auto_class, quantised_class
from ktk.integration.transformers.quantizer import KtkConfig, KtkHfQuantizer, Request
from ktk.integration.transformers.sources import ExpertsSource, layer_of, other_tensors
from ktk.machine import cpu
from ktk.models import Experts
from ktk.models import find_experts as find_expert_tensors
from ktk.quantise.feedback import LayerInputs
from ktk.quantise.texts import read_text, windows

WINDOW = 256
NUM_TOKENS = 8192
# Of a window that noise is tried on, and its size as a share of the residual's.
PROBED_TOKENS = 128
NOISE = 0.05
# float32 copies of a token's hidden state alive at once, attention's and a dense layer's included:
# a generous bound.
_LIVE_COPIES = 24
OnLayer = Callable[[int, LayerInputs], np.ndarray]
_NAME = "ktk_calibrate"
_ATTRIBUTE = "_ktk_on_layer"
_RESIDUAL = "_ktk_residual"


def _experts_function(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    inputs = LayerInputs(
        hidden_states.float().contiguous().numpy(),
        top_k_index.long().contiguous().numpy(),
        top_k_weights.float().contiguous().numpy(),
        module.__dict__[_RESIDUAL].pop(),
    )
    output = torch.from_numpy(module.__dict__[_ATTRIBUTE](inputs))
    return output.to(hidden_states.dtype)


hf.ALL_EXPERTS_FUNCTIONS.register(_NAME, _experts_function)


@torch.no_grad()
def run_layers(model: Any, token_ids: torch.Tensor, on_layer: OnLayer) -> torch.Tensor:
    """Call ``on_layer`` for each layer that has experts, in order.

    token_ids : int64 (windows, length). The residual of a layer's inputs is what came to the
    decoder layer. Returns the last hidden states (windows, length, hidden_size).
    """
    modules = list(find_experts(model))
    owners = {id(m.config): m.config for _, m in modules} | {id(model.config): model.config}
    hooks = []
    before = {key: hf.experts_implementation(config) for key, config in owners.items()}
    try:
        for config in owners.values():
            hf.set_experts_implementation(config, _NAME)
        for name, module in modules:
            layer = layer_of(name)
            module.__dict__[_ATTRIBUTE] = lambda inputs, layer=layer: on_layer(layer, inputs)
            seen = module.__dict__[_RESIDUAL] = deque([None], maxlen=1)
            decoder = model.get_submodule(name[: name.rindex(f".{layer}.")] + f".{layer}")
            hooks.append(
                decoder.register_forward_pre_hook(
                    lambda _, args, given, seen=seen: seen.append(_mean_squares(args, given)),
                    with_kwargs=True,
                )
            )
        hidden: torch.Tensor = model.base_model(token_ids, use_cache=False).last_hidden_state
        return hidden
    finally:
        for key, config in owners.items():
            hf.set_experts_implementation(config, before[key])
        for hook in hooks:
            hook.remove()
        for _, module in modules:
            module.__dict__.pop(_ATTRIBUTE, None)
            module.__dict__.pop(_RESIDUAL, None)


def _mean_squares(args: tuple[Any, ...], given: dict[str, Any]) -> np.ndarray:
    """Of each token's hidden states among a decoder layer's arguments, float32 (tokens,)."""
    hidden = args[0] if args else given["hidden_states"]
    squares: np.ndarray = hidden.float().square().mean(dim=-1).flatten().numpy()
    return squares


class _WithoutExpertsConfig(KtkConfig):
    """Loads all of a float checkpoint but its experts."""

    def __init__(self, **others: Any) -> None:
        super().__init__(**others)
        self.quant_method = "ktk_without_experts"


def _no_experts(where: Path, experts: Experts, is_beside: bool = False) -> ExpertsSource:
    """What says which experts there are, and gives none."""
    fields = {layer: experts.spec_fields(layer) for layer in experts.layers}
    specs = {layer: MoESpec(**own, weight_format="bf16") for layer, own in fields.items()}

    def read(layer: int) -> StoredExperts:
        raise AssertionError(f"layer {layer}: nothing is attached here")

    return ExpertsSource(str(where), specs, read, is_beside)


def is_quantised(config: Any) -> bool:
    """Whether a model's config says that others quantised its weights."""
    parts = config, config.get_text_config(decoder=True)
    return any(getattr(part, "quantization_config", None) is not None for part in parts)


class _WithoutExperts(KtkHfQuantizer):
    def _open(self, checkpoint_files: list[str] | None) -> ExpertsSource | None:
        if (given := self.quantization_config.request.source) is not None:
            return given
        if not checkpoint_files:
            raise CheckpointError("a model to calibrate loads from its directory")
        directory = Path(checkpoint_files[0]).parent
        with Checkpoint.open(directory) as checkpoint:
            return _no_experts(directory, find_expert_tensors(checkpoint), is_beside=True)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        pass


hf.register_quantization_config("ktk_without_experts")(_WithoutExpertsConfig)
hf.register_quantizer("ktk_without_experts")(_WithoutExperts)


@dataclass(frozen=True)
class Calibration:
    """A calibration text for ``ktk.convert``. num_tokens : at most so many, in windows of 256
    spread over the text.

    Raises CheckpointError / ValueError when run: the text is too short, the model does not fit into
    memory.
    """

    text: Path
    num_tokens: int = NUM_TOKENS

    def provenance(self) -> dict[str, Any]:
        """What a packed directory tells of it: the text's sha256 and the number of tokens asked
        for.
        """
        digest = hashlib.sha256(self.text.read_bytes()).hexdigest()
        return {"text_sha256": digest, "num_tokens": self.num_tokens}

    def run(self, source: Path, experts: Experts, on_layer: OnLayer) -> None:
        """Run the float model in ``source`` without its own experts;
        ``on_layer`` as in ``run_layers``.
        """
        model, parts = self._opened(source, experts, self.num_tokens)
        run_layers(model, parts, on_layer)

    @torch.no_grad()
    def sensitivities(self, source: Path, experts: Experts, on_layer: OnLayer) -> dict[int, float]:
        """As ``ktk.convert.sources.Calibration``: one pass over a window for each layer, all the
        same, each with noise in one layer, and one without.
        """
        rows = {layer: row for row, layer in enumerate(experts.layers, 1)}
        model, parts = self._opened(source, experts, (1 + len(rows)) * PROBED_TOKENS)
        window = parts[len(parts) // 2, :PROBED_TOKENS]
        rng = np.random.default_rng(0)

        def disturbed(layer: int, inputs: LayerInputs) -> np.ndarray:
            output = on_layer(layer, inputs).copy()
            assert inputs.residual is not None
            here = slice(rows[layer] * len(window), (1 + rows[layer]) * len(window))
            scale = inputs.residual[here] + np.square(output[here]).mean(axis=1)
            # Few tokens have huge outliers that the others attend to: an error of their size is
            # not what rounding makes of them.
            deviation = NOISE * np.sqrt(np.where(scale < 10 * np.median(scale), scale, 0))
            output[here] += deviation[:, None] * rng.standard_normal(output[here].shape, np.float32)
            return output

        hidden = run_layers(model, window.expand(1 + len(rows), -1), disturbed)
        head = hf.head_of(model)
        exact = torch.log_softmax(head(hidden[0]).double(), -1)

        def divergence(row: int) -> float:
            other = torch.log_softmax(head(hidden[row]).double(), -1)
            return float((exact.exp() * (exact - other)).sum(-1).mean())

        return {layer: divergence(row) / NOISE**2 for layer, row in rows.items()}

    def _opened(self, source: Path, experts: Experts, num_tokens: int) -> tuple[Any, torch.Tensor]:
        """The model without its experts, and the text's windows (windows, length).

        num_tokens : that run through it at once.
        """
        from transformers import AutoConfig, AutoTokenizer

        if not (source / "config.json").is_file():
            raise CheckpointError(
                f"{source}: a model to calibrate needs its config.json and tokenizer"
            )
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        ids = tokenizer(read_text(self.text), add_special_tokens=False, verbose=False)["input_ids"]
        if self.num_tokens < WINDOW:
            raise ValueError(f"num_tokens={self.num_tokens}: must be at least {WINDOW}")
        parts = torch.tensor(windows(ids, self.num_tokens // WINDOW, WINDOW))
        self._check_memory(source, experts, max(num_tokens, parts.numel()))
        wanted = _WithoutExpertsConfig().asking(Request(only_text=True))
        if not is_quantised(config):
            model = auto_class(config).from_pretrained(
                source, dtype=torch.float32, quantization_config=wanted
            )
            return model.eval(), parts
        own_class, config = quantised_class(source, config)
        with Checkpoint.open(source) as checkpoint:  # the others decoded tensor by tensor
            model = own_class.from_pretrained(
                None,
                config=config,
                state_dict=other_tensors(checkpoint, experts),
                dtype=torch.float32,
                quantization_config=wanted.asking(
                    Request(only_text=True, source=_no_experts(source, experts))
                ),
            )
        return model.eval(), parts

    def _check_memory(self, source: Path, experts: Experts, num_tokens: int) -> None:
        with Checkpoint.open(source) as checkpoint:
            taken = set().union(*(experts.tensor_names(layer) for layer in experts.layers))
            plain = sum(
                4 * math.prod(t.shape) for n, t in checkpoint.tensors.items() if n not in taken
            )
        hidden = MoESpec(**experts.spec_fields(experts.layers[0])).hidden_size
        needed = plain + num_tokens * hidden * 4 * _LIVE_COPIES
        available = cpu.memory()[1]
        if available and needed > available:
            raise CheckpointError(
                f"{source}: calibrating on {num_tokens} tokens needs about {needed / 1e9:.1f} GB "
                f"(all but the experts in float32: {plain / 1e9:.1f} GB), {available / 1e9:.1f} "
                "GB are free; take fewer tokens with --calibrate-tokens, or convert without "
                "--calibrate"
            )
