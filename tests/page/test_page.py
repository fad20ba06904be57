"""The page in a browser, against a running server: what somebody does there, seen where they see it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from tests.page.conftest import PHONE, WIDE, Opener

pytestmark = pytest.mark.browser


def setting(page: Any, name: str, value: str) -> None:
    page.fill(f"#set-{name}", value)


def ask(page: Any, text: str = "Say something.", *, wait: bool = True) -> dict[str, Any]:
    """Ask; the body that was sent to /generate, once the reply has ended."""
    with page.expect_request("**/generate") as sent:
        page.fill("#draft", text)
        page.press("#draft", "Enter")
    if wait:
        ended(page)
    return dict(sent.value.post_data_json)


def until(page: Any, expression: str, seconds: float = 20) -> None:
    """Playwright's own way evaluates text in the page, which the page's policy forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


def ended(page: Any) -> None:
    page.wait_for_selector("#send:visible")


def last(page: Any) -> Any:
    return page.locator("#messages .assistant").last


def short(page: Any) -> None:
    """Replies that are the same each time, and soon over."""
    setting(page, "max_tokens", "12")
    setting(page, "temperature", "0")


def test_a_chat_is_written_kept_changed_and_stopped(opened: Opener, url: str) -> None:
    page = opened()
    short(page)
    setting(page, "system", "Be brief.")
    body = ask(page, "First question")
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "First question"}]
    assert body["prompt"] == httpx.post(f"{url}/tokenize", json={"messages": system}).json()["tokens"]
    assert (body["max_tokens"], body["temperature"], body["stream"]) == (12, 0, True)
    assert "rope" not in body
    first = last(page).locator(".text").inner_text()
    assert first.strip()
    assert "written 12 tokens" in last(page).inner_text()
    ask(page, "Second question")
    last(page).get_by_label("Write it again").click()
    ended(page)
    assert "2 of 2" in last(page).inner_text()
    assert "from the cache 0" not in last(page).inner_text(), "the second time its prompt was known"
    last(page).get_by_label("Reply before").click()
    assert "1 of 2" in last(page).inner_text()
    page.get_by_label("Edit the question").first.click()
    page.locator(".edit textarea").fill("Another question")
    page.get_by_role("button", name="Ask again").click()
    ended(page)
    assert page.locator(".user .text").all_inner_texts() == ["Another question"]
    page.reload()
    page.wait_for_selector("#send:not([disabled])")
    page.locator("#conversations .open").first.click()
    assert page.locator(".user .text").all_inner_texts() == ["Another question"]
    assert page.input_value("#set-system") == "Be brief."


def test_a_reply_that_is_stopped_ends_on_the_server(opened: Opener, url: str) -> None:
    page = opened()
    setting(page, "max_tokens", "3000")
    page.locator("#panel > details > summary").click()
    page.check("#set-ignore_eos")
    ask(page, wait=False)
    until(page, "document.querySelectorAll('.assistant .text')[0]?.textContent.length > 50")
    page.keyboard.press("Escape")
    ended(page)
    assert "ended by you" in last(page).inner_text()
    deadline = time.monotonic() + 10
    while "vllm:num_requests_running{" in (text := httpx.get(f"{url}/metrics").text):
        if re.search(r"^vllm:num_requests_running\{.*\} 0\.0$", text, re.MULTILINE):
            return
        assert time.monotonic() < deadline
        time.sleep(0.1)
    pytest.fail("the metric is gone")


