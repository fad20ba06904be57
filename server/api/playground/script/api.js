// The server: JSON in and out, errors by their message, streams as events.

import { key } from "./store.js";

/** Called when the server asks for a key; gives true once there is a new one. */
let askForKey = async () => false;
export function onKeyNeeded(handler) {
  askForKey = handler;
}

function headers() {
  const sent = { "Content-Type": "application/json" };
  if (key()) sent.Authorization = `Bearer ${key()}`;
  return sent;
}

/** A response that is no error; else an Error with the server's own message, its code and status. */
export async function ask(path, body, signal) {
  const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached. Is it running?");
  }
  if (response.ok) return response;
  if (response.status === 401 && await askForKey()) return ask(path, body, signal);
  const error = (await response.json().catch(() => ({}))).error ?? { message: `HTTP ${response.status}` };
  throw Object.assign(new Error(error.message), { status: response.status, code: error.code });
}

export const json = async (path, body, signal) => (await ask(path, body, signal)).json();

// EventSource cannot POST; and aborting a fetch closes the connection at once, which ends the request on the server.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
