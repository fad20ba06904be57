"""Every setting of a deployment: name, default, range and meaning. Imports leaves alone.

A field `max_model_len` is the environment variable MAX_MODEL_LEN and the flag `--max-model-len` (see `server.flags`,
which also renders `--help` and docs/settings.md's table from these fields). An empty variable counts as unset.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from prerope.rope.spec import ALIASES, METHOD_NAMES, RopeSpec
from prerope.server import setting_types as types
from prerope.server.machine.places import default_cache_dir
from pydantic import ByteSize, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MEBIBYTE = 2**20


class Settings(BaseSettings):
    """One deployment. `json_schema_extra["allowed"]` says in words what the type cannot."""

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="forbid", frozen=True, validate_default=False)

    # The model
    model_id: str | None = Field(
        default=None,
        description="Model to serve; unset: the embedded SmolLM2-135M-Instruct",
        json_schema_extra={"allowed": "a local folder, a Hugging Face hub id or a .gguf file"},
    )
    served_model_name: str | None = Field(
        default=None,
        description="What clients call the model, and aliases; replies use the first, and requests for another name "
        "get a 404. Unset: the model's own name, and a request may name any",
        json_schema_extra={"allowed": "names separated by commas"},
    )
    generation_config: types.GenerationConfig = Field(
        default="auto",
        description="How tokens are chosen where a request does not say. auto: as the model's generation_config.json "
        "recommends (temperature, top_p, top_k, min_p, repetition_penalty); none: temperature 1 and nothing else",
    )
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of a hub model",
        json_schema_extra={"allowed": "a git revision"},
    )
    dtype: types.Dtype = Field(default="auto", description="Of weights and activations; auto: as the checkpoint says")
    device: types.Device = Field(
        default="auto",
        description="Where the model runs; auto: the first GPU, else the CPU",
        json_schema_extra={"allowed": "auto, cpu, cuda or cuda:N"},
    )
    weight_quantization: types.WeightQuantization = Field(
        default="none",
        description="Of linear layers, the output head left out. int8: half the bytes of bfloat16, with a scale for "
        "each output; on the CPU, with torchao installed",
    )
    tensor_parallel_size: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes that compute the model together, each with its share of the weights and of the KV heads "
        "and a GPU of its own. KV_CACHE_MEMORY is of each",
    )
    cache_dir: types.Folder = Field(
        default_factory=default_cache_dir,
        description="Where converted copies of GGUF models and the built C kernels are kept",
        json_schema_extra={"allowed": "a writable folder", "default": "$XDG_CACHE_HOME/prerope, else ~/.cache/prerope"},
    )

    # The HTTP server
    host: str = Field(
        default="127.0.0.1",
        description="Address to listen on; 0.0.0.0 for every interface",
        json_schema_extra={"allowed": "an address or a host name"},
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one")
    allowed_hosts: str | None = Field(
        default=None,
        description="Names that requests may call the server by (the Host header). Unset, where keys are asked for: "
        "any; else addresses and names that nobody can register (localhost, one label, .local, .internal), so that no "
        "page of the web reaches a server without keys by DNS rebinding",
        json_schema_extra={"allowed": "names separated by commas, *.example.com for all below one, or *"},
    )
    max_connections: int = Field(
        default=2048,
        ge=1,
        le=1_000_000,
        description="Connections at once, or what `ulimit -n` leaves room for. One more takes the place of the one "
        "that has waited for its client longest (idle, or with a body half sent or a reply unread), and gets a 503 "
        "where all wait for the server",
    )
    keep_alive_s: int = Field(
        default=75,
        ge=1,
        description="Seconds that a connection may be idle between two requests; more than that of a proxy before it",
    )
    api_key: types.ApiKeys | None = Field(
        default=None,
        description="Keys of which a request must carry one (Authorization: Bearer KEY); unset: no key is asked for",
        json_schema_extra={"allowed": "one key, or several separated by commas"},
    )
    api_key_file: types.KeyFile | None = Field(
        default=None,
        description="More keys, from a file that is read again within a second of a change; while it cannot be read "
        "or holds none, its last keys go on",
        json_schema_extra={"allowed": "a readable file with one key a line; lines that begin with # are comments"},
    )
    metrics_key: types.ApiKeys | None = Field(
        default=None,
        description="Keys of which a request to /metrics must carry one; unset: it is open, and who reads it twice "
        "learns how many tokens others sent between",
        json_schema_extra={"allowed": "one key, or several separated by commas"},
    )
    max_seqs_per_key: int | None = Field(
        default=None,
        ge=1,
        description="Sequences (prompts times choices; any other POST is one) that requests with one key may have at "
        "once, each until its reply has ended, before a 429; unset: any number. Not without keys",
    )
    cors_allow_origin: str | None = Field(
        default=None,
        description="Origins whose pages may call the API from a browser",
        json_schema_extra={"allowed": "origins separated by commas, or *"},
    )
    max_body_bytes: ByteSize = Field(
        default=ByteSize(16 * MEBIBYTE), ge=1024, description="Largest request body; a larger one gets a 413"
    )
    strict_fields: bool = Field(
        default=True,
        description="Refuse fields of a request that are not honoured and ask for something. false: leave them out, "
        "name them in the reply's header x-ignored-fields, and log them",
    )
    client_timeout_s: float = Field(
        default=60.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a client may leave the server waiting, with the next piece of its body or with its "
        "reply unread, before its connection is cut; a body must also come at 16 KiB a second, after as many seconds",
    )

    # Positions
    rope_method: types.Method = Field(
        default="auto",
        description="How positions are read. auto: plain within the trained length and the best row-consistent method "
        "past it; model: as the model's config says",
        json_schema_extra={
            "allowed": ", ".join(METHOD_NAMES) + "; " + ", ".join(f"{a} is {m}" for a, m in ALIASES.items())
        },
    )
    rope_factor: float | None = Field(
        default=None,
        ge=1,
        allow_inf_nan=False,
        description="Target length ÷ trained length; unset: MAX_MODEL_LEN ÷ trained length",
    )
    rope_window: int | None = Field(
        default=None,
        ge=1,
        description="Tokens read at their exact distance by windowed methods; unset: a quarter of the trained length, "
        "for string a third",
    )
    rope_leak: float | None = Field(
        default=None,
        ge=1,
        allow_inf_nan=False,
        description="leaky_rerope: tokens past the window that count as one position",
    )
    rope_group: int | None = Field(
        default=None,
        ge=1,
        description="self_extend: tokens that share a far position; jagged_rerope: tokens that are near or far "
        "together",
    )
    rope_groups: types.Groups = Field(
        default=None,
        description="dpe: tokens that share a far position, of each of as many equal shares of the pairs of dims, the "
        "fastest first, as in 2-8-2-8-32-32-32-4; unset: one for all",
        json_schema_extra={"allowed": "powers of two between hyphens"},
    )
    rope_sinks: int | None = Field(
        default=None, ge=0, description="streaming: tokens at the beginning of a prompt that every row reads"
    )
    rope_select: int | None = Field(
        default=None,
        ge=1,
        description="Far tokens that a row of a reply reads, chosen by its query (on a CPU): long prompts then cost "
        "little more a token than short ones; unset: all",
    )
    rope_logn: bool = Field(default=False, description="Scale row i's query by max(1, ln(i+1) ÷ ln(trained length))")
    rope_train_length: int | None = Field(
        default=None, ge=2, description="Trained length in tokens; unset: as the model's config says"
    )
    rope_layers: types.Layers = Field(
        default={},
        description="What auto is in some of the attention layers, counted from 0, as in "
        "5-9+12=rerope:window=2048,20-29=streaming, with parameters of its own; unset: what it is in all",
        json_schema_extra={
            "allowed": "LAYERS=METHOD between commas, as in 5-9+12=rerope:window=2048; any method but auto",
            "default": "unset",
        },
    )
    rope_per_request: bool = Field(default=True, description="May a request choose its own method (the field `rope`)")

    # The engine
    max_model_len: int | None = Field(
        default=None, ge=1, description="Tokens of prompt and output together; unset: from the method and the cache"
    )
    max_num_seqs: int | None = Field(
        default=None, ge=1, le=4096, description="Sequences in one step; unset: 256 on a GPU, 64 on a CPU"
    )
    max_batched_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1_048_576,
        description="Token budget of one step, prefill chunks and decode steps together; unset: 2048 on a GPU, 512 on "
        "a CPU",
    )
    stream_gap_s: float = Field(
        default=0.5,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a running stream may wait for its next token while prompts are read: their chunks "
        "are sized for it, down to a token where need be, and shorter where that costs a prompt a tenth of its rate. "
        "Two steps of a stream by itself (0.04 for a small model on a CPU) keep all gaps within three, for half of the "
        "rate at which prompts are read meanwhile",
    )
    kv_block_size: int = Field(default=16, ge=1, le=1024, description="Tokens in a cache block")
    kv_cache_memory: ByteSize | None = Field(
        default=None,
        ge=MEBIBYTE,
        description="Memory for keys and values; unset: on a GPU what the largest steps leave, on a CPU from what is "
        "free",
    )
    state_cache_memory: ByteSize | None = Field(
        default=None,
        ge=1024,
        description="Of KV_CACHE_MEMORY, what states of recurrent layers take (hybrid models: Qwen3.5, LFM2, Granite "
        "4): one of each running sequence, and those kept for later prompts with the same beginning. Unset: three for "
        "each of MAX_NUM_SEQS, a quarter of that memory at most",
    )
    gpu_memory_utilization: float = Field(
        default=0.9,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Share of the GPU's memory that the process may use: weights, steps, keys and values",
    )
    cuda_graphs: bool = Field(
        default=True, description="On a GPU, launch a decode step as one CUDA graph; they are captured at the start"
    )
    speculation: types.Speculation = Field(
        default="auto",
        description="auto: guess tokens ahead, from what a sequence has read and written before, and check them in one "
        "step, where the measured times of steps say that it pays. On the CPU, in "
        "fp32 and bf16 without AMX, tokens are the same as without; elsewhere that is not shown. Not for models with "
        "recurrent layers",
    )
    kv_cache_dtype: types.Dtype = Field(default="auto", description="Of keys and values; auto: as the activations")
    prefix_caching: bool = Field(
        default=True, description="Reuse the blocks of earlier prompts with the same beginning"
    )
    prefix_sharing: types.PrefixSharing = Field(
        default="key",
        description="Who may reuse whose prefixes. key: requests with the same API key, so that nobody can time or "
        "count what others sent; all: everybody. Without keys all do; a request's cache_salt separates further",
    )
    cache_tier_dir: Path | None = Field(
        default=None,
        description="Folder in which keys and values of prefixes and documents outlive the process; unset: none",
        json_schema_extra={"allowed": "a writable folder"},
    )
    cache_tier_size: ByteSize = Field(
        default=ByteSize(10 * 2**30), ge=MEBIBYTE, description="Most that CACHE_TIER_DIR holds; the oldest goes first"
    )
    cache_tier_memory: ByteSize = Field(
        default=ByteSize(0),
        ge=0,
        description="Host memory for keys and values that the cache has no room for; 0: none. For GPUs",
    )
    priority_per_request: bool | None = Field(
        default=None,
        description="May a request choose its place in the queue (the field `priority`, a step of which counts as 30 s "
        "of waiting, up to ten). Unset: where no keys are asked for, so that no key is served at the cost of others",
    )
    max_queued_requests: int = Field(
        default=1024, ge=1, description="Waiting sequences (prompts times choices) before a 429"
    )
    max_queued_tokens: int = Field(
        default=4_000_000, ge=1, description="Prompt tokens of waiting requests before a 429"
    )
    request_timeout_s: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds after which a request is aborted, and the longest `timeout_s` of a request; unset: never",
    )
    step_timeout_s: float = Field(
        default=600.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds after which a step of the engine that has not ended counts as hung: /health, /ready and "
        "/live are 503 and requests are refused until it ends, and the log says which step it is. More than the "
        "longest step takes, of MAX_BATCHED_TOKENS rows behind a long prompt",
    )
    shutdown_timeout_s: float = Field(
        default=25.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds that running requests get to finish after SIGTERM or SIGINT",
    )
    shutdown_notice_s: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds after SIGTERM or SIGINT in which /health says 503 and requests are still taken, before "
        "the drain: as long as a router takes to look twice, so that it sends nobody to a replica that refuses",
    )

    # The log
    log_level: types.LogLevel = Field(default="info", description="Least severe line that is written")
    log_format: types.LogFormat = Field(default="text", description="Lines for people, or one JSON object a line")

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The accepted keys of API_KEY; those of API_KEY_FILE, which may change, are not among them."""
        return types.listed(self.api_key.get_secret_value() if self.api_key else None)

    @property
    def metrics_keys(self) -> tuple[str, ...]:
        return types.listed(self.metrics_key.get_secret_value() if self.metrics_key else None)

    @property
    def host_names(self) -> tuple[str, ...]:
        """Those of ALLOWED_HOSTS."""
        return types.listed(self.allowed_hosts)

    @property
    def asks_for_key(self) -> bool:
        """Whether requests need a key."""
        return bool(self.api_keys) or self.api_key_file is not None

    @property
    def cors_origins(self) -> tuple[str, ...]:
        return types.listed(self.cors_allow_origin)

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names of SERVED_MODEL_NAME."""
        return types.listed(self.served_model_name)

    def rope_spec(self) -> RopeSpec:
        """The deployment's position method, unresolved."""
        return RopeSpec(**{field.name: getattr(self, f"rope_{field.name}") for field in fields(RopeSpec)})
