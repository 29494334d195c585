// docs/demo/engine.js in onnxruntime-node: one JSON list of token ids a question.
//
//   node node.mjs EXPORT QUESTIONS ENGINE
import { readFile } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import * as ort from 'onnxruntime-node';
import { Template } from '@huggingface/jinja';
import { Tokenizer } from '@huggingface/tokenizers';

const [folder, questions, engine] = process.argv.slice(2);
const { loadModel } = await import(pathToFileURL(resolve(engine)));
const read = async (name) => new Uint8Array(await readFile(join(folder, name)));
const model = await loadModel({ ort, read, Tokenizer, Template });
for (const { rgba, question } of JSON.parse(await readFile(questions, 'utf-8'))) {
  const tokens = [];
  for await (const token of model.generate(new Uint8ClampedArray(await readFile(rgba)), question)) tokens.push(token);
  console.log(JSON.stringify(tokens));
}
