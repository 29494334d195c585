"""Write a checkpoint with the shape of Qwen2.5-VL-3B-Instruct and random weights.

For measuring time and memory at the size of a real model where the real weights are not at hand. It answers nonsense.

    python models/qwen2.5-vl-3b-shaped/make.py build/qwen2.5-vl-3b-shaped
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

SHARD = 1_000_000_000  # bytes
CHUNK = 1 << 24  # weights drawn at a time, in float32
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIRST_SPECIAL = 151643
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def shaped_config(layers: int, vision_layers: int) -> Any:
    """Configuration of Qwen2.5-VL-3B-Instruct, with fewer blocks if wanted."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="bfloat16",
        tie_word_embeddings=True,
        vision_config={
            "depth": vision_layers,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [index for index in (7, 15, 23, 31) if index < vision_layers],
        },
        text_config={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": layers,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "bos_token_id": FIRST_SPECIAL,
            "eos_token_id": FIRST_SPECIAL + SPECIAL.index("<|im_end|>"),
            "tie_word_embeddings": True,
        },
    )


def shapes(config: Any) -> dict[str, torch.Tensor]:
    """The checkpoint's weights on the meta device, under the names that Qwen2.5-VL's own files use."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    return {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): parameter
        for name, parameter in model.named_parameters()  # a tied lm_head is not among them
    }


def write_weights(config: Any, out: Path, *, seed: int, shard: int = SHARD) -> int:
    """Write bfloat16 shards and their index, one shard in memory at a time.

    Returns:
        Weights written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    weights = shapes(config)
    plan = split_torch_state_dict_into_shards(weights, max_shard_size=shard)
    generator = torch.Generator().manual_seed(seed)
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: random_weight(name, weights[name].shape, generator) for name in names}
        save_file(tensors, out / file, metadata={"format": "pt"})
        print(f"{file}: {len(names)} weights")
        del tensors
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sum(weight.numel() for weight in weights.values())


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """A bfloat16 weight that keeps activations of ordinary size: norms near 1, other weights by their fan-in."""
    center, spread = 0.0, 0.02
    if len(shape) > 1 and "embed_tokens" not in name:
        spread = shape[1:].numel() ** -0.5
    elif name.endswith("weight") and len(shape) == 1:
        center = 1.0
    weight = torch.empty(shape, dtype=torch.bfloat16)
    for part in weight.view(-1).split(CHUNK):
        part.copy_(torch.empty(part.shape).normal_(center, spread, generator=generator))
    return weight


def write_processor(out: Path) -> None:
    """Tokenizer, image processor and chat template, as stock classes that need neither torchvision nor a download.

    A token is a byte; the ids between the bytes and Qwen's special tokens are fillers that no text gives. The processor
    is PaddleOCRVLProcessor, which makes of text and images what Qwen2_5_VLProcessor makes, but has no video half.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PaddleOCRVLProcessor, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"<|filler_{index}|>" for index in range(len(alphabet), FIRST_SPECIAL)]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *fillers, *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>"},
        padding_side="left",
    )
    image_processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 16384)
    PaddleOCRVLProcessor(image_processor=image_processor, tokenizer=fast, chat_template=TEMPLATE).save_pretrained(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="new folder, outside git")
    parser.add_argument("--layers", type=int, default=36, help="language blocks")
    parser.add_argument("--vision-layers", type=int, default=32, help="vision blocks")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"{arguments.out}: expected a new or empty folder, got files in it; choose another")
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = shaped_config(arguments.layers, arguments.vision_layers)
    write_processor(arguments.out)
    count = write_weights(config, arguments.out, seed=arguments.seed)
    config.save_pretrained(arguments.out)
    print(f"{arguments.out}: {count:,} random weights")


if __name__ == "__main__":
    main()
