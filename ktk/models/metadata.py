"""What a model's metadata may say: config.json, generation_config.json and GGUF key-values, checked
before anything is made of them.

Tables of the keys that ktk or transformers' models read: type, range, and relations between keys.
Other keys are nobody's business here.
``Config`` and ``find_gguf_experts`` pass everything through, so every way to a model does; the
errors say file, key, value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktk.checkpoint.safetensors import read_json_object, shown
from ktk.errors import CheckpointError

MAX_SIZE = 1 << 24  # of a dimension, as MoESpec has it
MAX_COUNT = (1 << 31) - 1
MAX_LIST = 1 << 16  # entries of a list, one for each layer
LARGE = 1e30


@dataclass(frozen=True)
class Rule:
    """What one key may hold.

    lists : None: none, "layers": also a list of one value a layer, "any": also a list.
    """

    kind: type
    low: float = 0
    high: float = 0
    options: tuple[str, ...] = ()
    lists: str | None = None

    @property
    def allowed(self) -> str:
        if self.options:
            one = f"one of {', '.join(self.options)}"
        elif self.kind in (int, float):
            one = (
                f"{'an int' if self.kind is int else 'a number'} of {self.low:.10g} to "
                f"{self.high:.10g}"
            )
        else:
            one = {bool: "true or false", str: "text", dict: "an object"}[self.kind]
        more = {
            None: "",
            "layers": ", or a list of one for each layer",
            "any": ", or a list of such",
        }
        return one + more[self.lists]

    def fits(self, value: Any) -> bool:
        if isinstance(value, list) and self.lists:
            return len(value) <= MAX_LIST and all(v is None or self._fits(v) for v in value)
        return self._fits(value)

    def _fits(self, value: Any) -> bool:
        if self.kind in (int, float):
            kinds = (int,) if self.kind is int else (int, float)
            return type(value) in kinds and self.low <= value <= self.high  # NaN is in no range
        return isinstance(value, self.kind) and (not self.options or value in self.options)


SIZE, LAYER_SIZE = Rule(int, 1, MAX_SIZE), Rule(int, 1, MAX_SIZE, lists="layers")
COUNT, LAYER_COUNT = Rule(int, 0, MAX_SIZE), Rule(int, 0, MAX_SIZE, lists="layers")
LENGTH = Rule(int, 1, MAX_COUNT)
POSITIVE, SHARE, SMALL = Rule(float, 1e-30, LARGE), Rule(float, 0, 1), Rule(float, 0, 1)
NUMBER = Rule(float, -LARGE, LARGE)
FLAG, TEXT, OBJECT = Rule(bool), Rule(str), Rule(dict)
TOKEN, TOKENS = Rule(int, -1, MAX_COUNT), Rule(int, -1, MAX_COUNT, lists="any")

EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
TOP_KS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "top_k_experts",
    "moe_k",
    "moe_topk",
)
DTYPES = (
    "auto",
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float",
    "half",
    "double",
)
CONFIG: dict[str, Rule] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), SIZE),
    **dict.fromkeys(
        ("hidden_size", "vocab_size", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim"), SIZE
    ),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "q_lora_rank", "moe_latent_size"), COUNT),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), LAYER_SIZE),
    **dict.fromkeys(
        (
            "intermediate_size",
            "moe_intermediate_size",
            "expert_ffn_hidden_size",
            "moe_ffn_hidden_size",
        ),
        LAYER_COUNT,
    ),
    **dict.fromkeys(("shared_expert_intermediate_size", "n_shared_experts"), LAYER_COUNT),
    **dict.fromkeys(EXPERT_COUNTS, LAYER_COUNT),
    **dict.fromkeys(TOP_KS, LAYER_SIZE),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), COUNT),
    "max_position_embeddings": LENGTH,
    "decoder_sparse_step": SIZE,
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps"), SMALL),
    "routed_scaling_factor": NUMBER,
    "rope_theta": POSITIVE,
    "partial_rotary_factor": SHARE,
    **dict.fromkeys(("swiglu_alpha", "swiglu_limit"), Rule(float, -LARGE, LARGE, lists="layers")),
    **dict.fromkeys(("tie_word_embeddings", "norm_topk_prob", "use_qk_norm"), FLAG),
    **dict.fromkeys(("hidden_act", "hidden_activation", "mlp_hidden_act", "model_type"), TEXT),
    **dict.fromkeys(("quantization_config", "rope_scaling", "rope_parameters"), OBJECT),
    "architectures": Rule(str, lists="any"),
    "layer_types": Rule(str, lists="layers"),
    "bos_token_id": TOKENS,
    "eos_token_id": TOKENS,
    "pad_token_id": TOKEN,
}
QUANTIZATION: dict[str, Rule] = {"quant_method": TEXT, "checkpoint_format": TEXT}
ROPE: dict[str, Rule] = {
    **dict.fromkeys(("rope_type", "type"), TEXT),
    **dict.fromkeys(
        ("rope_theta", "factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"),
        POSITIVE,
    ),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), Rule(float, 0, LARGE)),
    "partial_rotary_factor": SHARE,
    "original_max_position_embeddings": LENGTH,
}
ROPE_NEEDS = {"linear": "factor", "dynamic": "factor", "llama3": "factor"}
GENERATION: dict[str, Rule] = {
    "do_sample": FLAG,
    "temperature": Rule(float, 0, LARGE),
    **dict.fromkeys(("top_p", "typical_p", "min_p"), SHARE),
    "top_k": Rule(int, -1, MAX_COUNT),
    "repetition_penalty": POSITIVE,
    **dict.fromkeys(("max_length", "max_new_tokens"), LENGTH),
    "bos_token_id": TOKENS,
    "eos_token_id": TOKENS,
    "pad_token_id": TOKENS,
}
GGUF: dict[str, Rule] = {  # after the architecture
    **dict.fromkeys(
        ("block_count", "embedding_length", "attention.key_length", "attention.value_length"), SIZE
    ),
    **dict.fromkeys(
        ("attention.key_length_mla", "attention.value_length_mla", "rope.dimension_count"), COUNT
    ),
    **dict.fromkeys(
        ("attention.kv_lora_rank", "attention.q_lora_rank", "expert_shared_count"), COUNT
    ),
    **dict.fromkeys(
        (
            "expert_group_count",
            "expert_group_used_count",
            "nextn_predict_layers",
            "leading_dense_block_count",
        ),
        COUNT,
    ),
    **dict.fromkeys(
        ("attention.head_count", "attention.head_count_kv", "feed_forward_length"), LAYER_COUNT
    ),
    **dict.fromkeys(("expert_count", "expert_feed_forward_length"), LAYER_COUNT),
    "expert_used_count": LAYER_COUNT,
    "context_length": LENGTH,
    "attention.layer_norm_rms_epsilon": SMALL,
    **dict.fromkeys(("rope.freq_base", "rope.scaling.factor"), Rule(float, 0, LARGE)),
    "rope.scaling.original_context_length": Rule(int, 0, MAX_COUNT),
    "expert_weights_scale": Rule(float, -LARGE, LARGE),
    "expert_weights_norm": Rule(bool, lists="layers"),
    "expert_gating_func": Rule(int, 0, 255),
    "rope.scaling.type": TEXT,
}
GGUF_TOKENIZER: dict[str, Rule] = {
    **{
        f"tokenizer.ggml.{role}_token_id": Rule(int, -1, (1 << 32) - 1)
        for role in ("bos", "eos", "eot", "eom", "unknown", "padding")
    },
    "ktk.eos_token_ids": Rule(int, 0, MAX_COUNT, lists="any"),
}


def check_config(parts: Iterable[Mapping[str, Any]], where: str) -> None:
    """CheckpointError for a value of config.json that cannot be meant.

    parts : the object, and those nested in it that are read.
    """
    for part in parts:
        _check(part, CONFIG, where)
        for name in ("dtype", "torch_dtype"):
            given = part.get(name)
            known = isinstance(given, str) and given.removeprefix("torch.") in DTYPES
            if given is not None and not known and not isinstance(given, dict):
                raise _refused(where, name, given, f"one of {', '.join(DTYPES)}")
        _check(part.get("quantization_config") or {}, QUANTIZATION, f"{where}: quantization_config")
        for name in ("rope_parameters", "rope_scaling"):
            _check_rope(part.get(name) or {}, f"{where}: {name}")
        _check_relations(part, where)


def read_generation(directory: Path) -> dict[str, Any]:
    """generation_config.json, checked; empty without one. Raises CheckpointError."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return {}
    found = read_json_object(path)
    _check(found, GENERATION, str(path))
    if found.get("do_sample") and found.get("top_p") == 0:
        raise _refused(str(path), "top_p", 0, "above 0 where do_sample is true")
    return found


