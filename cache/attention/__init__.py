"""Attention over raw keys: what it is given, its specification, and the dispatch by device."""
