// SPDX-License-Identifier: Apache-2.0
// The AI SDK with its provider for compatible servers, which checks every chunk against a schema.

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, streamText } from "ai";
import { NO_IMAGE, NO_MODEL, WRONG_KEY, done, has, task } from "./steps.mjs";

const it = task("@ai-sdk/openai-compatible");

function provider(apiKey = process.env.OPENAI_API_KEY) {
  const baseURL = process.env.OPENAI_BASE_URL;
  return createOpenAICompatible({ name: "sg4v", baseURL, apiKey, includeUsage: true });
}

const model = provider()(it.model);

function look(image) {
  const content = [
    { type: "text", text: "What is this?" },
    { type: "image", image, mediaType: "image/png" },
  ];
  return { role: "user", content };
}

async function image() {
  const made = await generateText({ model, messages: [look(it.image)], temperature: 0 });
  has(made.text, it.word);
  assert.equal(made.finishReason, "stop");
  assert.equal(made.usage.totalTokens, made.usage.inputTokens + made.usage.outputTokens);
  done("image");
  return made;
}

async function turns(first) {
  const made = await generateText({
    model,
    system: "You see one shape.",
    messages: [
      look(it.image),
      ...first.response.messages,
      { role: "user", content: "Once more, please." },
    ],
    maxOutputTokens: 3,
  });
  assert.equal(made.finishReason, "length");
  assert.equal(made.usage.outputTokens, 3);
  done("several turns");
}

async function streams(whole) {
  const failed = [];
  const made = streamText({
    model,
    messages: [look(it.image)],
    temperature: 0,
    onError: ({ error }) => failed.push(error),
  });
  const texts = [];
  for await (const one of made.textStream) texts.push(one);
  assert.deepEqual(failed, []);
  assert.equal(texts.join(""), whole);
  assert.ok(texts.length > 1, "the answer came in one piece");
  assert.ok((await made.usage).outputTokens > 0, "no usage at the end");
  done("streaming with usage");
}

async function refused(asked, status) {
  await assert.rejects(generateText({ maxRetries: 0, ...asked }), (error) => {
    assert.ok(APICallError.isInstance(error), `${error}`);
    assert.equal(error.statusCode, status);
    assert.ok(error.data.error.message, "the error's body does not fit the schema");
    return true;
  });
}

async function errors() {
  const messages = [look(it.image)];
  await refused({ model: provider()(NO_MODEL), messages }, 404);
  await refused({ model: provider(WRONG_KEY)(it.model), messages }, 401);
  await refused({ model, messages: [look(NO_IMAGE)] }, 400);
  done("errors");
}

const first = await image();
await turns(first);
await streams(first.text);
await errors();