def check_gguf(metadata: Any, architecture: str, where: str) -> None:
    """CheckpointError for a key-value of a GGUF model that cannot be meant.

    metadata : a ``checkpoint.gguf.Metadata``.
    """
    found: dict[str, Any] = {}
    for name, rule in GGUF.items():
        key = f"{architecture}.{name}"
        if key in metadata:
            found[name] = _gguf_value(metadata, key, rule, where)
            if not rule.fits(found[name]):
                raise _refused(where, key, found[name], rule.allowed)
    check_gguf_tokenizer(metadata, where)

    def largest(part: str, whole: str, limit: int = 0) -> None:
        a, b = found.get(part), found.get(whole)
        if type(a) is int and type(b) is int and b and a > b - limit:
            raise _refused(
                where,
                f"{architecture}.{part}",
                a,
                f"at most {b - limit}: {architecture}.{whole} is {b}",
            )

    largest("expert_used_count", "expert_count")
    largest("expert_group_used_count", "expert_group_count")
    largest("nextn_predict_layers", "block_count", 1)
    largest("rope.dimension_count", "attention.key_length")
    heads, kv_heads = found.get("attention.head_count"), found.get("attention.head_count_kv")
    if not found.get("attention.kv_lora_rank"):
        _check_multiple(heads, kv_heads, where, f"{architecture}.attention.head_count")
    _check_multiple(
        found.get("expert_count"),
        found.get("expert_group_count"),
        where,
        f"{architecture}.expert_count",
    )


