// The page as a whole: which conversation is open, what keys and buttons do, and what is drawn when.

import { json, onKeyNeeded } from "./api.js";
import { actions, drawMessages, isRunning, newVariant, stop, writeReply } from "./chat.js";
import { addFiles, countDocuments, drawDocuments, droppedFiles, pastedAsDocument } from "./documents.js";
import { $, announce, debounced, el, iconButton, number } from "./dom.js";
import { codeBlock } from "./markdown.js";
import { drawPositions, showLength, showPositions } from "./positions.js";
import { countPrompt } from "./prompt.js";
import { DEFAULTS, drawSettings, showSettings } from "./settings.js";
import { programs } from "./share.js";
import { askForKey, closeDrawers, selectTab, showTheme, watchDrawers, watchTabs } from "./shell.js";
import { conversations, forget, keep, lastSettings, theme } from "./store.js";

let model = null, open = null;

function fresh() {
  const settings = { ...DEFAULTS, ...lastSettings(), rope: { ...lastSettings().rope } };
  return { id: crypto.randomUUID?.() ?? String(Math.random()), title: "", updated: Date.now(), documents: [], messages: [], settings };
}

function show(conversation) {
  open = conversation;
  showSettings(open.settings, model);
  showPositions(open.settings.rope);
  drawMessages(open);
  documentsChanged();
  drawList();
  $("scroller").scrollTop = $("scroller").scrollHeight;
  closeDrawers();
}

async function save() {
  open.updated = Date.now();
  open.title = open.messages.find(({ role }) => role === "user")?.text.trim().slice(0, 80) || open.documents[0]?.name || "";
  await keep(open);
  await drawList();
}

async function drawList() {
  const all = await conversations();
  $("conversations").replaceChildren(...all.map(conversation => el("li", {},
    el("button", { type: "button", className: "open", "aria-current": conversation.id === open.id ? "true" : null, title: conversation.title, onclick: () => { if (!isRunning()) show(conversation); } }, conversation.title || "Untitled"),
    iconButton("trash", `Delete “${conversation.title || "Untitled"}”`, async () => {
      if (isRunning() || !confirm(`Delete “${conversation.title || "Untitled"}” from this browser?`)) return;
      await forget(conversation.id);
      if (conversation.id === open.id) show(fresh());
      else drawList();
    }))));
  $("none-yet").hidden = all.length > 0;
}

// --- asking ---

function showRunning() {
  const busy = isRunning();
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  document.body.classList.toggle("busy", busy);
}

async function reply() {
  const writing = writeReply(open);
  showRunning();
  await writing;
  showRunning();
  await save();
  count();
}

async function send() {
  const text = $("draft").value;
  if (isRunning() || !model || !text.trim()) return;
  $("draft").value = "";
  grow();
  open.messages.push({ role: "user", text }, { role: "assistant", variants: [newVariant()], shown: 0 });
  await save();
  const writing = reply();
  $("scroller").scrollTop = $("scroller").scrollHeight;
  await writing;
}

actions.again = async index => {
  if (isRunning()) return;
  open.messages.length = index + 1;
  const message = open.messages[index];
  message.shown = message.variants.push(newVariant()) - 1;
  await reply();
};
actions.edit = async (index, text) => {
  if (isRunning() || !text.trim()) return;
  open.messages.length = index;
  open.messages.push({ role: "user", text }, { role: "assistant", variants: [newVariant()], shown: 0 });
  await reply();
};
actions.changed = save;
actions.counted = told;

const count = debounced(async () => {
  if (!model || isRunning()) return;
  const draft = $("draft").value, counted = open;
  if (!draft && !counted.messages.length && !counted.documents.length) { told(0); return; }
  try {
    const total = await countPrompt(counted, draft);
    if (counted === open && !isRunning()) told(total); // a reply's own count is the true one
  } catch (error) {
    $("count").textContent = error.code === "context_length_exceeded" ? "too long for this server" : "";
    $("count").classList.add("over");
  }
}, 350);

function told(total) {
  $("count").textContent = total ? `${number(total)} of ${number(model.max_model_len)} tokens` : "";
  $("count").classList.toggle("over", total >= model.max_model_len);
  showLength(total);
}

// --- documents ---

function documentsChanged() {
  drawDocuments(open, () => { documentsChanged(); save(); });
  countDocuments(open, () => drawDocuments(open, documentsChanged)).then(() => { count(); });
  count();
}