def test_what_a_model_writes_is_text_or_known_markdown(opened: Opener) -> None:
    """Whatever it is, it makes no element but those of Markdown, and no link that runs anything."""
    page = opened()
    shown = page.evaluate(
        """text => {
          const box = document.createElement("div");
          for (let end = 1; end <= text.length; end += 7) _markdown.renderMarkdown(box, text.slice(0, end));
          _markdown.renderMarkdown(box, text);
          const copy = document.createElement("div");
          _markdown.renderMarkdown(copy, text);
          const tags = new Set([...box.querySelectorAll("*")].map(one => one.tagName));
          return { html: box.innerHTML, whole: copy.innerHTML, tags: [...tags],
                   links: [...box.querySelectorAll("a")].map(one => one.getAttribute("href")) };
        }""",
        """# Title
A **bold** and *slanted* line with `code <b>` and ~~none~~, snake_case_name, 2 * 3 * 4.
<img src=x onerror=alert(1)><script>alert(1)</script>
[good](https://example.com/a_(b)) [bad](javascript:alert(1)) ![picture](data:text/html,x) https://example.org/x.

1. one
   - inner
   - `more`
2. two

   ```python
   print("<i>")
   ```

> quoted

| a | b |
|---|--:|
| 1 | 2 |

```js
let x = "</pre>";
""",
    )
    assert shown["html"] == shown["whole"], "drawn piece by piece it is the same"
    known = {
        "H3",
        "P",
        "STRONG",
        "EM",
        "CODE",
        "DEL",
        "BR",
        "A",
        "OL",
        "UL",
        "LI",
        "FIGURE",
        "FIGCAPTION",
        "PRE",
        "SPAN",
    }
    known |= {"BUTTON", "svg", "path", "BLOCKQUOTE", "DIV", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD"}
    assert set(shown["tags"]) == known
    assert shown["links"] == ["https://example.com/a_(b)", "https://example.org/x"]
    for piece in ("snake_case_name, 2 * 3 * 4.", "<ul><li>inner</li><li><code>more</code></li></ul>", "&lt;img src=x"):
        assert piece in shown["html"]
    seconds = page.evaluate(
        """() => { const began = performance.now(), box = document.createElement("div");
          for (const text of ["[", "*a ", "`", "_", "**a", "~~", "> ", "- ", "|", "<", "![a]("])
            _markdown.renderMarkdown(box, text.repeat(20000));
          return (performance.now() - began) / 1000; }"""
    )
    assert seconds < 10, "no text takes long"


def test_documents_stand_before_the_question_and_are_read_once(opened: Opener, tmp_path: Path) -> None:
    page = opened()
    short(page)
    for name, line in (("one.txt", "The door is red."), ("two.md", "The roof is blue."), ("bin.dat", "\0binary")):
        (tmp_path / name).write_text(f"{line} " * 60, encoding="utf-8")
    page.set_input_files("#files", [tmp_path / "one.txt", tmp_path / "two.md", tmp_path / "bin.dat"])
    until(page, "/2 documents · [3-9]\\d\\d tokens/.test(document.querySelector('#documents-total').textContent)")
    assert "bin.dat (no text)" in page.inner_text("#notice")

    def hold(route: Any) -> None:
        time.sleep(0.5)
        assert page.locator(".progress progress").is_visible()
        assert "Reading the prompt: 0 of" in page.inner_text(".progress")
        route.continue_()

    page.route("**/generate", hold)
    body = ask(page, "Which colour?")
    assert [text.split("\n\n")[1] for text in body["documents"]] == ["# one.txt", "# two.md"]
    assert body["document_attention"] == "own"
    page.unroute("**/generate")
    page.get_by_label("Remove one.txt").click()
    page.set_input_files("#files", [tmp_path / "one.txt"])
    until(page, "/2 documents · \\d/.test(document.querySelector('#documents-total').textContent)")
    page.get_by_role("button", name="New conversation").click()
    page.set_input_files("#files", [tmp_path / "two.md", tmp_path / "one.txt"])
    ask(page, "Which other colour?")
    cached = int(page.locator(".stats").last.inner_text().split("from the cache ")[1].split()[0].replace(",", ""))
    assert cached > 400, "both were found in another order"


def test_what_is_sent_before_it_is_counted_is_counted_by_the_server(opened: Opener, tmp_path: Path) -> None:
    page = opened()
    setting(page, "max_tokens", "2000")
    (tmp_path / "one.txt").write_text("The door is red. " * 200, encoding="utf-8")
    page.set_input_files("#files", [tmp_path / "one.txt"])
    ask(page, "Which colour?", wait=False)
    until(page, "parseInt(document.querySelector('#count').textContent.replace(',', '')) > 200", seconds=5)
    assert page.locator("#stop").is_visible(), "while it is being answered"
    assert page.inner_text("#map-this") == f"this prompt ({page.inner_text('#count').split()[0]})"
    page.click("#stop")
    ended(page)


def test_the_picker_has_what_the_model_takes_and_the_map_shows_it(opened: Opener, url: str) -> None:
    page = opened()
    short(page)
    known = httpx.get(f"{url}/rope/methods").json()
    taken = [method["name"] for method in known["methods"]]
    assert page.locator("#method option").evaluate_all("all => all.map(one => one.value)") == ["", *taken]
    assert {method["name"] for method in known["refused"]} == {"longrope", "proportional"}
    page.check("[name=map-length][value=whole]")
    page.select_option("#method", "rerope")
    visible = page.locator("#parameters label:visible").all_inner_texts()
    assert [label.strip() for label in visible] == ["Window", "log-n scaling"]
    page.fill("#rope-window", "100")
    until(page, "document.querySelector('#map').ariaLabel.includes('rerope, window 100.')")
    assert "farthest key at a distance of 100, within the 256" in page.inner_text("#map-note")
    page.select_option("#method", "rope")
    until(page, "document.querySelector('#map').ariaLabel.includes('4,095, beyond the 256')")
    corner = page.evaluate("""() => {
        const map = document.querySelector("#map"), size = map.height;
        const pixel = ([x, y]) => [...map.getContext("2d").getImageData(x, y, 1, 1).data];
        return [[0, size - 1], [size - 3, size - 1]].map(pixel);
    }""")
    assert corner == [[214, 39, 74, 255], [*corner[1][:3], 255]]
    assert corner[1] != corner[0], "near keys are read as trained"
    page.select_option("#method", "streaming")
    page.fill("#rope-sinks", "2")
    body = ask(page)
    assert body["rope"] == {"method": "streaming", "sinks": 2}
    assert "streaming" in page.inner_text(".stats")


def test_a_reply_has_the_form_that_is_asked_for_and_tells_its_tokens(opened: Opener) -> None:
    page = opened()
    setting(page, "max_tokens", "200")
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    page.select_option("#set-constraint", "json_schema")
    setting(page, "constraint_text", json.dumps({**schema, "additionalProperties": False}))
    body = ask(page)
    assert body["json_schema"]["required"] == ["yes"]
    assert json.loads(page.inner_text(".assistant .code pre")).keys() == {"yes"}
    last(page).get_by_label("Tokens and their").click()
    page.locator(".token").nth(1).hover()
    card = page.inner_text("#token-card")
    assert card.count("%") in (5, 6)
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#token-card") != card
    page.select_option("#set-constraint", "regex")
    setting(page, "constraint_text", r"\*\*Zebra\*\* and:\n\n- a `quiv`")
    ask(page)
    for drawn, character, share in (("strong", "Z", 0.05), ("li code", "v", 0.8)):
        element = last(page).locator(drawn)
        box = element.bounding_box()
        element.hover(position={"x": share * box["width"], "y": box["height"] / 2})
        page.wait_for_selector("#token-card:visible")
        assert character in page.inner_text("#token-card .chosen"), "drawn text tells its tokens under the pointer"
    page.mouse.move(0, 0)
    assert page.locator("#token-card").is_hidden()
    page.select_option("#set-constraint", "json_schema")
    setting(page, "constraint_text", "{not json")
    page.fill("#draft", "Again")
    page.press("#draft", "Enter")
    page.wait_for_selector(".error:visible")
    assert "The JSON schema is no JSON" in page.inner_text(".error:visible")


class Echo(BaseHTTPRequestHandler):
    """Keeps what it is sent."""

    bodies: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"text": "", "choices": [{"message": {"content": ""}}]}')

    def log_message(self, *_: object) -> None:
        pass


