// The settings of a conversation: what is asked of the server beside the prompt. One table says all fields.

import { $, debounced, el } from "./dom.js";

/** name: of the field in /generate. of: the model's own default, as /v1/models tells it, for the placeholder. */
const NUMBERS = [
  { name: "max_tokens", label: "Max tokens", min: 1, step: 1, placeholder: "256" },
  { name: "temperature", label: "Temperature", min: 0, max: 10, step: 0.05, of: true },
  { name: "top_p", label: "Top-p", min: 0, max: 1, step: 0.01, of: true },
  { name: "top_k", label: "Top-k", min: -1, step: 1, of: true },
  { name: "min_p", label: "Min-p", min: 0, max: 1, step: 0.01, of: true },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.01, max: 10, step: 0.05, of: true },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, placeholder: "0" },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, placeholder: "0" },
  { name: "seed", label: "Seed", step: 1, placeholder: "random" },
  { name: "min_tokens", label: "Min tokens", min: 0, step: 1, placeholder: "0" },
  { name: "logprobs", label: "Alternatives", min: 0, max: 20, step: 1, placeholder: "none", title: "Log-probabilities of each token and of so many others" },
  { name: "timeout_s", label: "Time limit, s", min: 0.1, step: "any", placeholder: "none" },
];
const LINES = [
  { name: "stop", label: "Stop strings, one a line" },
  { name: "bad_words", label: "Never written, one a line" },
];
const CONSTRAINTS = [
  ["", "Free text"], ["json_object", "A JSON object"], ["json_schema", "JSON by a schema"], ["regex", "A regular expression"],
  ["choice", "One of these lines"], ["grammar", "A grammar (Lark or GBNF)"],
];
const EXAMPLES = {
  json_schema: '{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}',
  regex: "(yes|no)", choice: "yes\nno", grammar: 'start: "yes" | "no"',
};
export const DEFAULTS = { template: true, max_tokens: 512, logprobs: 5, document_attention: "own", rope: {} };

let settings = { ...DEFAULTS }, changed = () => {};

/** Draw the panel once; `onChange` is told of every change. */
export function drawSettings(onChange) {
  changed = debounced(onChange, 250);
  const wide = $("settings-text"), grid = $("settings-numbers");
  wide.append(area("system", "System prompt", 3, "None: the model's template may have its own"));
  grid.append(...NUMBERS.map(field => {
    const input = el("input", { id: `set-${field.name}`, type: "number", inputMode: "decimal", min: field.min, max: field.max, step: field.step, placeholder: field.placeholder, title: field.title });
    input.addEventListener("input", () => write(field.name, input.value === "" ? null : Number(input.value)));
    return el("label", {}, field.label, input);
  }));
  $("settings-more").append(...LINES.map(field => area(field.name, field.label, 2)), area("logit_bias", "Logit bias, {token id: −100 to 100}", 2, '{"123": -100}'),
    check("ignore_eos", "Go on past the model's end"), check("template", "Chat template"));
  const kind = el("select", { id: "set-constraint" }, CONSTRAINTS.map(([value, label]) => new Option(label, value)));
  kind.addEventListener("change", () => { write("constraint", kind.value); showConstraint(); });
  $("settings-shape").append(el("label", {}, "The reply is", kind), area("constraint_text", "Written as", 5));
  const attention = el("select", { id: "set-document_attention" }, new Option("each on its own, once", "own"), new Option("as one text, in this order", "full"));
  attention.addEventListener("change", () => write("document_attention", attention.value));
  $("settings-documents").append(el("label", {}, "Documents are read", attention));
}

function area(name, label, rows, placeholder) {
  const input = el("textarea", { id: `set-${name}`, rows, placeholder, spellcheck: name === "system" });
  input.addEventListener("input", () => write(name, input.value));
  return el("label", { id: `label-${name}` }, label, input);
}

function check(name, label) {
  const input = el("input", { id: `set-${name}`, type: "checkbox" });
  input.addEventListener("change", () => write(name, input.checked));
  return el("label", { className: "check" }, input, label);
}

function write(name, value) {
  settings[name] = value;
  changed();
}

/** Show these settings, and write what is changed into them. */
export function showSettings(given, model) {
  settings = given;
  for (const input of document.querySelectorAll("[id^=set-]")) {
    const value = settings[input.id.slice(4)];
    if (input.type === "checkbox") input.checked = Boolean(value);
    else input.value = value ?? (input.tagName === "SELECT" ? input.options[0].value : "");
  }
  for (const field of NUMBERS) if (field.of && model) $(`set-${field.name}`).placeholder = String(model.default_sampling_params[field.name] ?? "");
  showConstraint();
}

function showConstraint() {
  const kind = settings.constraint ?? "";
  $("label-constraint_text").hidden = !(kind in EXAMPLES);
  $("set-constraint_text").placeholder = EXAMPLES[kind] ?? "";
}

const given = text => (text ?? "").split("\n").filter(line => line !== "");

/** The fields of a request. Throws an Error that names the field which cannot be read. */
export function requestFields(from = settings) {
  const body = {};
  for (const { name } of NUMBERS) if (from[name] !== undefined && from[name] !== null) body[name] = from[name];
  for (const { name } of LINES) if (given(from[name]).length) body[name] = given(from[name]);
  if (from.logit_bias?.trim()) body.logit_bias = parsed(from.logit_bias, "Logit bias");
  if (from.ignore_eos) body.ignore_eos = true;
  if (from.rope?.method) body.rope = { ...from.rope };
  const text = from.constraint_text || EXAMPLES[from.constraint];
  if (from.constraint === "json_object") body.json_schema = { type: "object" };
  else if (from.constraint === "json_schema") body.json_schema = parsed(text, "The JSON schema");
  else if (from.constraint === "choice") body.choice = given(text);
  else if (from.constraint) body[from.constraint] = text;
  return body;
}

function parsed(text, name) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${name} is no JSON: ${error.message}`);
  }
}
