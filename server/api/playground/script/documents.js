// Files and folders as documents of a conversation: dropped, chosen or pasted. They never leave the browser but as prompts.

import { $, announce, el, iconButton, icon, number, plural } from "./dom.js";
import { countOf, documentText } from "./prompt.js";

const MAX_BYTES = 8 * 2 ** 20, MAX_DOCUMENTS = 1024, LONG_PASTE = 12_000;
const SKIPPED = /(^|\/)(\.[^/]*|node_modules|__pycache__)(\/|$)/;

/** Every file of what was dropped, folders walked to their ends: [{name, file}]. */
export async function droppedFiles(transfer) {
  const entries = [...transfer.items].map(item => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map(file => ({ name: file.name, file }));
  const found = [];
  for (const entry of entries) await walk(entry, found);
  return found;
}

async function walk(entry, found) {
  const name = entry.fullPath.replace(/^\//, "");
  if (SKIPPED.test(name) || found.length >= MAX_DOCUMENTS) return;
  if (entry.isFile) {
    found.push({ name, file: await new Promise((resolve, reject) => entry.file(resolve, reject)) });
    return;
  }
  const reader = entry.createReader();
  for (;;) { // it gives a hundred at a time
    const children = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!children.length) return;
    for (const child of children.sort((one, other) => one.name.localeCompare(other.name))) await walk(child, found);
  }
}

/** Read files into a conversation; gives what was left out, in words. */
export async function addFiles(conversation, files) {
  const left = [];
  for (const { name, file } of files) {
    if (SKIPPED.test(name)) continue;
    if (conversation.documents.length >= MAX_DOCUMENTS) { left.push(`more than ${MAX_DOCUMENTS} files`); break; }
    const text = file.size > MAX_BYTES ? null : await textOfFile(file);
    if (text === null) left.push(`${name} (${file.size > MAX_BYTES ? "larger than 8 MiB" : "no text"})`);
    else if (text.trim()) addText(conversation, name, text);
  }
  return left;
}

/** A document; one of the same name takes its place. */
export function addText(conversation, name, text) {
  const others = conversation.documents.filter(other => other.name !== name);
  conversation.documents = [...others, { name, text, tokens: null }];
}

async function textOfFile(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (bytes.subarray(0, 8192).includes(0)) return null;
  return new TextDecoder().decode(bytes);
}

/** A long paste becomes a document; true if it did. */
export function pastedAsDocument(conversation, text) {
  if (text.length < LONG_PASTE) return false;
  const count = conversation.documents.filter(({ name }) => name.startsWith("pasted")).length;
  addText(conversation, `pasted-${count + 1}.txt`, text);
  return true;
}

/** Count the tokens of those that have not been counted; `drawn` is called after each. */
export async function countDocuments(conversation, drawn) {
  for (const document of conversation.documents) {
    if (document.tokens !== null) continue;
    document.tokens = await countOf(documentText(document)).catch(() => null);
    drawn();
    if (document.tokens === null) return;
  }
}

export function drawDocuments(conversation, removed) {
  const total = conversation.documents.reduce((sum, { tokens }) => sum + (tokens ?? 0), 0);
  const list = conversation.documents.map(document => el("li", {}, icon("file"), el("span", { className: "name", title: document.name }, document.name),
    el("span", { className: "soft" }, document.tokens === null ? "…" : number(document.tokens)),
    iconButton("close", `Remove ${document.name}`, () => {
      conversation.documents = conversation.documents.filter(other => other !== document);
      announce(`${document.name} was removed.`);
      removed();
    })));
  $("documents").replaceChildren(...list);
  $("documents-box").hidden = !list.length;
  $("documents-total").textContent = `${plural(list.length, "document")} · ${plural(total, "token")}`;
}
