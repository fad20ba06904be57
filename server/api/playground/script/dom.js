// Elements without innerHTML: whatever a model or a file wrote becomes text, never markup. Knows nothing of the chat.

export const $ = id => document.getElementById(id);

/** An element with properties, listeners (`onclick`), attributes (`aria-label`), and children: nodes or text. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "list") element[name] = value;
    else if (value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter(child => child !== null && child !== undefined && child !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  copy: "M9 9h10v11H9zM5 15V4h10", check: "M5 13l4 4 10-11", edit: "M4 20l1-5L16 4l4 4L9 19zM14 6l4 4",
  again: "M20 12a8 8 0 1 1-3-6.2M17 2v4h-4", trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13", close: "M6 6l12 12M18 6L6 18",
  left: "M14 6l-6 6 6 6", right: "M10 6l6 6-6 6", tokens: "M4 7h7v10H4zM14 7h6v10h-6z", file: "M6 3h8l4 4v14H6zM14 3v4h4",
};

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg"), path = document.createElementNS(SVG, "path");
  for (const [key, value] of Object.entries({ viewBox: "0 0 24 24", "aria-hidden": "true", class: "icon" })) svg.setAttribute(key, value);
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button that shows a sign and says what it does. */
export function iconButton(name, label, onclick, properties = {}) {
  return el("button", { type: "button", className: "quiet", "aria-label": label, title: label, onclick, ...properties }, icon(name));
}

/** A button that copies what `text()` gives, and says that it did. */
export function copyButton(text, label = "Copy") {
  const button = iconButton("copy", label, async () => {
    await copied(text());
    button.replaceChildren(icon("check"));
    announce("Copied.");
    setTimeout(() => button.replaceChildren(icon("copy")), 1200);
  });
  return button;
}

async function copied(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = el("textarea", { value: text, className: "visually-hidden" }); // plain http on another machine has no clipboard
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** Say it to screen readers. */
export function announce(text) {
  $("announcer").textContent = text;
}

const NUMBER = new Intl.NumberFormat("en");
export const number = value => NUMBER.format(value);
export const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

export function seconds(value) {
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 60) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

/** The last call of a burst, once it has been quiet for so many milliseconds. */
export function debounced(action, wait) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...given), wait);
  };
}
