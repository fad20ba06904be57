"""Layers that keep a state of a sequence beside keys and values."""
