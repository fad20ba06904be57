"""What the site has beside docs/: pages of the repository that stand elsewhere, figures, and the API from the code.

Links in all pages are those of the repository, so that they work where the files are read. Here they are turned into
the site's; a link to a file that is no page becomes its name.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md"} | {
    path: path for path in ("ARCHITECTURE.md", "CHANGELOG.md", "rope/METHODS.md", "bench/RESULTS.md")
}
"""File of the repository → page of the site, where they are not in docs/."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add what is not in docs/."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    for figure in [*ROOT.glob("rope/figures/*.png"), *ROOT.glob("bench/figures/*.png")]:
        files.append(File.generated(config, figure.relative_to(ROOT).as_posix(), abs_src_path=str(figure)))
    files.append(File.generated(config, "api.md", content=api_page()))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """The repository's links as the site's."""
    place = page.file.src_uri
    source = next((path for path, uri in PAGES.items() if uri == place), f"docs/{place}")

    def turned(found: re.Match[str]) -> str:
        image, text, target, anchor = found.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        uri = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            assert (ROOT / path).exists(), f"{source}: {target} does not exist"
            return text
        return f"{image}[{text}]({posixpath.relpath(uri, posixpath.dirname(place) or '.')}{anchor or ''})"

    return LINK.sub(turned, markdown)


def api_page() -> str:
    """Every operation of the OpenAPI document with the fields that it takes."""
    sys.path.insert(0, str(ROOT))  # in a clone that is not installed
    from prerope.server.app import create_app
    from prerope.server.settings import Settings

    document = create_app(Settings()).openapi()
    schemas = document["components"]["schemas"]
    parts = [
        "# API\n\nWritten from the OpenAPI document, which a server has at `/openapi.json`, and readable at `/docs`.\n"
    ]
    for path, item in document["paths"].items():
        for verb, operation in item.items():
            parts.append(f"## `{verb.upper()} {path}`\n\n{operation.get('description', operation['summary'])}\n")
            for schema in _bodies(operation, schemas):
                parts.append(f"{_one_line(schema.get('description', ''))}\n\n{_fields(schema)}\n")
    return "\n".join(parts)


def _bodies(operation: dict[str, Any], schemas: dict[str, Any]) -> list[dict[str, Any]]:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    names = [one["$ref"].rsplit("/", 1)[1] for one in (content, *content.get("anyOf", ())) if "$ref" in one]
    return [schemas[name] for name in names]


def _fields(schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = ["| field | type | meaning |", "| --- | --- | --- |"]
    for name, field in schema.get("properties", {}).items():
        default = "" if field.get("default") in (None, [], {}, "") else f" Default: `{field['default']}`."
        meaning = _one_line(field.get("description", "")) + default + (" Required." if name in required else "")
        rows.append(f"| `{name}` | {_type(field)} | {meaning} |")
    return "\n".join(rows)


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(kind for one in field["anyOf"] if (kind := _type(one)) != "null"))
    if "$ref" in field:
        return str(field["$ref"]).rsplit("/", 1)[1]
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("type", "any"))


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
