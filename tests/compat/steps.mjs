// SPDX-License-Identifier: Apache-2.0
// What the Node clients of this folder share: arguments, and saying how far they came.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

export const WRONG_KEY = "sg4v-nobody";
export const NO_MODEL = "no-such-model";
export const NO_IMAGE = Buffer.from("this is no image");

// Returns the task of the command line, `client_....mjs MODEL IMAGE WORD`, and prints whose
// version does it. An answer about the image has the word.
export function task(name) {
  const version = createRequire(import.meta.url)(`./node_modules/${name}/package.json`).version;
  console.log(`client: ${name} ${version}`);
  const [model, image, word] = process.argv.slice(2);
  return { model, image: readFileSync(image), word };
}

// Prints that this works; the report lists it.
export function done(what) {
  console.log(`works: ${what}`);
}

export function uri(image) {
  return `data:image/png;base64,${image.toString("base64")}`;
}

export function has(text, word) {
  assert.ok(text.includes(word), `no ${word} in ${text}`);
}
