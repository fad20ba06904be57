"""Blocks of the KV cache: the pool, the prefixes that it knows, and the block tables of sequences."""
