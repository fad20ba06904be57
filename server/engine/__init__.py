"""Scheduling and the forward pass. Knows token ids only: neither HTTP, metrics nor a tokenizer."""
