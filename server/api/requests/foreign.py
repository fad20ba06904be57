"""Fields of others' request schemas that this server has no use for, and what each asks for: a table.

A field is taken without a word where its value asks for nothing: where it is empty (null, false, "", [] or {}), where
it is the default of the schema that it comes from, which routers write into every body, or where nothing that the user
gets depends on it. Anything else is refused by name, with the reason that stands here. Drawn from the schemas of the
openai client, vLLM, SGLang and its router, LiteLLM, LangChain, LlamaIndex, pydantic-ai, the Vercel SDK and Mistral.
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
        return self.any_value or self.hint or is_empty(value) or value in self.harmless


def is_empty(value: object) -> bool:
    """Whether a value asks for nothing whatever its field is called. (Zero is a value: temperature has it.)"""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


IGNORED = Foreign(any_value=True)
HINT = Foreign(hint=True)


def ignored(*names: str) -> dict[str, Foreign]:
    return dict.fromkeys(names, IGNORED)


def refused(reason: str, names: Iterable[str]) -> dict[str, Foreign]:
    return {name: Foreign(reason) for name in names}


_TEXT_ONLY = "this server reads and writes text only"

BODY: Mapping[str, Foreign] = {
    # OpenAI: who asks, labels, price, copies and caches of theirs; a prediction makes the same reply come sooner.
    **ignored("user", "safety_identifier", "metadata", "store", "service_tier", "prediction"),
    **ignored("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    "verbosity": HINT,
    "moderation": Foreign("no moderation model runs here"),
    # Names of a request or of a conversation, and how often a stream is flushed: vLLM, SGLang, LiteLLM.
    **ignored(
        "request_id", "rid", "session_id", "extra_key", "custom_labels", "litellm_metadata", "litellm_session_id"
    ),
    **ignored("litellm_call_id", "litellm_trace_id", "stream_interval", "cache_control", "caching", "num_retries"),
    **ignored("spaces_between_special_tokens", "return_mm_kwargs", "return_token_offsets", "media_io_kwargs"),
    "length_penalty": Foreign("beam search is not supported", harmless=(1, 1.0)),
    "early_stopping": Foreign("beam search is not supported"),
    "use_beam_search": Foreign("beam search is not supported; 'best_of' draws several and keeps the likeliest"),
    "routed_experts_prompt_start": Foreign("experts are not told", harmless=(0,)),
    "routed_experts_start_len": Foreign("experts are not told", harmless=(0,)),
    **refused("experts and hidden states are not told", ("return_routed_experts", "return_hidden_states")),
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
    **refused(_TEXT_ONLY, ("prompt_embeds", "mm_processor_kwargs", "images_config", "audio", "use_audio_in_video")),
    **refused(_TEXT_ONLY, ("max_dynamic_patch", "min_dynamic_patch", "image_data", "video_data", "audio_data")),
    "stop_regex": Foreign("give 'stop' strings, or a 'regex' that the whole reply matches"),
    "logprob_token_ids": Foreign("ask for 'top_logprobs' (or 'logprobs')"),
    "return_tokens_as_token_ids": Foreign("ask for 'return_token_ids'"),
    "repetition_detection": Foreign("use 'repetition_penalty' or 'frequency_penalty'"),
    "watermarking": Foreign("replies are not marked"),
    "thinking_token_budget": Foreign("limit the reply by 'max_tokens'", harmless=(-1,)),
    "ebnf": Foreign("write a 'guided_grammar' in Lark or GBNF"),
    "suffix": Foreign("models served here complete at the end only"),
}
"""Of a body of /v1/completions, /v1/chat/completions, /generate, /tokenize and /detokenize."""

CHAT: Mapping[str, Foreign] = {
    **BODY,
    "functions": Foreign("use 'tools'"),
    "function_call": Foreign("use 'tool_choice'", harmless=("none", "auto")),
    "modalities": Foreign(_TEXT_ONLY, harmless=(["text"],)),
    "web_search_options": Foreign("the server reaches no web"),
    "echo": Foreign("a chat's prompt is not repeated; 'continue_final_message' goes on with a message"),
    "chat_template": Foreign("the model's own template is used"),
    "chat_template_content_format": Foreign("texts of a message are joined", harmless=("auto", "string", "openai")),
    "input_ids": Foreign("send them as the 'prompt' of /v1/completions"),
    "task": Foreign("ask for it in a message"),
    "enable_thinking": Foreign("write 'chat_template_kwargs': {\"enable_thinking\": …}", harmless=(True,)),
    "thinking": Foreign("write it into 'chat_template_kwargs', by the name that the model's template has"),
    "reasoning": Foreign("use 'reasoning_effort'"),
}
"""Of a body of /v1/chat/completions."""

OF_A_REPLY: Mapping[str, Foreign] = {
    **ignored("tool_choice", "parallel_tool_calls", "response_format", "structured_outputs", "n", "seed", "rope"),
    **ignored("guided_json", "guided_regex", "guided_choice", "guided_grammar", "speculation"),
    **ignored("max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p"),
    **ignored("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "ignore_eos"),
    **ignored("stop", "stop_token_ids", "include_stop_str_in_output", "no_stop_trim", "skip_special_tokens"),
    **ignored("allowed_token_ids", "bad_words", "return_token_ids", "stream", "stream_options", "stream_reasoning"),
    **ignored("cache_salt", "priority", "timeout_s", "logprobs", "top_logprobs", "prompt_logprobs"),
    **ignored("include_reasoning", "separate_reasoning"),
}
"""Fields of a chat that change nothing in its prompt."""

STREAM_OPTIONS: Mapping[str, Foreign] = ignored("include_obfuscation")  # padding against traffic analysis

MESSAGE: Mapping[str, Foreign] = {
    # What replies carry and histories send back: of OpenAI, vLLM, LiteLLM, LangChain, the Vercel SDK.
    **ignored("type", "id", "status", "phase", "created_at", "timestamp", "annotations", "cache_control", "metadata"),
    **ignored("provider_specific_fields", "provider_metadata", "providerOptions", "experimental_providerMetadata"),
    **ignored("response_metadata", "usage_metadata", "additional_kwargs", "thinking_blocks", "reasoning_details"),
    **ignored("reasoning_items", "weight", "finish_reason", "index", "token_ids"),
    "function_call": Foreign("use 'tool_calls'"),
    "audio": Foreign(_TEXT_ONLY),
    "images": Foreign(_TEXT_ONLY),
    "tools": Foreign("give the request's own 'tools'"),
    "prefix": Foreign("use 'continue_final_message'"),
}
"""Of a message."""

PART: Mapping[str, Foreign] = ignored(
    *("cache_control", "prompt_cache_breakpoint", "annotations", "id", "index", "logprobs", "providerOptions"),
    *("provider_specific_fields", "signature", "citations", "extras"),
)
"""Of a part of a message's content."""

TOOL_CALL: Mapping[str, Foreign] = ignored(
    "index", "cache_control", "provider_specific_fields", "extra_content", "caller", "status"
)
TOOL: Mapping[str, Foreign] = {
    **ignored("cache_control", "eager_input_streaming"),
    "defer_loading": Foreign("all tools are told to the model"),
}
FUNCTION: Mapping[str, Foreign] = {**TOOL, **ignored("returns", "return", "response", "output_schema")}
FORMAT: Mapping[str, Foreign] = ignored("strict", "description")
"""Of `response_format.json_schema`: a schema is followed whether it is called strict or not."""
