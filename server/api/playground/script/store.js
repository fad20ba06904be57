// What the browser keeps: conversations in IndexedDB, which has room for documents, and what a new one begins with.
// Where neither may be used (a private window), everything works until the page is closed.

const DATABASE = "prerope", STORE = "conversations", SETTINGS = "prerope.settings", THEME = "prerope.theme";
const kept = new Map(); // stands in for the database where there is none
let database;

function opened() {
  database ??= new Promise(resolve => {
    try {
      const request = indexedDB.open(DATABASE, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => resolve(null);
    } catch {
      resolve(null);
    }
  });
  return database;
}

async function run(mode, action) {
  const store = (await opened())?.transaction(STORE, mode).objectStore(STORE);
  if (!store) return undefined;
  return new Promise((resolve, reject) => {
    const request = action(store);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** All conversations, the latest first. */
export async function conversations() {
  const all = (await run("readonly", store => store.getAll())) ?? [...kept.values()];
  return all.sort((one, other) => other.updated - one.updated);
}

/** Keep a conversation as it is now; one that has nothing in it is not kept. */
export async function keep(conversation) {
  if (!conversation.messages.length && !conversation.documents.length) return;
  kept.set(conversation.id, conversation);
  await run("readwrite", store => store.put(structuredClone(conversation)));
}

export async function forget(id) {
  kept.delete(id);
  await run("readwrite", store => store.delete(id));
}

function local(name, value) {
  try {
    if (value === undefined) return localStorage.getItem(name);
    localStorage.setItem(name, value);
  } catch { /* not allowed here */ }
  return null;
}

/** The settings that were last used, for a new conversation. */
export function lastSettings(settings) {
  if (settings) return local(SETTINGS, JSON.stringify(settings));
  try {
    return JSON.parse(local(SETTINGS)) ?? {};
  } catch {
    return {};
  }
}

/** light, dark, or null: as the system has it. */
export function theme(chosen) {
  return chosen === undefined ? local(THEME) || null : local(THEME, chosen ?? "");
}

/** The API key, until the window is closed. */
export function key(given) {
  try {
    if (given === undefined) return sessionStorage.getItem("key") ?? "";
    sessionStorage.setItem("key", given);
  } catch { /* not allowed here */ }
  return given ?? "";
}
