// Markdown as models write it, to elements. What it does not know stays text. Blocks whose source has not changed keep
// their elements, so a reply can be drawn anew at each token.

import { copyButton, el } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^( {0,8})([-*+]|\d{1,9}[.)])( +|$)(.*)$/;
const QUOTE = /^ {0,3}> ?/;
const DIVIDER = /^ {0,3}\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const MAX_DEPTH = 8;

/** Draw `text` into `container`, touching only what changed since the last time. */
export function renderMarkdown(container, text) {
  const blocks = blocksOf(text);
  blocks.forEach((block, index) => {
    const drawn = container.children[index], key = `${block.type}\n${block.raw}`;
    if (drawn && drawn.source === key) return;
    const element = drawBlock(block, 0);
    element.source = key;
    if (drawn) drawn.replaceWith(element);
    else container.append(element);
  });
  while (container.children.length > blocks.length) container.lastElementChild.remove();
}

/** [{type, raw, …}] of the blocks at the top level. */
export function blocksOf(text) {
  const thought = /^\s*<think>([\s\S]*?)(<\/think>|$)/.exec(text);
  if (thought) {
    const block = { type: "thought", raw: thought[0], text: thought[1], closed: Boolean(thought[2]) };
    return [block, ...blocksOf(text.slice(thought[0].length))];
  }
  const lines = text.split("\n"), blocks = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) { at++; continue; }
    const [block, next] = blockAt(lines, at);
    blocks.push({ ...block, raw: lines.slice(at, next).join("\n") });
    at = next;
  }
  return blocks;
}

function blockAt(lines, at) {
  const line = lines[at];
  if (FENCE.test(line)) return fenced(lines, at);
  const heading = HEADING.exec(line);
  if (heading) return [{ type: "heading", level: heading[1].length, text: heading[2] }, at + 1];
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (QUOTE.test(line)) {
    const end = endOf(lines, at, other => QUOTE.test(other));
    return [{ type: "quote", text: lines.slice(at, end).map(other => other.replace(QUOTE, "")).join("\n") }, end];
  }
  if (ITEM.test(line)) return list(lines, at);
  if (line.includes("|") && at + 1 < lines.length && DIVIDER.test(lines[at + 1]) && lines[at + 1].includes("-")) return table(lines, at);
  const end = endOf(lines, at, other => other.trim() && !FENCE.test(other) && !HEADING.test(other) && !RULE.test(other) && !QUOTE.test(other) && !ITEM.test(other));
  return [{ type: "paragraph", text: lines.slice(at, end).join("\n") }, end];
}

function endOf(lines, at, belongs) {
  let end = at + 1;
  while (end < lines.length && belongs(lines[end])) end++;
  return end;
}

