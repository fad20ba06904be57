"""The documentation says what the code does: settings, targets, links, and messages are those that there are."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from prerope.server.cli.files import documents_of
from prerope.server.flags import TABLE_BEGIN, TABLE_END, environment_table
from prerope.server.models.checkpoint import Checkpoint
from prerope.server.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(?:#[^)\s]*)?\)")
PATH = re.compile(r"(?<![\w./:{-])(?<!git log -- )(?:bench|cache|docker|examples|rope|server|tests)/[\w/.-]*\w")
WRITTEN = "bench/out/"
"""What a command writes, and no file of the repository."""
TWO_SCREENS = 100


def test_the_page_of_settings_has_the_table_of_variables() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page.count(TABLE_BEGIN) == page.count(TABLE_END) == 1
    table = page.split(TABLE_BEGIN)[1].split(TABLE_END)[0].strip()
    assert table == environment_table(), "run `make docs` to write the table anew"


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z]+)", page.read_text(encoding="utf-8"))) <= targets, page


def test_links_lead_to_files_of_the_repository() -> None:
    found = [(page, target) for page in PAGES for target in LINK.findall(page.read_text(encoding="utf-8"))]
    assert len(found) > 60
    assert [(str(page), target) for page, target in found if not (page.parent / target).exists()] == []


def test_paths_that_are_named_exist() -> None:
    found = [(page, path) for page in PAGES for path in PATH.findall(page.read_text(encoding="utf-8"))]
    assert len(found) > 80
    assert [
        (str(page), path) for page, path in found if not (ROOT / path).exists() and not path.startswith(WRITTEN)
    ] == []


def test_the_readme_is_two_screens() -> None:
    assert README.count("\n") <= TWO_SCREENS, "what is more has a page in docs/"


def test_files_that_the_readme_asks_about_fit_the_embedded_model(smollm2: Checkpoint) -> None:
    """As its tokenizer counts, with room for the question, the reply, and what the chat template writes around each."""
    command = re.search(r"prerope complete (.+?) --ask", README)
    assert command is not None
    documents = documents_of(ROOT / name for name in command[1].split())
    tokenizer = Tokenizer.load(smollm2)
    read = sum(len(tokenizer.encode(document.text)) for document in documents)
    assert 1000 < read < smollm2.config().max_position_embeddings - 1000


def test_pages_of_the_site_exist() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = {
        page for entry in site["nav"] for pages in (entry.values() if isinstance(entry, dict) else ()) for page in pages
    }
    assert len(named) > 15
    assert [
        page for page in named - {"api.md"} if not ((ROOT / "docs" / page).exists() or (ROOT / page).exists())
    ] == []


def test_every_message_of_troubleshooting_is_one_that_the_code_gives() -> None:
    """As it stands in the source; strings that are written over two lines are joined."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.+)`$", page, flags=re.MULTILINE)
    assert len(messages) > 12
    sources = [path for room in ("server", "rope") for path in (ROOT / room).rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    joined = re.sub(r'"\s*\n\s*f?"', "", text)
    assert [message for message in messages if message not in joined] == []
