// The messages on the page, and one reply at a time as it is written.

import { ask, events } from "./api.js";
import { $, announce, copyButton, el, iconButton, number, plural, seconds } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { promptOf } from "./prompt.js";
import { requestFields } from "./settings.js";
import { addTokens, explainTokens, tokenView } from "./tokens.js";

let running = null;
export const isRunning = () => running !== null;
export function stop() {
  running?.abort.abort();
}

/** What the page does with messages; set by `main`. */
export const actions = { again: () => {}, edit: () => {}, changed: () => {}, measured: () => {}, counted: () => {} };

export function newVariant() {
  return { text: "", tokens: [], stats: null, error: null };
}

/** Draw all messages of a conversation. */
export function drawMessages(conversation) {
  $("messages").replaceChildren(...conversation.messages.map((_, index) => drawMessage(conversation, index)));
  $("welcome").hidden = conversation.messages.length > 0;
}

function drawMessage(conversation, index) {
  const message = conversation.messages[index];
  return message.role === "user" ? drawQuestion(conversation, index) : drawReply(conversation, index, message.variants[message.shown]);
}

function drawQuestion(conversation, index) {
  const message = conversation.messages[index], body = el("div", { className: "text" }, message.text);
  const article = el("article", { className: "message user", "aria-label": "You" }, body, el("div", { className: "acts" },
    copyButton(() => message.text, "Copy the question"), iconButton("edit", "Edit the question", edit, { disabled: isRunning() })));
  function edit() {
    const area = el("textarea", { value: message.text, rows: Math.min(12, message.text.split("\n").length + 1), "aria-label": "The question" });
    const form = el("form", { className: "edit" }, area, el("div", {}, el("button", { type: "submit", className: "primary" }, "Ask again"), el("button", { type: "button", onclick: () => drawMessages(conversation) }, "Cancel")));
    form.addEventListener("submit", event => { event.preventDefault(); actions.edit(index, area.value); });
    area.addEventListener("keydown", event => {
      if (event.key === "Escape") { event.stopPropagation(); drawMessages(conversation); }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
    article.replaceChildren(form);
    area.focus();
  }
  return article;
}

function drawReply(conversation, index, variant) {
  const message = conversation.messages[index], body = el("div", { className: "text markdown" });
  const parts = { body, progress: el("div", { className: "progress", hidden: true }), stats: el("div", { className: "stats" }), error: el("div", { className: "error", role: "alert", hidden: true }) };
  const article = el("article", { className: "message assistant", "aria-label": "Reply" }, parts.error, parts.progress, body, parts.stats);
  article.parts = parts;
  drawText(parts.body, variant, conversation.settings);
  explainTokens(parts.body, variant);
  drawStats(parts.stats, variant);
  showError(parts.error, variant.error);
  if (!(running?.variant === variant)) article.append(acts(conversation, index, message, variant, article));
  return article;
}

function acts(conversation, index, message, variant, article) {
  const turn = step => { message.shown += step; actions.changed(); drawMessages(conversation); };
  const many = message.variants.length > 1;
  let plain = false;
  const toggle = iconButton("tokens", "Tokens and their log-probabilities", () => {
    plain = !plain;
    toggle.setAttribute("aria-pressed", String(plain));
    if (plain) article.parts.body.replaceChildren(tokenView(variant.tokens));
    else { article.parts.body.replaceChildren(); drawText(article.parts.body, variant, conversation.settings); }
  }, { "aria-pressed": "false" });
  return el("div", { className: "acts" },
    many && iconButton("left", "Reply before", () => turn(-1), { disabled: message.shown === 0 }),
    many && el("span", { className: "soft" }, `${message.shown + 1} of ${message.variants.length}`),
    many && iconButton("right", "Next reply", () => turn(1), { disabled: message.shown === message.variants.length - 1 }),
    copyButton(() => variant.text, "Copy the reply"), iconButton("again", "Write it again", () => actions.again(index), { disabled: isRunning() }),
    variant.tokens.length > 0 && toggle);
}

function drawText(body, variant, settings) {
  const structured = (settings.constraint ?? "").startsWith("json") && /^\s*[[{]/.test(variant.text);
  renderMarkdown(body, structured ? `\`\`\`json\n${variant.text}\n\`\`\`` : variant.text);
}

function showError(box, error) {
  box.hidden = !error;
  box.textContent = error ?? "";
}

function drawStats(box, { stats }) {
  if (!stats) { box.replaceChildren(); return; }
  const { method, train_length: _, ...parameters } = stats.rope ?? {};
  const shown = Object.entries(parameters).filter(([, value]) => value !== null && typeof value !== "object").map(([name, value]) => `${name} ${typeof value === "number" ? Number(value.toPrecision(4)) : value}`);
  const facts = [
    ["read", stats.prompt_tokens > 0 && `${plural(stats.prompt_tokens, "token")}${stats.first ? ` in ${seconds(stats.first)}` : ""}`],
    ["from the cache", stats.prompt_tokens > 0 && number(stats.cached)],
    ["written", `${plural(stats.written, "token")}${stats.speed ? ` at ${stats.speed.toFixed(1)} a second` : ""}`],
    ["positions", method && [method, ...shown].join(" · ")],
    ["ended by", stats.finish],
  ];
  box.replaceChildren(...facts.filter(([, value]) => value).map(([name, value]) => el("span", {}, el("b", {}, name), ` ${value}`)));
}

/** Write the last message of a conversation, which is a reply's place. Resolves when it has ended, however it did. */
export async function writeReply(conversation) {
  const message = conversation.messages.at(-1), variant = message.variants[message.shown];
  const run = running = { variant, abort: new AbortController(), start: performance.now(), sent: 0, first: 0, progress: null, drawn: 0 };
  drawMessages(conversation);
  const article = $("messages").lastElementChild;
  Object.assign(run, { parts: article.parts, settings: conversation.settings });
  article.setAttribute("aria-busy", "true");
  variant.stats = { prompt_tokens: 0, cached: 0, written: 0 };
  const ticking = setInterval(() => drawProgress(run), 200);
  drawProgress(run);
  try {
    const fields = requestFields(conversation.settings), prompt = await promptOf(conversation, run.abort.signal);
    run.expected = expected(conversation, prompt);
    run.sent = performance.now();
    const response = await ask("/generate", { ...fields, ...prompt, stream: true, return_progress: true }, run.abort.signal);
    for await (const event of events(response)) take(event, run);
  } catch (error) {
    if (error.name === "AbortError") variant.stats.finish = "you";
    else variant.error = error.message;
  } finally {
    clearInterval(ticking);
    running = null;
    drawMessages(conversation);
    announce(variant.error ?? `The reply has ended: ${variant.text.slice(0, 300)}`);
  }
}

/** Tokens of a prompt as it is sent, as far as the page knows. */
function expected({ documents }, prompt) {
  const counted = documents.reduce((sum, { tokens }) => sum + (tokens ?? 0), 0);
  return counted + [prompt.prompt, prompt.document_prefix].reduce((sum, ids) => sum + (Array.isArray(ids) ? ids.length : 0), 0);
}

function take(event, run) {
  const { variant } = run, { stats } = variant, now = performance.now();
  if (event.progress) {
    if (event.progress.total !== run.progress?.total) actions.counted(event.progress.total);
    run.progress = event.progress;
    Object.assign(stats, { prompt_tokens: event.progress.total, cached: event.progress.cached });
    run.from ??= { at: now, processed: event.progress.processed };
    drawProgress(run);
  }
  if (event.token_ids) {
    if (!run.first) { run.first = now; stats.first = (now - run.sent) / 1000; }
    stats.written += event.token_ids.length;
    if (stats.written > 1 && now > run.first) stats.speed = (stats.written - 1) / (now - run.first) * 1000;
    variant.text += event.text;
    addTokens(variant, event);
    soon(run);
  }
  if (event.finish_reason) {
    const { usage, rope, finish_reason: reason, documents } = event;
    const ofDocuments = (documents ?? []).reduce((sum, { cached_tokens: found }) => sum + found, 0);
    Object.assign(stats, { prompt_tokens: usage.prompt_tokens, cached: Math.max(usage.cached_tokens, ofDocuments), written: usage.completion_tokens, rope });
    stats.finish = { stop: "the model", length: "max tokens", abort: "the server" }[reason] ?? reason;
  }
}

/** At most once a frame, and only where the reader has not scrolled away. */
function soon(run) {
  if (run.frame) return;
  run.frame = requestAnimationFrame(() => {
    run.frame = 0;
    if (running !== run) return;
    const scroller = $("scroller"), atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
    drawText(run.parts.body, run.variant, run.settings);
    drawStats(run.parts.stats, run.variant);
    drawProgress(run);
    if (atEnd) scroller.scrollTop = scroller.scrollHeight;
  });
}

function drawProgress(run) {
  const { progress: box } = run.parts, spent = (performance.now() - run.start) / 1000;
  box.hidden = Boolean(run.first);
  if (run.first) return;
  const { total, processed, cached } = run.progress ?? { total: run.expected ?? 0, processed: 0, cached: 0 };
  const bar = box.querySelector("progress") ?? el("progress", { "aria-label": "Prompt read", max: 1 }), note = box.querySelector("span") ?? el("span");
  if (!bar.isConnected) box.append(bar, note);
  if (run.progress) bar.value = processed / total;
  else bar.removeAttribute("value");
  note.textContent = [
    total ? `Reading the prompt: ${number(processed)} of ${plural(total, "token")}` : run.sent ? "Waiting for the server" : "Writing the prompt",
    cached > 0 && `${number(cached)} from the cache`, ...rates(run, total, processed, cached), seconds(spent),
  ].filter(Boolean).join(" · ");
}

/** Tokens a second and the time that is left. */
function rates(run, total, processed, cached) {
  const took = (performance.now() - run.sent) / 1000;
  if (!run.progress || processed <= cached || took < 0.2) return [];
  const rate = (processed - cached) / took;
  actions.measured(rate);
  return [`${number(Math.round(rate))} tokens/s`, `${seconds((total - processed) / rate)} left`];
}
