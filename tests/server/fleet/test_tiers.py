"""A folder that outlives servers, attacked: damaged between two starts, asked with other keys and salts, and shared."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import httpx
import pytest

TEXTS = [f"The {name} of the house is painted {colour}. " * 12 for name, colour in (("door", "red"), ("roof", "blue"))]


def ask(url: str, *, key: str = "one", turned: bool = False, **more: Any) -> Any:
    documents = TEXTS[::-1] if turned else TEXTS
    body = {"prompt": "Which colour?", "documents": documents, "max_tokens": 8, "temperature": 0, **more}
    reply = httpx.post(f"{url}/generate", json=body, headers={"authorization": f"Bearer {key}"}, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def found(reply: Any) -> int:
    return sum(document["cached_tokens"] for document in reply["documents"])


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"prerope:{name}_total"))


def damage(path: Path, dice: random.Random, others: list[Path]) -> None:
    """As a crash, a bad disk or a hand would."""
    content = bytearray(path.read_bytes())
    match dice.randrange(5):
        case 0:
            path.write_bytes(content[: dice.randrange(len(content))])
        case 1:
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            path.write_bytes(content)
        case 2:
            path.write_bytes(dice.choice(others).read_bytes())
        case 3:
            path.write_bytes(b"")
        case 4:
            path.write_bytes(dice.randbytes(len(content)))


@pytest.mark.slow
def test_a_folder_of_blocks_is_never_a_wrong_answer(serve: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tier"

    def start() -> str:
        url = serve(model_id=str(tiny_checkpoint), max_model_len=1024, api_key="one,two", cache_tier_dir=folder)
        return str(url)

    url = start()
    cold, cold_turned = ask(url), ask(url, cache_salt="cold", turned=True)
    assert found(cold) == found(cold_turned) == 0
    serve.stop_all()
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    assert all(path.stat().st_mode & 0o077 == 0 for path in (folder, *folder.rglob("*")) if path != folder)

    url, neighbour = start(), start()  # two at once, on one folder
    for one in (url, neighbour):
        warm = ask(one, turned=True)
        assert found(warm) > 100
        assert warm["token_ids"] == cold_turned["token_ids"]
    assert found(ask(url, key="two")) == 0
    assert found(ask(url, cache_salt="other")) == 0
    serve.stop_all()

    dice = random.Random(1)
    files = sorted(folder.rglob("*.safetensors"))
    for path in dice.sample(files, len(files) // 2):
        damage(path, dice, [other for other in files if other != path])
    url = start()
    for turned in (False, True):
        reply = ask(url, turned=turned)
        assert reply["token_ids"] == (cold_turned if turned else cold)["token_ids"]
    assert metric(url, "tier_files_damaged") >= 1
    serve.stop_all()

    for path in (path for path in folder.rglob("*.safetensors")):  # a disk that went away
        path.unlink()
    assert ask(start())["token_ids"] == cold["token_ids"]
