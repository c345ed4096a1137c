// SPDX-License-Identifier: Apache-2.0
// openai for Node, configured by OPENAI_BASE_URL and OPENAI_API_KEY.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { NO_IMAGE, NO_MODEL, WRONG_KEY, done, has, task, uri } from "./steps.mjs";

const it = task("openai");
const client = new OpenAI();

function look(image) {
  const content = [
    { type: "text", text: "What is this?" },
    { type: "image_url", image_url: { url: uri(image) } },
  ];
  return { role: "user", content };
}

async function models() {
  const ids = [];
  for await (const one of client.models.list()) ids.push(one.id);
  assert.ok(ids.includes(it.model), `the model is not listed: ${ids}`);
  assert.equal((await client.models.retrieve(it.model)).id, it.model);
  done("models");
}

async function image() {
  const made = await client.chat.completions.create({
    model: it.model,
    messages: [look(it.image)],
    temperature: 0,
  });
  const { message, finish_reason } = made.choices[0];
  has(message.content, it.word);
  assert.equal(finish_reason, "stop");
  assert.equal(made.usage.total_tokens, made.usage.prompt_tokens + made.usage.completion_tokens);
  assert.ok(made._request_id, "x-request-id is not answered");
  done("image");
  return message;
}

async function turns(first) {
  const made = await client.chat.completions.create({
    model: it.model,
    messages: [
      { role: "system", content: "You see one shape." },
      look(it.image),
      first, // as it came, with every field
      { role: "user", content: "Once more, please." },
    ],
    max_tokens: 3,
  });
  assert.equal(made.choices[0].finish_reason, "length");
  assert.equal(made.usage.completion_tokens, 3);
  done("several turns");
}

async function streams(whole) {
  const asked = { model: it.model, messages: [look(it.image)], temperature: 0 };
  const options = { stream: true, stream_options: { include_usage: true } };
  const chunks = [];
  for await (const one of await client.chat.completions.create({ ...asked, ...options })) {
    chunks.push(one);
  }
  const texts = chunks.map((one) => one.choices[0]?.delta.content ?? "");
  assert.equal(texts.join(""), whole);
  assert.ok(texts.filter(Boolean).length > 1, "the answer came in one piece");
  const { choices, usage } = chunks.at(-1);
  assert.ok(choices.length === 0 && usage?.completion_tokens > 0, "no usage at the end");
  assert.ok(chunks.slice(0, -1).every((one) => one.usage === null), "usage before the end");
  assert.equal(await client.chat.completions.stream(asked).finalContent(), whole);
  done("streaming with usage");
}

async function several() {
  const asked = { model: it.model, messages: [look(it.image)], n: 2, temperature: 0 };
  const whole = await client.chat.completions.create(asked);
  const streamed = await client.chat.completions.stream(asked).finalChatCompletion();
  for (const { choices } of [whole, streamed]) {
    assert.deepEqual(choices.map((one) => one.index), [0, 1]);
    for (const { message } of choices) has(message.content, it.word);
  }
  done("two answers");
}

async function errors() {
  const chat = client.chat.completions;
  const messages = [look(it.image)];
  await assert.rejects(chat.create({ model: NO_MODEL, messages }), OpenAI.NotFoundError);
  await assert.rejects(
    client.withOptions({ apiKey: WRONG_KEY }).models.list(),
    OpenAI.AuthenticationError,
  );
  await assert.rejects(
    chat.create({ model: it.model, messages: [look(NO_IMAGE)] }),
    OpenAI.BadRequestError,
  );
  done("errors");
}

await models();
const first = await image();
await turns(first);
await streams(first.content);
await several();
await errors();
