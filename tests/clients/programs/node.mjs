// openai's and Vercel's packages, as their documentation has them: node node.mjs NAME.
import assert from "node:assert";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.cwd()}/package.json`);
const load = (name) => import(pathToFileURL(require.resolve(name)));
const base = `${process.env.URL}/v1`, model = "SmolLM2-135M-Instruct";

async function openai() {
  const { default: OpenAI } = await load("openai");
  const client = new OpenAI({ baseURL: base, apiKey: "-" });
  const messages = [{ role: "user", content: "Say hi." }];
  const reply = await client.chat.completions.create({ model, messages, max_tokens: 12 });
  assert(reply.choices[0].message.content);
  let text = "";
  for await (const chunk of await client.chat.completions.create({ model, messages, max_tokens: 12, stream: true }))
    text += chunk.choices[0]?.delta?.content ?? "";
  assert(text);
  assert((await client.responses.create({ model, input: "Say hi.", max_output_tokens: 16 })).output_text);
}

async function vercel(provider) {
  const { generateObject, generateText, streamText, tool } = await load("ai");
  const { z } = await load("zod");
  const asked = { model: provider(model), maxOutputTokens: 80 };
  assert((await generateText({ ...asked, prompt: "Say hi." })).text);
  let text = "";
  for await (const part of streamText({ ...asked, prompt: "Say hi." }).textStream) text += part;
  assert(text);
  const now = tool({ description: "Time.", inputSchema: z.object({ zone: z.enum(["utc", "cet"]) }), execute: async () => "12:00" });
  assert((await generateText({ ...asked, prompt: "What time is it?", toolChoice: "required", tools: { now } })).toolCalls.length);
  const schema = z.object({ name: z.string(), age: z.number() });
  const { object } = await generateObject({ model: provider(model), prompt: "Ann is 30.", schema });
  assert(schema.safeParse(object).success);
}

const cases = {
  openai,
  "ai-sdk-openai": async () => vercel((await load("@ai-sdk/openai")).createOpenAI({ baseURL: base, apiKey: "-" })),
  "ai-sdk-openai-compatible": async () =>
    vercel((await load("@ai-sdk/openai-compatible")).createOpenAICompatible({ name: "prerope", baseURL: base, supportsStructuredOutputs: true })),
};
await cases[process.argv[2]]();
console.log("answered");
