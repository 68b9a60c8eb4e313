"""Fields of requests that other servers know: OpenAI's API, vLLM, llama.cpp's server, SGLang, Text
Generation Inference.

None that changes an answer is ignored. A field here has the values that mean what this server does
anyway, which are accepted; any other value is refused, and so is a field that nobody knows. What is
served has a field of its own in ``protocol.py``. Null is as if left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Known:
    """accepted : values that change nothing, None for all. instead : what to do otherwise."""

    accepted: tuple[Any, ...] | None
    instead: str = "leave it out"

    def takes(self, value: Any) -> bool:
        if self.accepted is None or value is None:
            return True
        return any(
            value == one and isinstance(value, bool) == isinstance(one, bool)
            for one in self.accepted
        )


def _known(
    accepted: tuple[Any, ...] | None, names: str, instead: str = "leave it out"
) -> dict[str, Known]:
    return dict.fromkeys(names.split(), Known(accepted, instead))


_FORM = "use response_format, structured_outputs or grammar"
_TOOLS = "use tools and tool_choice of /v1/chat/completions"
_TEMPLATE = (
    "leave it out: the model's own chat template is used, with its defaults; for others send the "
    "text to /v1/completions"
)
_LENGTH = "use max_tokens"
_GREEDY = "use temperature, top_p and top_k; temperature 0 is greedy"

FIELDS: dict[str, Known] = {
    # Who asks, and where things are kept: nothing that the model sees.
    **_known(
        None,
        "user metadata safety_identifier prompt_cache_key prompt_cache_retention "
        "prompt_cache_options",
    ),
    **_known(
        None, "request_id rid cache_salt cache_prompt backend_sampling guided_decoding_backend"
    ),
    **_known((True,), "parse_tool_calls separate_reasoning stream_reasoning"),
    **_known(
        None, "spaces_between_special_tokens truncation_side"
    ),  # of what is left out, and of what is not cut
    **_known((False,), "store"),
    **_known(("auto", "default"), "service_tier"),
    # How many answers, and what of the prompt is in them.
    **_known((1,), "best_of", "use n"),
    **_known((False,), "echo", "put the prompt before the answer yourself"),
    **_known((False,), "return_full_text", "use echo of /v1/completions"),
    **_known(("",), "suffix input_suffix input_prefix"),
    # Choosing tokens.
    **_known(
        (0,),
        "min_keep dynatemp_range xtc_probability dry_multiplier mirostat",
        _GREEDY,
    ),
    **_known(
        (1,),
        "length_penalty typical_p typical tfs_z tfs dynatemp_exponent",
        _GREEDY,
    ),
    **_known((1,), "repeat_penalty", "use repetition_penalty"),
    **_known((-1, 0), "top_n_sigma", _GREEDY),
    **_known((-1,), "adaptive_target", _GREEDY),
    **_known((5,), "mirostat_tau", _GREEDY),
    **_known((0.1,), "mirostat_eta xtc_threshold", _GREEDY),
    **_known((1.75,), "dry_base", _GREEDY),
    **_known((2,), "dry_allowed_length", _GREEDY),
    **_known((-1,), "dry_penalty_last_n", _GREEDY),
    **_known((64,), "repeat_last_n", _GREEDY),
    **_known((False,), "use_beam_search early_stopping penalize_nl watermark", _GREEDY),
    **_known(
        (),
        "do_sample samplers sampler_seq dry_sequence_breakers adaptive_decay epsilon_cutoff "
        "eta_cutoff top_a",
        _GREEDY,
    ),
    **_known(([],), "bad_words bad_words_ids logits_processors"),
    **_known(
        (),
        "allowed_token_ids custom_logit_processor logits_processor custom_params "
        "repetition_detection",
    ),
    # How long, and where it ends.
    **_known((), "n_predict max_new_tokens max_length max_completion_tokens", _LENGTH),
    **_known((0,), "min_new_tokens", "use min_tokens"),
    **_known((), "min_length", "use min_tokens"),
    **_known((), "stop_regex stop_sequences", "use stop"),
    **_known((False,), "no_stop_trim", "use include_stop_str_in_output"),
    **_known((0, -1), "t_max_predict_ms", "close the connection when time is up"),
    **_known((0,), "n_indent n_keep n_discard"),
    **_known((), "truncate_prompt_tokens truncate", "shorten the prompt yourself"),
    # The answer's form.
    **_known((), "guided_whitespace_pattern structural_tag", _FORM),
    **_known((False,), "grammar_lazy", _FORM),
    **_known(([],), "grammar_triggers preserved_tokens", _FORM),
    **_known(
        (True,),
        "skip_special_tokens detokenize",
        "leave it out: the answer is text without special tokens",
    ),
    **_known(("medium",), "verbosity", "ask for it in the prompt"),
    **_known((["text"],), "modalities", "leave it out: only text is served"),
    **_known((), "audio prediction web_search_options moderation"),
    # Tools.
    **_known(([],), "tools functions", _TOOLS),
    **_known(("none", "auto"), "tool_choice function_call", _TOOLS),
    **_known((True, False), "parallel_tool_calls"),
    **_known(("",), "tool_prompt guideline", _TOOLS),
    # The chat template.
    **_known(
        (),
        "chat_template enable_thinking thinking thinking_token_budget thinking_budget_tokens "
        "reasoning reasoning_effort",
        _TEMPLATE,
    ),
    **_known(({},), "chat_template_kwargs mm_processor_kwargs", _TEMPLATE),
    **_known(([],), "documents", _TEMPLATE),
    **_known((True,), "add_generation_prompt include_reasoning", _TEMPLATE),
    **_known(
        (False,), "continue_final_message thinking_forced_open reasoning_in_content", _TEMPLATE
    ),
    **_known(("auto", "deepseek"), "reasoning_format", _TEMPLATE),
    **_known((-1,), "reasoning_budget", _TEMPLATE),
    **_known((), "add_special_tokens add_bos", "send the prompt's tokens to /v1/completions"),
    # What is told beside the answer.
    **_known((), "prompt_logprobs logprob_token_ids logprob_start_len"),
    **_known((0,), "n_probs top_logprobs_num top_n_tokens", "use logprobs"),
    **_known((), "top_logprobs", "use logprobs, the number of alternatives"),
    **_known(
        (False,), "return_logprob post_sampling_probs details decoder_input_details", "use logprobs"
    ),
    **_known(
        (False,),
        "return_tokens_as_token_ids return_token_ids return_tokens return_hidden_states "
        "return_progress",
    ),
    **_known((False,), "timings_per_token return_prompt_text echo_prompt"),
    **_known(([],), "response_fields"),
    # Other models, images, slots.
    **_known(([],), "lora image_data"),
    **_known(
        (),
        "lora_path adapter_id session_params kv_transfer_params input_ids input_embeds "
        "prompt_embeds",
    ),
    **_known(({},), "vllm_xargs"),
    **_known((-1,), "id_slot"),
    **_known((), "messages", "send it to /v1/chat/completions"),
    **_known((), "prompt", "send it to /v1/completions"),
}

# Of messages. What a message of an answer brings back, and this server's answers do not have.
MESSAGE_FIELDS: dict[str, Known] = {
    **_known((), "function_call", "use tool_calls"),
    **_known(([],), "annotations"),
    **_known(("",), "refusal", "put the text into content"),
    **_known(
        ("",),
        "reasoning thinking",
        "use reasoning_content",
    ),
    **_known((False,), "prefix partial", "send the text to /v1/completions"),
    **_known((), "audio weight"),
}

STREAM_FIELDS: dict[str, Known] = {
    **_known(None, "include_obfuscation"),  # padding against eavesdroppers, which clients drop
    **_known(
        (False,), "continuous_usage_stats", "use include_usage: usage comes in the last chunk"
    ),
}

PART_FIELDS: dict[str, Known] = _known(None, "cache_control prompt_cache_breakpoint")


def refusal(given: dict[str, Any] | None, known: dict[str, Known]) -> tuple[str, str] | None:
    """(field, why) of the first field that is not served, or None.

    given : fields that have none of their own.
    """
    for name, value in (given or {}).items():
        row = known.get(name)
        if row is None:
            return name, f"{name}={value!r:.80}: no field of this name is known here; leave it out"
        if not row.takes(value):
            accepted = " or ".join(f"{one!r}" for one in row.accepted or ())
            only = f"only {accepted} is served here" if accepted else "not served here"
            return name, f"{name}={value!r:.80}: {only}; {row.instead}"
    return None
