"""Names inside transformers, 5.20 to 5.24 and on: classes, keywords and attributes that ktk uses
and that no documentation promises.

A release may rename any of them, and one place must change then: here. Where releases differ, what
is installed is looked at, a signature or an attribute, never a version number. Code of a model's
own (``trust_remote_code``) may be written for an older release than the installed one: what a
caller hands to ktk is understood under every name. What modules call their parts and weights
(``q_proj``, ``gate_up_proj``) are checkpoints' names too, which stay: they are with what reads
them.
``tests/integration/transformers/test_transformers_names.py`` holds each claim against the installed
release, and that no other module uses these names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationMixin, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.core_model_loading import ConversionOps
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.quantization_config import QuantizationConfigMixin

from ktk.kv.pages import pages_beyond

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_EXPERTS_FUNCTIONS",
    "BATCH_CACHE",
    "CACHE",
    "CACHE_GEOMETRY",
    "IMPLEMENTATION_NAMES",
    "IMPLEMENTATION_PASSED",
    "IMPLEMENTATION_QUESTION",
    "MORE_ATTENTION",
    "PLACES",
    "PLUMBING",
    "POSITIONS",
    "ROPE_INIT_FUNCTIONS",
    "BaseStreamer",
    "BatchPart",
    "BatchRouter",
    "BatchSampler",
    "ConversionOps",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "HfQuantizer",
    "PagedAttentionCache",
    "QuantizationConfigMixin",
    "ResponseParser",
    "attention_implementation",
    "batch_inputs",
    "bounds_of_keys",
    "cache_in",
    "cache_name",
    "cache_pages",
    "dtypes",
    "experts_implementation",
    "fatal_error",
    "has_cache",
    "ignore_unread",
    "keeps_own_cache",
    "kept_in_float32",
    "key_bounds",
    "last_logits",
    "mark_initialised",
    "only",
    "query_bounds",
    "records_past",
    "register_quantization_config",
    "register_quantizer",
    "restore_dtypes",
    "running_requests",
    "saves_adapters_only",
    "sdpa_attention_forward",
    "set_attention_implementation",
    "set_experts_implementation",
    "take_over",
    "takes",
    "targets_of",
]


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of that name, not only ``**kwargs``."""
    return name in inspect.signature(function).parameters


# --- which functions a model's modules call -------------------------------------------------------

_EXPERTS_IMPLEMENTATION, _ATTENTION_IMPLEMENTATION = (
    "_experts_implementation",
    "_attn_implementation",
)
# In the code of models: the attributes that hold the name, what asks for it, and the method that it
# is only passed to.
IMPLEMENTATION_NAMES = {_ATTENTION_IMPLEMENTATION, "_attn_implementation_internal"}
IMPLEMENTATION_QUESTION, IMPLEMENTATION_PASSED = "is_flash_attention_requested", "get_interface"
# Arguments of an attention function that make it compute more than softmax(q k) v.
MORE_ATTENTION = ("position_bias", "softcap")


def experts_implementation(config: Any) -> Any:
    return getattr(config, _EXPERTS_IMPLEMENTATION)


def set_experts_implementation(config: Any, name: Any) -> None:
    """Of this config alone; a model's own method also sets its parts'."""
    setattr(config, _EXPERTS_IMPLEMENTATION, name)


def attention_implementation(config: Any) -> Any:
    return getattr(config, _ATTENTION_IMPLEMENTATION)


def set_attention_implementation(config: Any, name: Any) -> None:
    """Unlike a model's own method, looks for no package that the name might stand for."""
    setattr(config, _ATTENTION_IMPLEMENTATION, name)


# --- a decoder layer's forward pass ---------------------------------------------------------------

_CACHE_NAMES = ("cache", "past_key_values")  # newest first
# What generate() and the models' forward take the KV cache by.
CACHE = next(
    name for name in _CACHE_NAMES if takes(GenerationMixin.prepare_inputs_for_generation, name)
)
POSITIONS = "position_embeddings"  # (cosines, sines)
_LOGITS = "logits_to_keep"
# Where the tokens stand in their texts, besides.
PLACES = ("position_ids", "cache_position")
_RECORDS_PAST, _DEFAULT_CACHE = "record_past", "_supports_default_dynamic_cache"


def cache_name(named: Mapping[str, Any]) -> str | None:
    """By which name the KV cache stands among a forward's keyword arguments;
    None if there is none.
    """
    return next((name for name in _CACHE_NAMES if named.get(name) is not None), None)


def cache_in(named: Mapping[str, Any]) -> Any:
    """The KV cache among a forward's keyword arguments; None if there is none."""
    name = cache_name(named)
    return None if name is None else named[name]


def records_past(layer: Any) -> bool:
    """Whether a cache layer keeps states that ``crop`` may ask for: assisted decoding."""
    return bool(getattr(layer, _RECORDS_PAST, False))


