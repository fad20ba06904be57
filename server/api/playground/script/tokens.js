// A reply token by token: the less likely one was, the deeper its colour; under the pointer, what else might have come,
// there and in the reply as it is drawn.

import { el } from "./dom.js";

const card = el("div", { id: "token-card", role: "tooltip", hidden: true });

/** What an event of a stream adds to a variant's tokens: {text, logprob, top}. */
export function addTokens(variant, event) {
  if (!event.logprobs) return;
  const pieces = event.logprobs.map(({ token }) => token);
  const whole = pieces.join("") === event.text;
  event.logprobs.forEach((entry, index) => variant.tokens.push({
    text: whole ? entry.token : index === 0 ? event.text : "", // some are no text by themselves, such as half a letter
    token: entry.token, logprob: entry.logprob, top: entry.top.map(({ token, logprob }) => [token, logprob]),
  }));
}

/** The view itself; arrow keys walk through it. */
export function tokenView(tokens) {
  const spans = tokens.map((token, index) => {
    const span = el("span", { className: "token" }, token.text);
    span.style.setProperty("--doubt", Math.min(0.75, -token.logprob / 6).toFixed(3));
    span.index = index;
    return span;
  });
  const view = el("div", { className: "tokens", tabIndex: 0, role: "group", "aria-label": "Tokens; arrow keys walk through them", "aria-describedby": "token-card" }, spans);
  let at = -1;
  const show = index => {
    spans[at]?.classList.remove("at");
    at = Math.max(0, Math.min(index, spans.length - 1));
    spans[at].classList.add("at");
    place(spans[at].getBoundingClientRect(), tokens[at]);
  };
  view.addEventListener("pointerover", event => { if (event.target.index !== undefined) show(event.target.index); });
  view.addEventListener("pointerleave", () => hide(spans[at]));
  view.addEventListener("blur", () => hide(spans[at]));
  view.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(at + step);
  });
  return view;
}

/** Under the pointer over a drawn reply: what else might have come in that token's place. */
export function explainTokens(body, variant) {
  body.addEventListener("pointermove", event => {
    if (body.querySelector(".tokens")) return; // it explains itself
    const found = variant.tokens.length ? characterAt(body, variant.text, event) : null;
    if (!found) return hide();
    const token = tokenAt(variant.tokens, found.place);
    CSS.highlights?.set("token", new Highlight(found.range));
    place(found.range.getBoundingClientRect(), token);
  });
  body.addEventListener("pointerleave", () => { if (!body.querySelector(".tokens")) hide(); });
}

function tokenAt(tokens, place) {
  let end = 0;
  return tokens.find(({ text }) => (end += text.length) > place) ?? tokens.at(-1);
}

/** The drawn character under the pointer, as a range, and its place in the text that was drawn. */
function characterAt(body, text, { clientX: x, clientY: y }) {
  const caret = document.caretPositionFromPoint?.(x, y) ?? document.caretRangeFromPoint?.(x, y);
  const node = caret?.offsetNode ?? caret?.startContainer, offset = caret?.offset ?? caret?.startOffset;
  if (node?.nodeType !== Node.TEXT_NODE || !body.contains(node)) return null;
  for (const at of [offset, offset - 1]) {
    if (at < 0 || at >= node.length) continue;
    const range = document.createRange();
    range.setStart(node, at);
    range.setEnd(node, at + 1);
    const box = range.getBoundingClientRect(), inside = x >= box.left && x <= box.right && y >= box.top && y <= box.bottom;
    const place = inside ? placeOf(body, text, node, at) : null;
    if (place !== null) return { range, place };
  }
  return null;
}

/** Where in `text` the character `at` of a drawn node stands. Drawn lines are pieces of the text, in its order. */
function placeOf(body, text, wanted, at) {
  const walker = document.createTreeWalker(body, NodeFilter.SHOW_TEXT);
  let from = 0;
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (node.parentElement.closest("figcaption, summary, button")) continue; // the page's own words
    let start = 0;
    for (const line of node.data.split("\n")) {
      const place = line ? text.indexOf(line, from) : -1;
      if (node === wanted && at >= start && at < start + line.length) return place < 0 ? null : place + at - start;
      if (place >= 0) from = place + line.length;
      start += line.length + 1;
    }
  }
  return null;
}

function place(box, token) {
  const percent = logprob => (100 * Math.exp(logprob)).toFixed(Math.exp(logprob) < 0.001 ? 3 : 1);
  const line = (text, logprob, chosen) => el("tr", { className: chosen ? "chosen" : "" }, el("td", {}, JSON.stringify(text)), el("td", {}, `${percent(logprob)} %`), el("td", {}, logprob.toFixed(2)));
  const chosenListed = token.top.some(([text]) => text === token.token);
  card.replaceChildren(el("table", {},
    token.top.map(([text, logprob]) => line(text, logprob, text === token.token)), chosenListed ? [] : line(token.token, token.logprob, true)));
  if (!card.isConnected) document.body.append(card);
  card.hidden = false;
  const below = box.bottom + card.offsetHeight + 8 < innerHeight;
  card.style.left = `${Math.max(8, Math.min(box.left, innerWidth - card.offsetWidth - 8))}px`;
  card.style.top = `${below ? box.bottom + 6 : Math.max(8, box.top - card.offsetHeight - 6)}px`;
}

function hide(span) {
  span?.classList.remove("at");
  CSS.highlights?.delete("token");
  card.hidden = true;
}
