// How positions are read: the methods that this model takes, their parameters, and a picture of what a method does:
// the distance at which each query sees each key, worked out by the server for the length of this prompt.

import { json } from "./api.js";
import { $, debounced, el, number } from "./dom.js";

const PARAMETERS = [
  { name: "factor", label: "Factor", min: 1, step: "any" }, { name: "window", label: "Window", min: 1, step: 1 },
  { name: "leak", label: "Leak", min: 1, step: "any" }, { name: "group", label: "Group", min: 1, step: 1 },
  { name: "groups", label: "Groups" },
  { name: "sinks", label: "Sinks", min: 0, step: 1 }, { name: "train_length", label: "Trained length", min: 2, step: 1 },
];
const COLOURS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]];
const BEYOND = [214, 39, 74], UNREAD = -1;

let known = null, rope = {}, length = 0, map = null, drawing = 0;

/** Draw the picker for what the server says of its model; `onChange` is told of every choice. */
export async function drawPositions(onChange) {
  known = await json("/rope/methods");
  const select = $("method");
  select.replaceChildren(new Option(`the server's (${known.default.method})`, ""), ...known.methods.map(({ name }) => new Option(name, name)));
  select.addEventListener("change", () => { rope.method = select.value || undefined; showParameters(); onChange(); redraw(); });
  $("parameters").replaceChildren(...PARAMETERS.map(field => {
    const several = field.min === undefined; // numbers between hyphens
    const input = several ? el("input", { id: `rope-${field.name}`, type: "text" })
      : el("input", { id: `rope-${field.name}`, type: "number", min: field.min, step: field.step, inputMode: "decimal" });
    const given = () => several ? input.value.split("-").map(Number) : Number(input.value);
    input.addEventListener("input", () => { rope[field.name] = input.value === "" ? undefined : given(); onChange(); redraw(); });
    return el("label", { id: `label-rope-${field.name}` }, field.label, input);
  }));
  const logn = el("input", { id: "rope-logn", type: "checkbox" });
  logn.addEventListener("change", () => { rope.logn = logn.checked || undefined; onChange(); });
  $("parameters").append(el("label", { id: "label-rope-logn", className: "check" }, logn, "log-n scaling"));
  for (const radio of document.querySelectorAll("[name=map-length]")) radio.addEventListener("change", redraw);
  $("map").addEventListener("pointermove", tell);
  $("map").addEventListener("pointerleave", describe);
  $("method-box").hidden = !known.per_request;
}

/** Show a conversation's choice, and write changes into it. */
export function showPositions(given) {
  rope = given;
  $("method").value = rope.method ?? "";
  for (const { name } of PARAMETERS) $(`rope-${name}`).value = written(rope[name]) ?? "";
  $("rope-logn").checked = Boolean(rope.logn);
  showParameters();
  redraw();
}

const written = value => Array.isArray(value) ? value.join("-") : value;

function showParameters() {
  const method = known.methods.find(({ name }) => name === rope.method);
  for (const { name } of [...PARAMETERS, { name: "logn" }]) {
    const taken = Boolean(method) && (name === "logn" || method.takes.includes(name));
    $(`label-rope-${name}`).hidden = !taken;
    if (!taken) delete rope[name]; // a request refuses nothing of it, but it would say what is not so
    else if (name !== "logn") $(`rope-${name}`).placeholder = String(written(method.parameters[name]) ?? "auto");
  }
  $("method-note").textContent = method ? method.summary : "As the server is set, for all its requests.";
}

/** The prompt has so many tokens now. */
export function showLength(count) {
  length = count;
  $("map-this").textContent = `this prompt (${number(count)})`;
  redraw();
}

const redraw = debounced(async () => {
  if (!known) return;
  const whole = document.querySelector("[name=map-length]:checked").value === "whole";
  $("map-whole").textContent = `all it takes (${number(known.max_model_len)})`;
  const rows = Math.max(2, whole ? known.max_model_len : length), turn = ++drawing;
  try {
    const drawn = await json("/rope/map", { length: rows, ...(rope.method ? { rope } : {}) });
    if (turn !== drawing) return; // a later one has been asked for
    map = drawn;
    paint();
    describe();
    $("map-box").hidden = false;
    $("map-error").hidden = true;
  } catch (error) {
    if (turn !== drawing) return;
    $("map-box").hidden = true;
    $("map-error").hidden = false;
    $("map-error").textContent = error.message;
  }
}, 250);

function colour(distance) {
  if (distance > map.train_length) return BEYOND;
  const place = (COLOURS.length - 1) * Math.max(0, distance) / map.train_length, low = Math.min(Math.floor(place), COLOURS.length - 2);
  return COLOURS[low].map((channel, index) => channel + (place - low) * (COLOURS[low + 1][index] - channel));
}

function paint() {
  const canvas = $("map"), size = map.positions.length, context = canvas.getContext("2d");
  canvas.width = canvas.height = size;
  const image = context.createImageData(size, size), grey = matchMedia("(prefers-color-scheme: dark)").matches ? 90 : 190;
  map.rows.forEach((row, i) => row.forEach((distance, j) => {
    const [red, green, blue] = distance === UNREAD ? [grey, grey, grey] : colour(distance);
    image.data.set([red, green, blue, 255], 4 * (i * size + j));
  }));
  context.putImageData(image, 0, 0);
  $("legend").replaceChildren(el("span", {}, "0"), el("i", { className: "scale" }), el("span", {}, number(map.train_length)),
    el("i", { className: "beyond" }), el("span", {}, "never trained"), el("i", { className: "unread" }), el("span", {}, "not read"));
}

/** In words, for whoever does not see the picture, too. */
function describe() {
  if (!map) return;
  const { method, train_length: _, ...parameters } = map.rope, end = map.positions.at(-1);
  const resolved = Object.entries(parameters).map(([name, value]) => [name, written(value)]).filter(([, value]) => value !== null && typeof value !== "object").map(([name, value]) => `${name} ${typeof value === "number" ? Number(value.toPrecision(6)) : value}`);
  const told = map.farthest > map.train_length ? `beyond the ${number(map.train_length)} that training showed` : `within the ${number(map.train_length)} of training`;
  const apart = Object.entries(parameters.layers ?? {}).map(([layers, own]) => ` Layers ${layers} are read by ${own.method}, which is not drawn.`).join("");
  const text = `${[method, ...resolved].join(", ")}.${apart} Token ${number(end)} sees its farthest key at a distance of ${number(map.farthest)}, ${told}.`;
  $("map-note").textContent = map.warning ? `${text} ${map.warning}` : text;
  $("map").setAttribute("aria-label", `Map of distances: ${text}`);
}

function tell(event) {
  const box = $("map").getBoundingClientRect(), size = map.positions.length;
  const at = (offset, extent) => Math.max(0, Math.min(size - 1, Math.floor(size * offset / extent)));
  const i = at(event.clientY - box.top, box.height), j = at(event.clientX - box.left, box.width), distance = map.rows[i][j];
  if (distance === undefined) return describe();
  const [row, key] = [map.positions[i], map.positions[j]];
  $("map-note").textContent = `Token ${number(row)} and token ${number(key)}, ${number(row - key)} apart: ${distance === UNREAD ? "not read." : `seen at ${number(distance)}.`}`;
}