def keeps_own_cache(model: Any) -> bool:
    """Whether generate() takes no cache for a model, which makes one of its own for each call."""
    return not getattr(model, _DEFAULT_CACHE)()


def last_logits(model: Any) -> dict[str, int]:
    """What has a model's forward pass compute the last token's logits only, where it can."""
    return {_LOGITS: 1} if takes(type(model).forward, _LOGITS) else {}


# --- loading and saving ---------------------------------------------------------------------------

_INITIALISED, _UNREAD = "_is_hf_initialized", "_keys_to_ignore_on_load_unexpected"
_IN_FLOAT32, _IN_FLOAT32_OF_FLOAT16 = "_keep_in_fp32_modules_strict", "_keep_in_fp32_modules"
_TARGETS, _ADAPTERS = "_original_target_patterns", "_hf_peft_config_loaded"


def logits_of(model: Any, rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """What has a model's forward pass compute these rows' logits only, where it can."""
    return {_LOGITS: torch.tensor(rows)} if takes(type(model).forward, _LOGITS) else {}


def head_of(model: Any) -> Any:
    """The module that makes logits of hidden states, None where a model has none."""
    return model.get_output_embeddings()


def before_head(model: Any, take: Callable[[torch.Tensor], Any]) -> Any:
    """Have ``take`` called with the hidden states, (1, rows, hidden_size), that a model's head
    gets, until the handle's ``remove``.
    """
    return head_of(model).register_forward_pre_hook(lambda _, given: take(given[0]))


def mark_initialised(owner: Any) -> None:
    """A module or parameter that from_pretrained shall not fill."""
    setattr(owner, _INITIALISED, True)


def ignore_unread(model: Any, patterns: Iterable[str]) -> None:
    """Tensors of a checkpoint that the model has no place for, and that is no mistake."""
    setattr(model, _UNREAD, {*(getattr(model, _UNREAD) or ()), *patterns})


def kept_in_float32(model: Any) -> set[str]:
    """Parts of the names of parameters that stay in float32 whatever the model's dtype."""
    kept = {*(getattr(model, _IN_FLOAT32) or ())}
    if model.dtype == torch.float16:
        kept |= {*(getattr(model, _IN_FLOAT32_OF_FLOAT16) or ())}
    return kept


def dtypes(model: Any) -> dict[str, torch.dtype]:
    """Of a model's tensors before they are loaded: what they are to have."""
    kept = kept_in_float32(model)
    return {
        name: torch.float32 if any(part in name for part in kept) else tensor.dtype
        for name, tensor in model.state_dict().items()
    }


def restore_dtypes(model: Any, wanted: Mapping[str, torch.dtype]) -> None:
    """5.20 leaves the tensors of a quantised checkpoint that it renames in the checkpoint's
    dtype.
    """
    for name, tensor in model.state_dict().items():
        dtype = wanted.get(name, tensor.dtype)
        if tensor.is_floating_point() and tensor.dtype != dtype:
            parent, _, own = name.rpartition(".")
            module = model.get_submodule(parent)
            getattr(module, own).data = tensor.to(dtype)


def targets_of(conversion: Any) -> list[str]:
    """The parameters, as patterns of names, that a step of loading makes."""
    return [str(name) for name in getattr(conversion, _TARGETS, [])]


def saves_adapters_only(model: Any) -> bool:
    """Whether save_pretrained leaves the model's own weights out."""
    return bool(getattr(model, _ADAPTERS, False))


# --- a continuous batch's forward pass ------------------------------------------------------------

# in 5.20 to 5.23 beside past_key_values, for attention functions; since then the layers' own
BATCH_CACHE = "cache"
CACHE_GEOMETRY = (
    "num_key_value_heads",
    "head_dim",
)  # the fields of a config by which a batch's KV cache is made
_QUERY_BOUNDS, _KEY_BOUNDS = "cu_seq_lens_q", "cu_seq_lens_k"


def query_bounds(named: Mapping[str, Any]) -> Any:
    """Where each sequence's tokens begin, and the last one's end;
    None if this is no continuous batch.
    """
    return named.get(_QUERY_BOUNDS)


def key_bounds(named: Mapping[str, Any]) -> Any:
    """Where each sequence's keys begin, and the last one's end,
    once the layer's cache is updated.
    """
    return named[_KEY_BOUNDS]


# Keyword arguments of attention functions, all releases, that say where tokens lie and what is to
# be returned, not what is computed.
PLUMBING = {
    *_CACHE_NAMES,
    _QUERY_BOUNDS,
    _KEY_BOUNDS,
    "input_ids",
    "position_ids",
    "logits_indices",
    _LOGITS,
    "max_length_q",
    "max_length_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "write_index",
    "read_index",
    "block_table",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "logits_processor_args",
}


def bounds_of_keys(bounds: Any) -> dict[str, Any]:
    """What a cache's ``update`` tells ``key_bounds``."""
    return {_KEY_BOUNDS: bounds}


def row_inputs(tokens: Sequence[int], places: Sequence[int]) -> dict[str, Any]:
    """A model's arguments for rows of any sequences, whose keys and values are not its business."""
    return {
        "input_ids": torch.tensor([tokens]),
        "position_ids": torch.tensor([places]),
        "use_cache": False,
    }


def batch_inputs(ids: torch.Tensor, cache: Any) -> dict[str, Any]:
    """A model's arguments for a batch of one new sequence. ids : (1, tokens)."""
    length = ids.shape[1]
    return {
        "input_ids": ids,
        "position_ids": torch.arange(length)[None],
        _QUERY_BOUNDS: torch.tensor([0, length], dtype=torch.int32),
        BATCH_CACHE: cache,
        "use_cache": False,
    }


# --- the manager of continuous batches ------------------------------------------------------------


class BatchPart:
    """What a batch has of one request: its tokens ``first`` to ``end``.

    num_initial : tokens of its prompt, and of what it had answered when it was last put off for
        want of pages.
    """

    def __init__(self, request: Any) -> None:
        self._request, state = request, request.state
        self.id: str = state.request_id
        self.end: int = state.position_offset
        self.first = self.end - int(request.query_length)
        self.num_initial = len(state.initial_tokens)

    def share(self, tokens: int) -> None:
        """Of the pages that this batch fills, let other requests have those that hold the
        sequence's first ``tokens`` only.
        """
        others = pages_beyond(self.end, tokens)
        filled = self._request.complete_blocks
        self._request.complete_blocks = {kind: max(0, n - others) for kind, n in filled.items()}


def only(scores: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    """scores (rows, vocab_size) in which each of the first rows has only its chosen token left,
    overwritten in place.
    """
    rows = torch.arange(len(chosen))
    scores[rows] = float("-inf")
    scores[rows, torch.tensor(chosen, dtype=torch.long)] = 0.0
    return scores


class BatchSampler(ContinuousBatchingLogitsProcessorList):
    """Stands where the manager has processors that all requests share; called by the generation
    thread.

    prepare : is told what each batch has of its requests, in its order, before it is run. choose :
    (ids of requests, scores float32 (rows, vocab_size)) -> their tokens.
    """

    def __init__(
        self,
        prepare: Callable[[list[BatchPart]], None],
        choose: Callable[[list[str], torch.Tensor], list[int]],
    ) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self._prepare, self._choose = prepare, choose
        self._rows: list[str] = []

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        return None

    def prepare_tensor_args(
        self, requests_in_batch: list[Any], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        self._rows = [r.state.request_id for r in requests_in_batch if r.has_new_token]
        self._prepare([BatchPart(request) for request in requests_in_batch])
        return arg_storage

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: torch.Tensor
    ) -> torch.Tensor:
        return only(scores, self._choose(self._rows, scores))


class BatchRouter(OutputRouter):
    """Stands where the manager hands out what is made, and keeps nothing; called by the generation
    thread.

    receive : (a request's id, tokens made so far, whether it is finished, its error or None).
    """

    def __init__(self, receive: Callable[[str, int, bool, str | None], None]) -> None:
        super().__init__()
        self._receive = receive

    def deliver(self, output: Any) -> None:
        made = len(output.generated_tokens)
        self._receive(output.request_id, made, output.is_finished(), output.error)

    def deliver_batch(self, outputs: list[Any]) -> None:
        for output in outputs:
            self.deliver(output)


def take_over(manager: Any, sampler: BatchSampler, router: BatchRouter) -> None:
    """Have a manager that has not started ask for tokens, and hand out what is made, elsewhere."""
    manager.logit_processor, manager.output_router = sampler, router


def has_cache(manager: Any) -> bool:
    """Whether the generation thread has come so far."""
    return manager.batch_processor is not None


def fatal_error(manager: Any) -> Exception | None:
    """What ended the generation thread."""
    error: Exception | None = manager.background_thread_status.fatal_error
    return error


def running_requests(manager: Any) -> int:
    """Requests that are being generated."""
    return len(manager.batch_processor.scheduler.active_requests) if has_cache(manager) else 0


def cache_pages(manager: Any) -> tuple[int, int]:
    """(free, all) pages of the KV cache; those kept for a following prompt of the same beginning
    count as free.
    """
    if not has_cache(manager):
        return 0, 0
    cache = manager.batch_processor.cache
    held = sum(
        len(blocks)
        for allocator in cache.cache_allocators.values()
        for blocks in list(allocator.block_table.values())  # the generation thread changes it
    )
    return cache.num_blocks - held, cache.num_blocks
