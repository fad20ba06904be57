"""Drafts from a sequence's own past: what they are, how likely they are right, and how many are worth their rows."""
