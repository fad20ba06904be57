"""What clients of other servers ask for that is not served here: what it is, and what to use instead."""

from __future__ import annotations

_TEXT = "this server writes text (/v1/chat/completions, /v1/completions)"
_INSTEAD = {
    "embeddings": f"embeddings: {_TEXT}; serve an embedding model beside it, e.g. with text-embeddings-inference",
    "rankings": f"scores of documents: {_TEXT}; serve a reranker beside it, e.g. with text-embeddings-inference",
    "images": f"images: {_TEXT}",
    "videos": f"videos: {_TEXT}",
    "audio": f"speech: {_TEXT}; transcribe beside it, e.g. with whisper.cpp, and send the text",
    "moderations": "moderation: no moderation model runs here; ask for a judgement in a chat, with a 'choice'",
    "files": "files and batches: send requests at once, as many as you like; they run together",
    "assistants": "assistants, threads and vector stores: conversations are their client's, or go on by the "
    "'previous_response_id' of /v1/responses; documents stand in the request",
    "tuning": "training: serve the tuned checkpoint, as MODEL_ID",
    "realtime": "speech in real time: stream text from /v1/responses or /v1/chat/completions",
    "infill": "text in between: models served here complete at the end only (/v1/completions)",
    "completion": "completions at this path: they are at /v1/completions, with llama.cpp's names for its fields",
    "compaction": "summaries in place of a conversation: it goes on whole, by 'previous_response_id' or its items",
    "models": "models by their clients' wish: one is served, which is chosen at the start (MODEL_ID)",
}
_PATHS = {
    "embeddings": ("/v1/embeddings", "/embeddings", "/embedding", "/embed", "/pooling", "/v2/embed"),
    "rankings": ("/v1/rerank", "/v2/rerank", "/rerank", "/reranking", "/v1/score", "/score", "/classify"),
    "images": ("/v1/images",),
    "videos": ("/v1/videos",),
    "audio": ("/v1/audio",),
    "moderations": ("/v1/moderations",),
    "files": ("/v1/files", "/v1/batches", "/v1/uploads", "/v1/messages/batches"),
    "assistants": ("/v1/assistants", "/v1/threads", "/v1/vector_stores", "/v1/conversations", "/v1/containers"),
    "tuning": ("/v1/fine_tuning", "/v1/fine-tunes", "/v1/evals"),
    "realtime": ("/v1/realtime",),
    "infill": ("/infill", "/v1/fim"),
    "completion": ("/completion",),
    "compaction": ("/v1/responses/compact",),
    "models": ("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/v1/load_lora_adapter"),
}
_KINDS = {path: kind for kind, paths in _PATHS.items() for path in paths}
_MOST_PARTS = max(path.count("/") for path in _KINDS)


def instead_of(path: str) -> str | None:
    """The message for a path that has no route, where it is one of others."""
    parts = path.split("/", _MOST_PARTS + 1)[: _MOST_PARTS + 1]
    starts = ("/".join(parts[:length]) for length in range(len(parts), 1, -1))
    kind = next((_KINDS[start] for start in starts if start in _KINDS), None)
    return None if kind is None else f"Not served here: {_INSTEAD[kind]}."
