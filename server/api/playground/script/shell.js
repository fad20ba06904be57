// What surrounds a conversation: drawers where the window is narrow, colours, tabs, the dialog that asks for a key.

import { $ } from "./dom.js";
import { key, theme } from "./store.js";

const DRAWERS = { list: "toggle-list", panel: "toggle-panel" };
const isWide = id => matchMedia(id === "list" ? "(min-width: 900px)" : "(min-width: 1200px)").matches;

function setDrawer(id, opened) {
  document.body.classList.toggle(`${id}-${isWide(id) ? "closed" : "open"}`, isWide(id) ? !opened : opened);
  $(DRAWERS[id]).setAttribute("aria-expanded", String(opened));
  $(id).inert = !opened;
}

function isOpen(id) {
  return isWide(id) ? !document.body.classList.contains(`${id}-closed`) : document.body.classList.contains(`${id}-open`);
}

export function closeDrawers() {
  for (const id of Object.keys(DRAWERS)) if (!isWide(id)) setDrawer(id, false);
}

export function watchDrawers() {
  for (const [id, button] of Object.entries(DRAWERS)) {
    $(button).addEventListener("click", () => {
      const opened = !isOpen(id);
      closeDrawers();
      setDrawer(id, opened);
      if (opened) $(id).querySelector("button, select, input, textarea")?.focus();
    });
  }
  $("backdrop").addEventListener("click", closeDrawers);
  const settle = () => { for (const id of Object.keys(DRAWERS)) setDrawer(id, isOpen(id)); };
  for (const width of [900, 1200]) matchMedia(`(min-width: ${width}px)`).addEventListener("change", settle);
  settle();
}

export function showTheme() {
  const chosenTheme = theme();
  if (chosenTheme) document.documentElement.dataset.theme = chosenTheme;
  else delete document.documentElement.dataset.theme;
  $("theme").value = chosenTheme ?? "";
}

export function selectTab(name) {
  for (const tab of document.querySelectorAll("#share [role=tab]")) {
    const selected = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(selected));
    tab.tabIndex = selected ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !selected;
  }
}

export function watchTabs() {
  const tabs = [...document.querySelectorAll("#share [role=tab]")];
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => selectTab(tab.id.slice(4)));
    tab.addEventListener("keydown", event => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(index + step + tabs.length) % tabs.length];
      selectTab(next.id.slice(4));
      next.focus();
    });
  });
}

export function askForKey() {
  const dialog = $("key-dialog");
  if (dialog.open) return Promise.resolve(false);
  $("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise(resolve => dialog.addEventListener("close", () => {
    if (dialog.returnValue === "use") key($("key").value.trim());
    resolve(dialog.returnValue === "use" && $("key").value.trim() !== "");
  }, { once: true }));
}
