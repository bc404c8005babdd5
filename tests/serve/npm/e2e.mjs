// The three uses of the service through the official npm package, against a running service:
//   NIGHTSCHOOL_URL=http://127.0.0.1:8000/v1 NIGHTSCHOOL_KEY=sk-ns-… node e2e.mjs
// Checks shapes and life cycles, not what a model says, so it holds with the scripted model and a real one.
import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";

const client = new OpenAI({
  baseURL: process.env.NIGHTSCHOOL_URL,
  apiKey: process.env.NIGHTSCHOOL_KEY ?? "none",
  maxRetries: 0,
  timeout: 300_000,
});
const model = process.env.NIGHTSCHOOL_MODEL ?? "nightschool";
const question = [{ role: "user", content: "What is 1 + 2?" }];
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather in a city",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};

const checks = {
  async models() {
    const page = await client.models.list();
    assert.ok(page.data.some((card) => card.id === model), "the model is listed");
    assert.equal((await client.models.retrieve(model)).id, model);
  },

  async chat() {
    const reply = await client.chat.completions.create({ model, messages: question });
    assert.equal(reply.object, "chat.completion");
    assert.equal(typeof reply.choices[0].message.content, "string");
    assert.ok(reply.usage.total_tokens > 0);
  },

  async stream() {
    const stream = await client.chat.completions.create({
      model,
      messages: question,
      stream: true,
      stream_options: { include_usage: true },
    });
    const chunks = [];
    for await (const chunk of stream) chunks.push(chunk);
    assert.equal(chunks[0].choices[0].delta.role, "assistant");
    const finishes = chunks.flatMap((chunk) => chunk.choices.map((choice) => choice.finish_reason)).filter(Boolean);
    assert.equal(finishes.length, 1);
    assert.deepEqual(chunks.at(-1).choices, []);
    assert.ok(chunks.at(-1).usage.total_tokens > 0);
  },

  async tools() {
    const messages = [{ role: "user", content: "What is the weather in Paris?" }];
    const asked = await client.chat.completions.create({
      model,
      messages,
      tools: [weather],
      tool_choice: { type: "function", function: { name: "get_weather" } },
    });
    assert.equal(asked.choices[0].finish_reason, "tool_calls");
    const [call] = asked.choices[0].message.tool_calls;
    assert.equal(call.function.name, "get_weather");
    assert.equal(typeof JSON.parse(call.function.arguments), "object");
    const answered = await client.chat.completions.create({
      model,
      messages: [...messages, asked.choices[0].message, { role: "tool", tool_call_id: call.id, content: "sunny" }],
      tools: [weather],
      tool_choice: "none",
    });
    assert.equal(answered.choices[0].message.tool_calls ?? undefined, undefined);
  },

  async responses() {
    const first = await client.responses.create({ model, input: "What is 1 + 2?" });
    assert.equal(first.status, "completed");
    assert.equal(typeof first.output_text, "string");
    const types = [];
    const stream = await client.responses.create({
      model,
      input: "And what is 2 + 3?",
      previous_response_id: first.id,
      stream: true,
    });
    for await (const event of stream) types.push(event.type);
    assert.equal(types[0], "response.created");
    assert.equal(types.at(-1), "response.completed");
    assert.equal((await client.responses.retrieve(first.id)).id, first.id);
  },

  async embeddings() {
    const made = await client.embeddings.create({ model: "embedder", input: ["one", "two"] });
    assert.equal(made.data.length, 2);
    assert.ok(made.data[0].embedding.length > 1);
    assert.ok(made.data[0].embedding.every((value) => typeof value === "number"));
  },

  async batch() {
    const line = (i) => ({
      custom_id: `line-${i}`,
      method: "POST",
      url: "/v1/chat/completions",
      body: { model, messages: [{ role: "user", content: `What is ${i} + 1?` }] },
    });
    const text = [0, 1, 2].map((i) => JSON.stringify(line(i))).join("\n");
    const file = await client.files.create({ file: await toFile(Buffer.from(text), "tasks.jsonl"), purpose: "batch" });
    assert.equal(file.purpose, "batch");
    let batch = await client.batches.create({
      input_file_id: file.id,
      endpoint: "/v1/chat/completions",
      completion_window: "24h",
    });
    for (let tries = 0; !["completed", "failed", "expired", "cancelled"].includes(batch.status); tries++) {
      assert.ok(tries < 600, `the batch is still ${batch.status}`);
      await new Promise((resolve) => setTimeout(resolve, 500));
      batch = await client.batches.retrieve(batch.id);
    }
    assert.equal(batch.status, "completed");
    assert.deepEqual(batch.request_counts, { total: 3, completed: 3, failed: 0 });
    const output = await (await client.files.content(batch.output_file_id)).text();
    const rows = output.trim().split("\n").map((row) => JSON.parse(row));
    assert.deepEqual(rows.map((row) => row.custom_id).sort(), ["line-0", "line-1", "line-2"]);
    assert.ok(rows.every((row) => row.response.status_code === 200 && row.error === null));
  },

  async errors() {
    const wrong = client.chat.completions.create({ model: "gpt-4", messages: question });
    await assert.rejects(wrong, (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found");
    const empty = client.chat.completions.create({ model, messages: [] });
    await assert.rejects(empty, (error) => error instanceof OpenAI.BadRequestError && error.param === "messages");
  },
};

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(`ok ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED ${name}: ${error.stack}`);
  }
}
process.exit(failed ? 1 : 0);
