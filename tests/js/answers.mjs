// Greedy answers of an exported folder (layout onnx-community) in transformers.js, from local files alone.
//
//   node answers.mjs FOLDER QUESTIONS MAX_NEW_TOKENS
//
// QUESTIONS is a JSON file, [{"image": path, "text": question}, ...]. Prints one JSON list of token ids a question.
import { readFileSync } from 'node:fs';
import { basename, dirname, resolve } from 'node:path';
import { AutoModelForImageTextToText, AutoProcessor, RawImage, env } from '@huggingface/transformers';

const [folder, questions, limit] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder));
const name = basename(folder);
const processor = await AutoProcessor.from_pretrained(name);
const model = await AutoModelForImageTextToText.from_pretrained(name);
const imagesFirst = model.config.model_type === 'llava'; // the processors' arguments have no common order
for (const { image, text } of JSON.parse(readFileSync(questions, 'utf-8'))) {
  const content = [{ type: 'image' }, { type: 'text', text }];
  const prompt = processor.apply_chat_template([{ role: 'user', content }], { add_generation_prompt: true });
  const picture = await RawImage.read(image);
  const options = { add_special_tokens: false }; // the chat template writes them
  const inputs = imagesFirst ? await processor(picture, prompt, options) : await processor(prompt, [picture], options);
  const tokens = await model.generate({ ...inputs, max_new_tokens: Number(limit), do_sample: false });
  console.log(JSON.stringify(tokens.slice(null, [inputs.input_ids.dims.at(-1), null]).tolist()[0].map(Number)));
}