function fenced(lines, at) {
  const [, fence, language] = FENCE.exec(lines[at]);
  const closing = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}\\s*$`);
  const end = endOf(lines, at, line => !closing.test(line));
  return [{ type: "code", language, text: lines.slice(at + 1, end).join("\n") }, Math.min(end + 1, lines.length)];
}

/** Consecutive items of one kind; an item's further lines are indented, or follow it without an empty line between. */
function list(lines, at) {
  const first = ITEM.exec(lines[at]), ordered = /\d/.test(first[2]), indent = first[1].length, items = [];
  let next = at;
  while (next < lines.length) {
    const item = ITEM.exec(lines[next]);
    const blank = !lines[next].trim();
    const deep = /^ */.exec(lines[next])[0].length >= indent + 2;
    if (item && item[1].length < indent + 2) {
      if (/\d/.test(item[2]) !== ordered) break;
      items.push([item[4]]);
    } else if (blank ? !continues(lines, next, indent) : !deep && (!lines[next - 1].trim() || FENCE.test(lines[next]) || HEADING.test(lines[next]))) {
      break;
    } else {
      items.at(-1).push(lines[next].replace(new RegExp(`^ {0,${indent + first[2].length + 1}}`), ""));
    }
    next++;
  }
  return [{ type: "list", ordered, start: ordered ? Number.parseInt(first[2], 10) : 1, items: items.map(item => item.join("\n")) }, next];
}

/** Whether a list goes on after an empty line. */
function continues(lines, at, indent) {
  const following = lines.slice(at, at + 4).find(line => line.trim());
  return following !== undefined && (/^ */.exec(following)[0].length >= indent + 2 || ITEM.test(following));
}

function table(lines, at) {
  const end = endOf(lines, at + 1, line => line.includes("|"));
  const align = cells(lines[at + 1]).map(cell => (/^:-+:$/.test(cell) ? "center" : /-:$/.test(cell) ? "end" : "start"));
  return [{ type: "table", align, head: cells(lines[at]), rows: lines.slice(at + 2, end).map(cells) }, end];
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map(cell => cell.trim().replaceAll("\\|", "|"));
}

function drawBlock(block, depth) {
  switch (block.type) {
    case "code": return codeBlock(block.text, block.language);
    case "heading": return el(`h${Math.min(6, block.level + 2)}`, {}, inline(block.text));
    case "rule": return el("hr");
    case "quote": return el("blockquote", {}, drawAll(block.text, depth));
    case "list": return el(block.ordered ? "ol" : "ul", block.ordered ? { start: block.start } : {}, block.items.map(item => el("li", {}, itemContents(item, depth))));
    case "table": return drawTable(block);
    case "thought": return el("details", { className: "thought", open: !block.closed }, el("summary", {}, block.closed ? "Thoughts" : "Thinking…"), drawAll(block.text, depth));
    default: return el("p", {}, inline(block.text));
  }
}

function drawAll(text, depth) {
  return depth >= MAX_DEPTH ? [text] : blocksOf(text).map(block => drawBlock(block, depth + 1));
}

/** A short item is its text alone, without a paragraph around it. */
function itemContents(item, depth) {
  const task = /^\[([ xX])\]\s+/.exec(item);
  const drawn = drawAll(task ? item.slice(task[0].length) : item, depth);
  const flat = drawn[0]?.tagName === "P" ? [...drawn[0].childNodes, ...drawn.slice(1)] : drawn;
  return task ? [task[1] === " " ? "☐ " : "☑ ", ...flat] : flat;
}

export function codeBlock(text, language = "") {
  return el("figure", { className: "code" },
    el("figcaption", {}, el("span", {}, language || "text"), copyButton(() => text, "Copy this code")),
    el("pre", { tabIndex: 0 }, el("code", {}, text)));
}

function drawTable({ align, head, rows }) {
  const row = (tag, texts) => el("tr", {}, head.map((_, index) => el(tag, { className: align[index] ?? "start" }, inline(texts[index] ?? ""))));
  return el("div", { className: "table", tabIndex: 0, role: "region", "aria-label": "Table" },
    el("table", {}, el("thead", {}, row("th", head)), el("tbody", {}, rows.map(texts => row("td", texts)))));
}

// Every repetition is bounded, so that no text takes long.
const INLINE = new RegExp([
  /(`+)(?!`)([\s\S]{1,4000}?[^`])\1(?!`)/, // 1, 2: code
  /\\([!-/:-@[-`{-~])/, // 3: escaped
  /!?\[([^[\]]{0,1000})\]\(([^\s()]{0,1000}(?:\([^\s()]{0,500}\)[^\s()]{0,500})?)(?:\s+"[^"]{0,500}")?\)/, // 4, 5: link
  /<?(https?:\/\/[^\s<>"'`)\]]{1,2000}[^\s<>"'`)\].,;:!?])>?/, // 6: address
  /\*\*(?=\S)([\s\S]{0,4000}?\S)\*\*/, // 7: strong
  /(?<![\w_])__(?=\S)([\s\S]{0,4000}?\S)__(?!\w)/, // 8
  /\*(?=[^\s*])((?:[^*]|\*\*[^*]{1,1000}\*\*){0,2000}?[^\s*])\*(?!\*)/, // 9: emphasis
  /(?<![\w_])_(?=\S)([^_]{0,2000}?\S)_(?!\w)/, // 10
  /~~(?=\S)([\s\S]{0,4000}?\S)~~/, // 11: struck out
  /(\n)/, // 12
].map(part => part.source).join("|"), "g");

/** Nodes of a line of text. */
export function inline(text, depth = 0) {
  if (depth > MAX_DEPTH) return [text];
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(from, match.index));
    from = match.index + match[0].length;
    nodes.push(...drawInline(match, depth + 1));
  }
  nodes.push(text.slice(from));
  return nodes.filter(node => node !== "");
}

function drawInline(match, depth) {
  const [whole, , code, escaped, label, target, address, strong, strong2, emphasis, emphasis2, struck, line] = match;
  if (code !== undefined) return [el("code", {}, code.replace(/^ (.*) $/s, "$1"))];
  if (escaped !== undefined) return [escaped];
  if (target !== undefined) return [link(target, inline(label || target, depth)) ?? whole];
  if (address !== undefined) return [link(address, [address])];
  if (line !== undefined) return [el("br")];
  if (struck !== undefined) return [el("del", {}, inline(struck, depth))];
  const strongText = strong ?? strong2;
  return strongText !== undefined ? [el("strong", {}, inline(strongText, depth))] : [el("em", {}, inline(emphasis ?? emphasis2, depth))];
}

/** Only to where a link can do no harm; an image is a link, since the page loads nothing from elsewhere. */
function link(target, children) {
  if (!/^(https?:\/\/|mailto:)/i.test(target)) return null;
  return el("a", { href: target, target: "_blank", rel: "noopener noreferrer" }, children);
}
