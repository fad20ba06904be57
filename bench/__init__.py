"""Measurements: how fast the server is beside its peers, and how well each position method reads a long text.

Nothing here is imported by the product. Results are written under `bench/out/`, which git ignores.
"""

from pathlib import Path

OUTPUT_FOLDER = Path(__file__).parent / "out"
WIDTH = 160  # of tables that go to a file or a pipe; a terminal says its own
