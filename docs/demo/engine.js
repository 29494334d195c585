// An exported folder in onnxruntime-web or onnxruntime-node: picture and question in, greedy answer out.
// The same file runs in the page and in Node; whoever loads it passes the runtime and a way to read files.

const FLAVOURS = ['portable', 'packed', 'float'];
const PARTS = ['vision_encoder', 'embed_tokens', 'decoder'];

/**
 * Load an export (docs/pipeline.md has its files).
 *
 * @param ort onnxruntime-web or onnxruntime-node.
 * @param read (name) => Promise<Uint8Array> of a file of the folder.
 * @param Tokenizer of @huggingface/tokenizers.
 * @param Template of @huggingface/jinja.
 */
export async function loadModel({ ort, read, Tokenizer, Template }) {
  const text = async (name) => new TextDecoder().decode(await read(name));
  const json = async (name) => JSON.parse(await text(name));
  const manifest = await json('export.json');
  check(manifest);
  const sessions = {};
  const provider = typeof window === 'undefined' ? 'cpu' : 'wasm';
  for (const part of PARTS) {
    const { file, shared_data: shared = [] } = manifest.parts[part];
    const names = [`${file}.data`, ...shared].filter((name) => name in manifest.files);
    const externalData = await Promise.all(names.map(async (path) => ({ path, data: await read(path) })));
    const options = { externalData: externalData.length ? externalData : undefined, logSeverityLevel: 3, executionProviders: [provider] };
    sessions[part] = await ort.InferenceSession.create(await read(file), options);
  }
  const tokenizer = new Tokenizer(await json('tokenizer.json'), await json('tokenizer_config.json'));
  const processor = await json('processor_config.json');
  const template = new Template(await text('chat_template.jinja'));
  return new Model({ ort, manifest, sessions, tokenizer, processor, template });
}

function check(manifest) {
  const wrong = (what, got, remedy) => new Error(`${what}: got ${got}; ${remedy}`);
  if (!FLAVOURS.includes(manifest.flavour)) {
    throw wrong('the page runs the flavours portable and packed', manifest.flavour, 'export with --flavour portable');
  }
  if (manifest.layout !== 'flat') throw wrong('the page reads the flat layout', manifest.layout, 'export with --layout flat');
  if (manifest.attention !== 'standard') {
    throw wrong('the page needs attention in standard ops', manifest.attention, 'export with --attention standard');
  }
  if (manifest.cache.dtype !== 'float32') {
    throw wrong('the page keeps a float32 cache', manifest.cache.dtype, 'export with --kv-cache float32');
  }
  if (manifest.image_layout.kind !== 'images') {
    throw wrong('the page shows one picture of one size', manifest.image_layout.kind, 'take a model such as LLaVA 1.5');
  }
}

class Model {
  constructor(parts) {
    Object.assign(this, parts);
  }

  /** Height and width that the vision encoder wants. */
  get size() {
    const image = this.processor.image_processor;
    return image.do_center_crop ? image.crop_size : image.size;
  }

  /**
   * Pixels as the vision encoder takes them.
   *
   * @param rgba Uint8ClampedArray of `size.width` x `size.height` pixels.
   * @returns tensor [1, 3, height, width] float32.
   */
  pixels(rgba) {
    const { height, width } = this.size;
    const { image_mean: mean, image_std: std, rescale_factor: scale } = this.processor.image_processor;
    const plane = height * width;
    const values = new Float32Array(3 * plane);
    for (let channel = 0; channel < 3; channel++) {
      for (let pixel = 0; pixel < plane; pixel++) {
        const value = Math.fround(rgba[4 * pixel + channel] * scale);
        values[channel * plane + pixel] = (value - mean[channel]) / std[channel];
      }
    }
    return new this.ort.Tensor('float32', values, [1, 3, height, width]);
  }

  /** Token ids of a chat of one question about one picture. */
  tokens(question) {
    const messages = [{ role: 'user', content: [{ type: 'image' }, { type: 'text', text: question }] }];
    const prompt = this.template.render({ messages, add_generation_prompt: true });
    const placeholder = this.processor.image_token;
    const expanded = prompt.replace(placeholder, placeholder.repeat(this.manifest.image_tokens));
    return this.tokenizer.encode(expanded, { add_special_tokens: false }).ids;
  }

  /**
   * Token ids of the greedy answer, one by one.
   *
   * @param rgba see `pixels`.
   */
  async *generate(rgba, question, maxNewTokens = 64) {
    const { ort, manifest } = this;
    const { image_features: features } = await this.sessions.vision_encoder.run({ pixel_values: this.pixels(rgba) });
    let ids = this.tokens(question);
    let images = features;
    let past = this.emptyCache();
    let total = 0;
    for (let step = 0; step < maxNewTokens; step++) {
      const embedded = await this.sessions.embed_tokens.run({ input_ids: this.int64(ids), image_features: images });
      const positions = ids.map((_, index) => total + index);
      total += ids.length;
      const feeds = {
        inputs_embeds: embedded.inputs_embeds,
        attention_mask: this.int64(new Array(total).fill(1)),
        position_ids: this.int64(positions),
        ...past,
      };
      if (manifest.modality_input) feeds.modality = embedded.modality;
      // The browser's runtime does not offer an input that has a default: all logits then.
      if (this.sessions.decoder.inputNames.includes('logits_to_keep')) {
        feeds.logits_to_keep = new ort.Tensor('int64', BigInt64Array.of(1n), [1]);
      }
      const outputs = await this.sessions.decoder.run(feeds);
      past = Object.fromEntries(Object.keys(past).map((name) => [name, outputs[name.replace('past_key_values', 'present')]]));
      const token = this.best(outputs.logits);
      yield token;
      if (manifest.eos_token_ids.includes(token)) return;
      ids = [token];
      images = new ort.Tensor('float32', new Float32Array(0), [0, ...features.dims.slice(1)]);
    }
  }

  /** The text of answer tokens, special tokens left out. */
  decode(ids) {
    return this.tokenizer.decode(ids, { skip_special_tokens: true }).trim();
  }

  int64(values) {
    return new this.ort.Tensor('int64', BigInt64Array.from(values, BigInt), [1, values.length]);
  }

  emptyCache() {
    const { layers, heads, head_dim: channels } = this.manifest.cache;
    const cache = {};
    for (let layer = 0; layer < layers; layer++) {
      for (const kind of ['key', 'value']) {
        cache[`past_key_values.${layer}.${kind}`] = new this.ort.Tensor('float32', new Float32Array(0), [1, heads, 0, channels]);
      }
    }
    return cache;
  }

  /** The likeliest token of the last position; an image placeholder without an image has no meaning. */
  best(logits) {
    const width = logits.dims.at(-1);
    const last = logits.data.subarray(logits.data.length - width);
    let best = -1;
    for (let token = 0; token < width; token++) {
      if (token !== this.manifest.image_token_id && (best < 0 || last[token] > last[best])) best = token;
    }
    return best;
  }
}
