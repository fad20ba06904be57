"""Whose a request is, and how much that key may hold at once."""
