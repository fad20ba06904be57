"""Constrained output: from request fields to a compiled grammar."""