def check_gguf_tokenizer(metadata: Any, where: str) -> None:
    """The same for the keys that number tokens."""
    for key, rule in GGUF_TOKENIZER.items():
        if key in metadata:
            value = _gguf_value(metadata, key, rule, where)
            if not rule.fits(value):
                raise _refused(where, key, value, rule.allowed)


def _gguf_value(metadata: Any, key: str, rule: Rule, where: str) -> Any:
    """A value, or a list that is no longer than a model has layers."""
    length = metadata.size(key)
    if length is not None and (rule.lists is None or not 0 < length <= MAX_LIST):
        lists = f", a list 1 to {MAX_LIST} long" if rule.lists else ""
        raise _refused(where, key, f"a list of {length}", rule.allowed + lists)
    return metadata[key]


def _check(fields: Mapping[str, Any], table: Mapping[str, Rule], where: str) -> None:
    for key, rule in table.items():
        value = fields.get(key)
        if value is not None and not rule.fits(value):
            raise _refused(where, key, value, rule.allowed)


def _check_rope(rope: Mapping[str, Any], where: str) -> None:
    """One object, or one for each type of layer."""
    nested = {key: value for key, value in rope.items() if isinstance(value, dict)}
    for key, value in nested.items():
        _check_rope(value, f"{where}.{key}")
    if nested:
        return
    _check(rope, ROPE, where)
    kind = rope.get("rope_type") or rope.get("type")
    needed = ROPE_NEEDS.get(kind or "")
    if needed and rope.get(needed) is None:
        raise _refused(where, needed, None, f"a number: rope_type {kind!r} needs it")


def _check_relations(part: Mapping[str, Any], where: str) -> None:
    def first(keys: Iterable[str]) -> tuple[str, Any]:
        return next(((k, part[k]) for k in keys if type(part.get(k)) is int), ("", None))

    (top_key, top_k), (count_key, count) = first(TOP_KS), first(EXPERT_COUNTS)
    if top_k is not None and count and top_k > count:
        raise _refused(where, top_key, top_k, f"1 to {count}, the {count_key}")
    used, groups = part.get("topk_group"), part.get("n_group")
    if used and groups and used > groups:
        raise _refused(where, "topk_group", used, f"at most {groups}, the n_group")
    _check_multiple(count, groups, where, count_key)
    if not part.get("kv_lora_rank"):
        heads, kv_heads = part.get("num_attention_heads"), part.get("num_key_value_heads")
        _check_multiple(heads, kv_heads, where, "num_attention_heads")
    pad, vocab = part.get("pad_token_id"), part.get("vocab_size")
    if pad is not None and vocab is not None and pad >= vocab:
        raise _refused(where, "pad_token_id", pad, f"below {vocab}, the vocab_size")


def _check_multiple(whole: Any, part: Any, where: str, key: str) -> None:
    if type(whole) is int and type(part) is int and part and whole % part:
        raise _refused(
            where,
            key,
            whole,
            f"a multiple of {part}, the {'groups' if 'expert' in key else 'KV heads'}",
        )


def _refused(where: str, key: str, value: Any, allowed: str) -> CheckpointError:
    return CheckpointError(f"{where}: {key}={shown(value)}: must be {allowed}")
