// The page: choose a picture, ask, see the answer come.
import * as ort from 'onnxruntime-web';
import { Template } from '@huggingface/jinja';
import { Tokenizer } from '@huggingface/tokenizers';
import { loadModel } from './engine.js';

const at = (id) => document.getElementById(id);
const canvas = at('picture');
const pen = canvas.getContext('2d', { willReadFrequently: true });
let model = null;
let chosen = false;

ort.env.wasm.numThreads = 1; // more need headers that a plain file server does not send
ort.env.logLevel = 'error';

async function read(name) {
  const response = await fetch(`model/${name}`);
  if (!response.ok) throw new Error(`${name}: the server has no such file (${response.status})`);
  return new Uint8Array(await response.arrayBuffer());
}

/** Draw a picture as the processor would crop it: shortest side to size, middle part. */
async function show(file) {
  const picture = await createImageBitmap(file, { colorSpaceConversion: 'none', premultiplyAlpha: 'none' });
  const { width, height } = model.size;
  canvas.width = width;
  canvas.height = height;
  const scale = Math.max(width / picture.width, height / picture.height);
  const [w, h] = [picture.width * scale, picture.height * scale];
  pen.imageSmoothingEnabled = scale !== 1;
  pen.imageSmoothingQuality = 'high';
  pen.drawImage(picture, (width - w) / 2, (height - h) / 2, w, h);
  chosen = true;
  at('answer').textContent = '';
}

async function ask(question) {
  const rgba = pen.getImageData(0, 0, canvas.width, canvas.height).data;
  const ids = [];
  for await (const token of model.generate(rgba, question)) {
    ids.push(token);
    at('answer').textContent = model.decode(ids);
  }
  return ids;
}

async function guarded(work) {
  at('go').disabled = true;
  document.body.dataset.state = 'busy';
  try {
    await work();
    document.body.dataset.state = 'ready';
  } catch (error) {
    at('status').textContent = error.message;
    document.body.dataset.state = 'failed';
  }
  at('go').disabled = model === null;
}

at('file').addEventListener('change', () => guarded(() => show(at('file').files[0])));
at('ask').addEventListener('submit', (event) => {
  event.preventDefault();
  if (!chosen) {
    at('status').textContent = 'Choose a picture first';
    return;
  }
  guarded(async () => {
    const begin = performance.now();
    const ids = await ask(at('question').value);
    document.body.dataset.tokens = JSON.stringify(ids);
    at('status').textContent = `${ids.length} tokens in ${((performance.now() - begin) / 1000).toFixed(1)} s`;
  });
});

await guarded(async () => {
  model = await loadModel({ ort, read, Tokenizer, Template });
  const bits = model.manifest.effective_bits.toFixed(2);
  at('status').textContent = `${model.manifest.source}, ${model.manifest.scheme}, ${bits} bits a weight`;
});
