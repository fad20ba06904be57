// The request of a conversation as a program: for a shell, in Python, in JavaScript. Documents are read from their files,
// and log-probabilities are left out: they are for this page.

import { documentText, messagesOf, promptOf } from "./prompt.js";
import { requestFields } from "./settings.js";

/** {curl, python, javascript}: a chat goes to OpenAI's endpoint; documents and plain prompts go to /generate as they are
 * sent from here, the chat template's part as token ids. */
export async function programs(conversation, model, origin) {
  const { logprobs: _, ...fields } = requestFields(conversation.settings), said = { ...conversation, messages: asked(conversation) };
  if (conversation.settings.template && !conversation.documents.length) return chat(messagesOf(said), fields, model, origin);
  const { documents: __, ...prompt } = await promptOf(said);
  return plain({ ...prompt, ...fields }, conversation.documents, origin);
}

/** As far as the last question. */
function asked({ messages }) {
  const last = messages.findLastIndex(({ role }) => role === "user");
  return messages.slice(0, last + 1);
}

const text = value => JSON.stringify(value, null, 2).replace(/\[[\d,\s]+\]/g, ids => ids.replace(/\s+/g, "").replaceAll(",", ", "));
const quoted = value => value.replaceAll("'", `'\\''`);
/** JSON is a Python literal but for its three words. */
const python = value => text(value).replace(/("(?:[^"\\]|\\.)*")|\b(true|false|null)\b/g, (_, string, word) => string ?? { true: "True", false: "False", null: "None" }[word]);
const indented = (source, by) => source.replaceAll("\n", `\n${" ".repeat(by)}`);

function chat(messages, fields, model, origin) {
  const { json_schema: schema, regex, choice, grammar, ...rest } = fields;
  const body = { model: model.id, messages, ...rest };
  if (schema) body.response_format = { type: "json_schema", json_schema: { name: "reply", schema } };
  for (const [name, value] of Object.entries({ regex, choice, grammar })) if (value) body.structured_outputs = { [name]: value };
  const known = new Set(["model", "messages", "max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "logit_bias", "response_format"]);
  const own = Object.entries(body).filter(([name]) => known.has(name)), extra = Object.fromEntries(Object.entries(body).filter(([name]) => !known.has(name)));
  const given = own.map(([name, value]) => `    ${name}=${indented(python(value), 4)},\n`).join("") + (Object.keys(extra).length ? `    extra_body=${indented(python(extra), 4)},\n` : "");
  return {
    curl: `curl ${origin}/v1/chat/completions \\\n  -H 'content-type: application/json' \\\n  -d '${quoted(text(body))}'\n`,
    python: `from openai import OpenAI\n\nclient = OpenAI(base_url="${origin}/v1", api_key="-")\nreply = client.chat.completions.create(\n${given})\nprint(reply.choices[0].message.content)\n`,
    javascript: `const response = await fetch("${origin}/v1/chat/completions", {\n  method: "POST",\n  headers: { "content-type": "application/json" },\n  body: JSON.stringify(${indented(text(body), 2)}),\n});\nconst reply = await response.json();\nconsole.log(reply.choices[0].message.content);\n`,
  };
}

function plain(body, documents, origin) {
  const names = documents.map(({ name }) => name), headed = name => documentText({ name, text: "" });
  const rawfiles = names.map((name, index) => `  --rawfile d${index} '${quoted(name)}' \\\n`).join("");
  const joined = names.map((name, index) => `(${JSON.stringify(headed(name))} + $d${index})`).join(", ");
  const curl = names.length
    ? `jq -n \\\n${rawfiles}  '${quoted(text(body))} + {documents: [${quoted(joined)}]}' |\n  curl ${origin}/generate -H 'content-type: application/json' -d @-\n`
    : `curl ${origin}/generate -H 'content-type: application/json' -d '${quoted(text(body))}'\n`;
  const ofPython = names.length ? `names = ${python(names)}\nbody["documents"] = [f"\\n\\n# {name}\\n\\n{Path(name).read_text()}" for name in names]\n` : "";
  const ofScript = names.length ? `const names = ${text(names)};\nbody.documents = names.map(name => \`\\n\\n# \${name}\\n\\n\${readFileSync(name, "utf8")}\`);\n` : "";
  return {
    curl,
    python: `import json\nimport urllib.request\n${names.length ? "from pathlib import Path\n" : ""}\nbody = ${python(body)}\n${ofPython}request = urllib.request.Request(\n    "${origin}/generate", json.dumps(body).encode(), headers={"content-type": "application/json"}\n)\nwith urllib.request.urlopen(request) as response:\n    print(json.load(response)["text"])\n`,
    javascript: `${names.length ? 'import { readFileSync } from "node:fs";\n\n' : ""}const body = ${text(body)};\n${ofScript}const response = await fetch("${origin}/generate", {\n  method: "POST",\n  headers: { "content-type": "application/json" },\n  body: JSON.stringify(body),\n});\nconsole.log((await response.json()).text);\n`,
  };
}
