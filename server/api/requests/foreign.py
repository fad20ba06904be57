"""Fields of others' request schemas that this server has no use for, and what each asks for: a table.

A field is taken without a word where its value asks for nothing: where it is empty (null, "", [], {}, or a list or an
object of such), where it is the default of the schema that it comes from, which routers write into every body, or where
nothing that the user gets depends on it. `false` says that something is not to be done. What is not known here is not
done here, so under a name of the table it asks for nothing, unless the thing is done where nobody says so (a row whose
default is true: `false` is refused like any other value), and under a name that nobody here has heard of it is taken
and its sender told. Anything else is refused by name, with the reason that stands here; what others have other names
for is in `synonyms`. Drawn from the schemas of the openai client, vLLM, SGLang and its router, llama.cpp and its page,
LiteLLM, LangChain, LlamaIndex, pydantic-ai, the Vercel SDK, Open WebUI, and of the services that have OpenAI's API
beside fields of their own: Mistral, OpenRouter, Groq, Fireworks, Together, DeepSeek, DashScope.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

EMPTY: tuple[object, ...] = (None, False, "", [], {})
"""Values that ask for nothing under any name."""


class Foreign(NamedTuple):
    """A field that is not honoured.

    reason: why, for whoever asks for something. harmless: values beside the empty ones that ask for nothing.
    any_value: nothing that the user gets depends on it. hint: it may be ignored, but its sender is told.
    """

    reason: str = ""
    harmless: tuple[object, ...] = ()
    any_value: bool = False
    hint: bool = False

    def asks_for_nothing(self, value: object) -> bool:
        if self.any_value or self.hint or self._is_harmless(value):
            return True
        return is_empty(value) and not (value is False and self._is_harmless(True))

    def _is_harmless(self, value: object) -> bool:
        """Whether this value is among the harmless ones; unlike in Python, 1 and true differ."""
        return any(one == value and isinstance(one, bool) == isinstance(value, bool) for one in self.harmless)


def is_empty(value: object) -> bool:
    """Whether a value asks for nothing whatever its field is called. (Zero is a value: temperature has it.)"""
    return _is_bare(value) or (
        isinstance(value, list | dict) and all(map(_is_bare, value.values() if isinstance(value, dict) else value))
    )


def _is_bare(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


ON_OR_OFF = (True, False)
"""Harmless values of a switch that turns nothing here."""

EMPTY_SCHEMAS: tuple[dict[str, object], ...] = (
    {"enum": list(EMPTY)},
    {"type": "array", "items": {"enum": list(EMPTY)}},
    {"type": "object", "additionalProperties": {"enum": list(EMPTY)}},
)
"""What is empty, as JSON schemas."""


def empty_schemas(row: Foreign) -> list[dict[str, object]]:
    """JSON schemas of the empty values that this row takes as asking for nothing."""
    return [{"enum": [value for value in EMPTY if row.asks_for_nothing(value)]}, *EMPTY_SCHEMAS[1:]]


IGNORED = Foreign(any_value=True)
HINT = Foreign(hint=True)


def ignored(*names: str) -> dict[str, Foreign]:
    return dict.fromkeys(names, IGNORED)


def hints(*names: str) -> dict[str, Foreign]:
    return dict.fromkeys(names, HINT)


def refused(reason: str, names: Iterable[str]) -> dict[str, Foreign]:
    return {name: Foreign(reason) for name in names}


_TEXT_ONLY = "this server reads and writes text only"

BODY: Mapping[str, Foreign] = {
    # OpenAI: who asks, labels, price, copies and caches of theirs; a prediction makes the same reply come sooner.
    **ignored("user", "safety_identifier", "metadata", "store", "service_tier", "prediction"),
    **ignored("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    **ignored("user_id", "betas", "anthropic_beta"),
    "verbosity": HINT,
    "moderation": Foreign("no moderation model runs here"),
    # Names of a request or of a conversation, and how often a stream is flushed: vLLM, SGLang, LiteLLM.
    **ignored(
        "request_id", "rid", "session_id", "extra_key", "custom_labels", "litellm_metadata", "litellm_session_id"
    ),
    **ignored("litellm_call_id", "litellm_trace_id", "stream_interval", "cache_control", "caching", "num_retries"),
    **ignored("spaces_between_special_tokens", "return_mm_kwargs", "return_token_offsets", "media_io_kwargs"),
    **ignored("mm_payload", "return_flat_raw_top_logprobs_b64", "return_spec_tokens_details"),
    "detokenize": Foreign("ask for 'return_token_ids'", harmless=(True,)),
    "response_format": Foreign(
        "say by this endpoint's own field what the reply is to match", harmless=({"type": "text"},)
    ),
    "length_penalty": Foreign("of a beam search, in /v1/chat/completions", harmless=(1, 1.0)),
    "reasoning_format": Foreign("a chat's: use /v1/chat/completions", harmless=("auto",)),
    "thinking": Foreign("a chat's: use /v1/chat/completions", harmless=({"type": "disabled"},)),
    "early_stopping": Foreign("beams are searched to their end"),
    "truncation": Foreign("use 'truncate_prompt_tokens'", harmless=("disabled",)),
    "num_beams": Foreign("use 'use_beam_search' with 'n'", harmless=(1,)),
    "routed_experts_prompt_start": Foreign("experts are not told", harmless=(0,)),
    "routed_experts_start_len": Foreign("experts are not told", harmless=(0,)),
    **refused("experts and hidden states are not told", ("return_routed_experts", "return_hidden_states")),
    **refused("one release of the weights is served", ("return_weight_versions",)),
    **refused(
        "ask for 'return_token_ids'",
        (
            "return_input_ids_in_sglext",
            "return_output_ids_in_sglext",
            "enable_response_messages",
            "previous_input_messages",
        ),
    ),
    **refused(
        "ask for 'logprobs' and 'top_logprobs'",
        ("return_sampling_mask", "sampling_logprobs_mode", "return_flat_raw_output_top_logprobs"),
    ),
    **refused("the usage tells 'cached_tokens'", ("return_cached_tokens_details", "return_meta_info")),
    **refused(
        "the server is not one of several that share a prompt",
        ("kv_transfer_params", "ec_transfer_params", "bootstrap_host", "bootstrap_port", "bootstrap_room"),
    ),
    **ignored("routed_dp_rank", "disagg_prefill_dp_rank", "data_parallel_rank"),
    **refused("one model without adapters is served", ("lora_path", "lora_request", "adapter_id", "ngram_corpus_id")),
    **refused(
        "no code of a request's own is run",
        ("custom_logit_processor", "custom_params", "logits_processors", "vllm_xargs", "session_params"),
    ),
    **refused(
        _TEXT_ONLY,
        ("prompt_embeds", "mm_processor_kwargs", "images_config", "video_config", "audio", "use_audio_in_video"),
    ),
    **refused(_TEXT_ONLY, ("max_dynamic_patch", "min_dynamic_patch", "image_data", "video_data", "audio_data")),
    # How a client calls: LiteLLM's, LangChain's and LlamaIndex's own settings, where they reach the body.
    **ignored("max_retries", "api_key", "api_base", "api_version", "base_url"),
    **ignored("custom_llm_provider", "drop_params", "additional_drop_params", "litellm_params", "model_info"),
    **ignored(
        "extra_headers",
        "headers",
        "default_headers",
        "tags",
        "no-log",
        "proxy_server_request",
        "streaming",
        "anthropic_version",
    ),
    # Which of several models or providers, how it is paid, whose conversation it is: OpenRouter, gateways, Open WebUI.
    **ignored("provider", "route", "keep_alive"),
    **hints("timeout", "request_timeout", "models", "fallbacks", "context_window_fallback_dict", "num_ctx"),
    **ignored("chat_id", "conversation_id", "thread_id", "session", "client_metadata", "trace", "x_request_id"),
    **ignored("message_id", "model_item", "background_tasks", "prompt_cache_isolation_key", "client_request_id"),
    **hints("usage", "transforms", "prompt_mode", "details", "perf_metrics_in_response"),
    "context_length_exceeded_behavior": Foreign("use 'truncate_prompt_tokens': -1", harmless=("error",)),
    "plugins": Foreign("the server reaches no web and runs no plugins"),
    "guardrails": Foreign("no guardrails run here"),
    "safe_prompt": Foreign("write it into a system message"),
    "options": Foreign("write its fields beside 'messages' or 'prompt'"),
    "mock_response": Foreign("replies are the model's"),
    # llama.cpp: places in its cache, what its replies tell beside the text, samplers that are off at these values.
    **ignored("cache_prompt", "use_cache", "id_slot", "slot_id", "n_keep", "n_discard", "n_cache_reuse", "penalize_nl"),
    **ignored("mirostat_tau", "mirostat_eta", "dry_base", "dry_allowed_length", "dry_penalty_last_n"),
    **ignored("dry_sequence_breakers", "xtc_threshold", "dynatemp_exponent", "adaptive_decay", "chat_format"),
    **ignored("preserved_tokens", "parse_tool_calls", "backend_sampling"),
    **refused("a grammar holds from the beginning of a reply", ("grammar_lazy", "grammar_triggers")),
    **hints("samplers", "repeat_last_n", "timings_per_token", "verbose", "return_progress"),
    "typical_p": Foreign("use 'top_p'", harmless=(1, 1.0)),
    "typ_p": Foreign("use 'top_p'", harmless=(1, 1.0)),
    "tfs_z": Foreign("use 'min_p'", harmless=(1, 1.0)),
    "top_a": Foreign("use 'min_p'", harmless=(0, 0.0)),
    "top_n_sigma": Foreign("use 'min_p'", harmless=(-1, -1.0, 0, 0.0)),
    "mirostat": Foreign("use 'temperature' with 'min_p' or 'top_p'", harmless=(0,)),
    "dry_multiplier": Foreign("use 'repetition_penalty' or 'frequency_penalty'", harmless=(0, 0.0)),
    "xtc_probability": Foreign("use 'temperature' with 'min_p'", harmless=(0, 0.0)),
    "dynatemp_range": Foreign("use 'temperature'", harmless=(0, 0.0)),
    "adaptive_target": Foreign("use 'temperature'", harmless=(-1, -1.0)),
    "min_keep": Foreign("use 'top_k'", harmless=(0, 1)),
    "n_probs": Foreign("use 'logprobs'", harmless=(0,)),
    "top_n_tokens": Foreign("use 'logprobs'", harmless=(0,)),
    "n_indent": Foreign("use a 'grammar'", harmless=(0,)),
    "t_max_predict_ms": Foreign("use 'timeout_s'", harmless=(0, -1)),
    "stop_regex": Foreign("give 'stop' strings, or a 'regex' that the whole reply matches"),
    "logprob_token_ids": Foreign("ask for 'top_logprobs' (or 'logprobs')"),
    "return_tokens_as_token_ids": Foreign("ask for 'return_token_ids'"),
    "repetition_detection": Foreign("use 'repetition_penalty' or 'frequency_penalty'"),
    **refused("replies are not marked", ("watermark", "watermarking")),
    "thinking_token_budget": Foreign("limit the reply by 'max_tokens'", harmless=(-1,)),
    "suffix": Foreign("models served here complete at the end only"),
    # Fields of chats that completions may carry where they ask for nothing, and the reverse.
    "modalities": Foreign(_TEXT_ONLY, harmless=(["text"],)),
    "tool_choice": Foreign("a call is a chat's: use /v1/chat/completions", harmless=("none", "auto")),
    "tools": Foreign("a call is a chat's: use /v1/chat/completions"),
    "function_call": Foreign("a call is a chat's: use /v1/chat/completions", harmless=("none", "auto")),
    "messages": Foreign("a chat's: use /v1/chat/completions"),
    **dict.fromkeys(
        ("parallel_tool_calls", "include_reasoning", "separate_reasoning", "stream_reasoning", "add_generation_prompt"),
        Foreign("a chat's: use /v1/chat/completions", harmless=ON_OR_OFF),
    ),
    **hints("reasoning_effort", "reasoning"),
    "return_prompt_text": Foreign("ask for 'return_token_ids'"),
    "return_prompt_token_ids": Foreign("ask for 'return_token_ids'"),
    **refused("an Anthropic field: use 'response_format' and 'reasoning_effort'", ("output_config", "output_format")),
    "format": Foreign("an Ollama field: use 'response_format'"),
    **refused("a field of /v1/responses: ask there", ("input", "instructions", "text", "previous_response_id")),
    "system": Foreign("write it into a message of the role 'system'"),
    "best_of": Foreign("of /v1/completions; use 'n'", harmless=(1,)),
    "n": Foreign("send as many requests, or use /v1/completions", harmless=(1,)),
    "top_logprobs": Foreign("use 'logprobs'", harmless=(0,)),
    "stream_options": IGNORED,  # where it isn't known the usage is told anyway
    "logprob_start_len": Foreign("use 'prompt_logprobs'", harmless=(-1,)),
}
"""Foreign fields of the bodies of /v1/completions, /v1/chat/completions, /generate, /tokenize and /detokenize."""

_OPENAIS = "of OpenAI's endpoints: ask there, or by a field of this one"
DIALECT: Mapping[str, Foreign] = {
    **BODY,
    **dict.fromkeys(("skip_special_tokens", "do_sample"), Foreign(_OPENAIS, harmless=(True,))),
    "add_special_tokens": Foreign(_OPENAIS, harmless=ON_OR_OFF),
    **dict.fromkeys(("min_p", "min_tokens", "min_new_tokens", "priority"), Foreign(_OPENAIS, harmless=(0, 0.0))),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), Foreign(_OPENAIS, harmless=(0, 0.0))),
    **dict.fromkeys(("top_p", "repetition_penalty", "repeat_penalty"), Foreign(_OPENAIS, harmless=(1, 1.0))),
    "top_k": Foreign(_OPENAIS, harmless=(-1, 0)),
    "seed": Foreign(_OPENAIS, harmless=(-1,)),
    "truncation_side": Foreign(_OPENAIS, harmless=("left",)),
    **ignored("pad_token_id", "clean_up_tokenization_spaces"),
    "no_repeat_ngram_size": Foreign("use 'repetition_penalty'", harmless=(0,)),
}
"""Foreign fields of bodies of other dialects: those that routers write into every body, at their defaults."""

CHAT: Mapping[str, Foreign] = {
    **BODY,
    "functions": Foreign("use 'tools'"),
    "function_call": Foreign("use 'tool_choice'", harmless=("none", "auto")),
    "prompt": Foreign("a completion's: use /v1/completions"),
    **refused("the server reaches no web", ("enable_search", "search_parameters", "search_settings", "search_options")),
    **ignored("incremental_output", "result_format", "compound_custom", "disable_tool_validation"),
    "citation_options": HINT,
    "thinking_budget": Foreign("limit the reply by 'max_tokens'", harmless=(-1,)),
    "web_search_options": Foreign("the server reaches no web"),
    "echo": Foreign("a chat's prompt is not repeated; 'continue_final_message' goes on with a message"),
    "chat_template": Foreign("the model's own template is used"),
    "chat_template_content_format": Foreign("texts of a message are joined", harmless=("auto", "string", "openai")),
    "input_ids": Foreign("send them as the 'prompt' of /v1/completions"),
    "task": Foreign("ask for it in a message"),
}
"""Foreign fields of the body of /v1/chat/completions."""

OF_A_REPLY: Mapping[str, Foreign] = {
    **ignored("tool_choice", "parallel_tool_calls", "response_format", "structured_outputs", "n", "seed", "rope"),
    **ignored("guided_json", "guided_regex", "guided_choice", "guided_grammar", "speculation"),
    **ignored("max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p"),
    **ignored("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "ignore_eos"),
    **ignored("stop", "stop_token_ids", "include_stop_str_in_output", "no_stop_trim", "skip_special_tokens"),
    **ignored("allowed_token_ids", "bad_words", "return_token_ids", "stream", "stream_options", "stream_reasoning"),
    **ignored("cache_salt", "priority", "timeout_s", "logprobs", "top_logprobs", "prompt_logprobs"),
    **ignored("use_beam_search", "length_penalty", "best_of"),
}
"""Fields of a chat that change nothing in its prompt."""

STREAM_OPTIONS: Mapping[str, Foreign] = ignored("include_obfuscation")  # padding against traffic analysis

MESSAGE: Mapping[str, Foreign] = {
    # What replies carry and histories send back: of OpenAI, vLLM, LiteLLM, LangChain, the Vercel SDK.
    **ignored("type", "id", "status", "phase", "created_at", "timestamp", "annotations", "cache_control", "metadata"),
    **ignored("provider_specific_fields", "provider_metadata", "providerOptions", "experimental_providerMetadata"),
    **ignored("response_metadata", "usage_metadata", "additional_kwargs", "thinking_blocks", "reasoning_details"),
    **ignored("reasoning_items", "weight", "finish_reason", "index", "token_ids"),
    "audio": Foreign(_TEXT_ONLY),
    "images": Foreign(_TEXT_ONLY),
    "tools": Foreign("give the request's own 'tools'"),
}
"""Foreign fields of a message."""

PART: Mapping[str, Foreign] = ignored(
    *("cache_control", "prompt_cache_breakpoint", "annotations", "id", "index", "logprobs", "providerOptions"),
    *("provider_specific_fields", "signature", "citations", "extras"),
)
"""Foreign fields of a part of a message's content."""

TOOL_CALL: Mapping[str, Foreign] = ignored(
    "index", "cache_control", "provider_specific_fields", "extra_content", "caller", "status"
)
FREE_TOOL = "a tool of free text is a function with one parameter of the type string, whose 'pattern' may be a regex"
TOOL: Mapping[str, Foreign] = {
    **ignored("cache_control", "eager_input_streaming"),
    "defer_loading": Foreign("all tools are told to the model"),
    "custom": Foreign(FREE_TOOL),
}
FUNCTION: Mapping[str, Foreign] = {**TOOL, **ignored("returns", "return", "response", "output_schema")}
FORMAT: Mapping[str, Foreign] = ignored("strict", "description")
"""Foreign fields of `response_format.json_schema`: a schema is followed whether it is called strict or not."""
