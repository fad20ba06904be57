"""Measurements: how fast the server is beside its peers, and how well each position method reads a long text.

A question is a module or a folder here, `python -m bench.QUESTION`; what they share is in `bench.shared`. Nothing is
imported by the product. Results are written under `bench/out/`, which git ignores.
"""

from pathlib import Path

OUTPUT_FOLDER = Path(__file__).parent / "out"


class BenchError(Exception):
    """Why nothing can be measured; the message is for the user."""
