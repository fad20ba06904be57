"""The README says what the code does: its table of variables is the one generated from the settings."""

from __future__ import annotations

import re
from pathlib import Path

from prerope.server.flags import TABLE_BEGIN, TABLE_END, environment_table

ROOT = Path(__file__).parent.parent


def test_the_readme_has_the_table_of_variables() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(TABLE_BEGIN) == readme.count(TABLE_END) == 1
    table = readme.split(TABLE_BEGIN)[1].split(TABLE_END)[0].strip()
    assert table == environment_table(), "run `make docs` to write the table anew"


def test_make_targets_named_in_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", readme)) <= targets
