// From a conversation to a prompt: the model's chat template writes it, on the server, and documents stand before the
// first question, each tokenised by itself, so that it is found again whatever stands beside it.

import { json } from "./api.js";

const LEAD = "Documents:";

/** The messages that a reply answers, the system prompt first. */
export function messagesOf(conversation) {
  const { system } = conversation.settings;
  const said = conversation.messages.map(message => ({ role: message.role, content: textOf(message) }));
  if (said.at(-1)?.role === "assistant") said.pop(); // the one that is to be written
  return system?.trim() ? [{ role: "system", content: system }, ...said] : said;
}

export function textOf(message) {
  return message.role === "user" ? message.text : message.variants[message.shown].text.replace(/^\s*<think>[\s\S]*?<\/think>\s*/, "");
}

export function documentText({ name, text }) {
  return `\n\n# ${name}\n\n${text}`;
}

const ofDocuments = messages => messages.map((message, index) => {
  const first = index === messages.findIndex(({ role }) => role === "user");
  return first ? { ...message, content: `${LEAD}\n\n${message.content}` } : message;
});

/** The fields of /generate that make the prompt: `prompt`, and what belongs to documents. */
export async function promptOf(conversation, signal) {
  const { documents, settings } = conversation, messages = messagesOf(conversation);
  const given = documents.length ? { documents: documents.map(documentText), document_attention: settings.document_attention } : {};
  if (!settings.template) return { prompt: plainText(messages), ...given };
  try {
    if (!documents.length) return { prompt: (await tokenized({ messages }, signal)).tokens };
    const { head, rest } = await around(messages, signal);
    return { prompt: rest, document_prefix: head, ...given };
  } catch (error) {
    if (error.code !== "no_chat_template") throw error;
    settings.template = false; // this model was never taught to chat
    return promptOf(conversation, signal);
  }
}

/** The token ids before the documents and after them. */
async function around(messages, signal) {
  const whole = ofDocuments(messages), first = whole.findIndex(({ role }) => role === "user");
  const opened = [...whole.slice(0, first), { role: "user", content: LEAD }];
  const [head, all] = await Promise.all([
    tokenized({ messages: opened, continue_final_message: true }, signal), tokenized({ messages: whole }, signal)]);
  let shared = 0;
  while (shared < head.tokens.length && head.tokens[shared] === all.tokens[shared]) shared++;
  return { head: all.tokens.slice(0, shared), rest: all.tokens.slice(shared) };
}

const tokenized = (body, signal) => json("/tokenize", body, signal);

export function plainText(messages) {
  return messages.map(({ content }) => content).join("\n\n");
}

/** How many tokens a text has by itself. */
export async function countOf(text) {
  return (await tokenized({ prompt: text, add_special_tokens: false })).count;
}

/** How many tokens the prompt has once `draft` is said. */
export async function countPrompt(conversation, draft) {
  const said = conversation.messages, asked = draft || said.at(-1)?.role !== "user";
  const next = { ...conversation, messages: asked ? [...said, { role: "user", text: draft || " " }] : said };
  const prompt = await promptOf(next);
  const length = part => (typeof part === "string" ? countOf(part) : part?.length ?? 0);
  const around = (await length(prompt.prompt)) + (await length(prompt.document_prefix));
  return around + conversation.documents.reduce((sum, { tokens }) => sum + (tokens ?? 0), 0);
}
