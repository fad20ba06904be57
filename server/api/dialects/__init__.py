"""Other servers' ways of saying the same: Anthropic's, OpenAI's Responses, Ollama's, TGI's and SGLang's.

Each is an adapter of two halves: a request model whose `lowered()` is the internal request, and printing of what comes.
"""