async function add(files) {
  const left = await addFiles(open, files);
  documentsChanged();
  await save();
  $("notice").hidden = !left.length;
  $("notice").textContent = left.length ? `Left out: ${left.slice(0, 5).join(", ")}${left.length > 5 ? ` and ${left.length - 5} more` : ""}.` : "";
  announce(`${open.documents.length} documents.`);
}

const chosen = input => [...input.files].map(file => ({ name: file.webkitRelativePath || file.name, file }));

function watchDocuments() {
  for (const id of ["files", "folder"]) {
    $(`add-${id}`).addEventListener("click", () => $(id).click());
    $(id).addEventListener("change", async event => { await add(chosen(event.target)); event.target.value = ""; });
  }
  let inside = 0;
  addEventListener("dragenter", () => { inside++; document.body.classList.add("drop"); });
  addEventListener("dragleave", () => { inside--; document.body.classList.toggle("drop", inside > 0); });
  addEventListener("dragover", event => event.preventDefault());
  addEventListener("drop", async event => {
    event.preventDefault();
    inside = 0;
    document.body.classList.remove("drop");
    if (!isRunning()) await add(await droppedFiles(event.dataTransfer));
  });
  $("draft").addEventListener("paste", event => {
    const text = event.clipboardData.getData("text");
    if (!pastedAsDocument(open, text)) return;
    event.preventDefault();
    documentsChanged();
    save();
  });
}

// --- code, keys ---

async function share() {
  const dialog = $("share"), languages = { curl: "bash", python: "python", javascript: "javascript" };
  try {
    const written = await programs(open, model, location.origin);
    $("programs").replaceChildren(...Object.entries(written).map(([name, text]) => el("section", { id: `share-${name}`, role: "tabpanel", "aria-labelledby": `tab-${name}` }, codeBlock(text, languages[name]))));
    selectTab("curl");
    dialog.showModal();
  } catch (error) {
    $("notice").hidden = false;
    $("notice").textContent = error.message;
  }
}

function newChat() {
  if (isRunning()) return;
  show(fresh());
  $("draft").focus();
}

function grow() {
  const draft = $("draft");
  draft.style.height = "auto";
  draft.style.height = `${Math.min(draft.scrollHeight + 2, innerHeight * 0.4)}px`;
}

function watchKeys() {
  $("draft").addEventListener("input", () => { grow(); count(); });
  $("draft").addEventListener("keydown", event => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    if (event.key === "ArrowUp" && !$("draft").value) { event.preventDefault(); [...document.querySelectorAll("#messages .user [aria-label^=Edit]")].at(-1)?.click(); }
  });
  addEventListener("keydown", event => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName), inDialog = Boolean(document.querySelector("dialog[open]"));
    if (event.key === "Escape" && !inDialog) { if (isRunning()) stop(); else closeDrawers(); }
    if (event.altKey && event.key === "n") { event.preventDefault(); newChat(); }
    if (!typing && !inDialog && !event.ctrlKey && !event.metaKey && !event.altKey) {
      if (event.key === "/") { event.preventDefault(); $("draft").focus(); }
      if (event.key === "?") $("help").showModal();
    }
  });
}

async function connect() {
  try {
    model = (await json("/v1/models")).data[0];
  } catch (error) {
    $("model").textContent = error.status === 401 ? "an API key is needed" : error.status === 503 ? "the model is loading…" : "the server cannot be reached";
    if (error.status !== 401) setTimeout(connect, 1500);
    else $("model").append(" ", el("button", { type: "button", onclick: connect }, "Give a key"));
    return;
  }
  $("model").textContent = `${model.id} · trained at ${number(model.train_length)}, takes ${number(model.max_model_len)} tokens`;
  await drawPositions(kept);
  $("send").disabled = false;
  const [latest] = await conversations();
  show(latest && !latest.messages.length ? latest : fresh());
}

/** Settings have changed. */
function kept() {
  lastSettings(open.settings);
  keep(open);
  count();
}

function start() {
  showTheme();
  open = fresh();
  drawSettings(kept);
  showSettings(open.settings, null);
  onKeyNeeded(askForKey);
  $("composer").addEventListener("submit", event => { event.preventDefault(); send(); });
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", newChat);
  $("share-open").addEventListener("click", share);
  $("help-open").addEventListener("click", () => $("help").showModal());
  $("theme").addEventListener("change", event => { theme(event.target.value || null); showTheme(); });
  watchDocuments();
  watchDrawers();
  watchTabs();
  watchKeys();
  connect();
}

start();