def run_programs(page: Any, folder: Path) -> list[dict[str, Any]]:
    """What the shared programs send, each run as it is but for the server's address."""
    page.get_by_label("Share as code").click()
    page.wait_for_selector("#share[open]")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    commands = {
        "python": [sys.executable, "-c"],
        "javascript": ["node", "--input-type=module", "-e"],
        "curl": ["bash", "-c"],
    }
    Echo.bodies.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, command in commands.items():
            program = page.locator(f"#share-{name} pre").text_content()
            if all(shutil.which(tool) for tool in (command[0], *(["jq"] if "jq -n" in program else []))):
                program = program.replace(page.evaluate("location.origin"), f"http://127.0.0.1:{server.server_port}")
                done = subprocess.run(
                    [*command, program],
                    capture_output=True,
                    text=True,
                    cwd=folder,
                    env=environment,
                    timeout=60,
                    check=False,
                )
                assert done.returncode == 0, (name, done.stderr)
        server.shutdown()
    page.keyboard.press("Escape")
    assert Echo.bodies
    return Echo.bodies


def test_shared_programs_ask_what_the_page_asked(opened: Opener, tmp_path: Path, url: str) -> None:
    page = opened()
    short(page)
    page.select_option("#method", "rerope")
    asked = ask(page, 'It\'s a "question" of\ntwo lines')
    for body in run_programs(page, tmp_path):
        ids = httpx.post(f"{url}/tokenize", json={"messages": body.pop("messages")}).json()["tokens"]
        assert ids == asked["prompt"]
        assert body.pop("model") == "tiny-llama"
        assert body == {"max_tokens": 12, "temperature": 0, "rope": {"method": "rerope"}}
    (tmp_path / "a note.txt").write_text('The door\'s colour is "red".\n' * 5, encoding="utf-8")
    page.set_input_files("#files", [tmp_path / "a note.txt"])
    asked = ask(page, "Another")
    for name in ("stream", "return_progress", "logprobs"):
        del asked[name]
    for body in run_programs(page, tmp_path):
        assert body == asked


def test_a_key_is_asked_for_and_kept(serve: Any, opened: Opener, tiny_checkpoint: Path) -> None:
    page = opened(at=serve(model_id=str(tiny_checkpoint), api_key="secret", max_model_len=512), ready=False)
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:not([disabled])")
    short(page)
    ask(page)
    assert "written" in last(page).inner_text()


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_no_serious_fault_and_nothing_is_wider_than_the_window(
    opened: Opener, size: Any, colours: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install '.[browser]'").Axe()
    page = opened(size, colours)

    def check(state: str) -> None:
        found = [one for one in axe.run(page).response["violations"] if one["impact"] in ("serious", "critical")]
        assert [(one["id"], one["nodes"][0]["html"]) for one in found] == [], state
        wide = "document.scrollingElement.scrollWidth > innerWidth"
        assert not page.evaluate(wide), state

    check("empty")
    if size == PHONE:
        page.get_by_label("Settings").first.click()
        page.wait_for_timeout(50)
        check("settings")
    short(page)
    page.wait_for_selector("#map-box:visible")
    if size == PHONE:
        page.keyboard.press("Escape")
        assert not page.locator("#panel").is_visible()
    ask(page, "A question with a_very_long_word" + "_and_more" * 20)
    last(page).get_by_label("Tokens and their").click()
    check("chat")
    page.get_by_label("Share as code").click()
    page.wait_for_selector("#share[open]")
    check("share")
