"""Tiny random models of the other families, and folders of checkpoints as users have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from builders import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN_ID,
    IMAGE_TOKENS,
    SPECIAL_TOKENS,
    VOCABULARY,
    left_padded,
    prompt_ids,
    rng,
    tiny_llava_config,
    tiny_processor,
)
from torch import nn

from splitq_edge.adapters.registry import adapter_for

QWEN_VIDEO_TOKEN_ID = VOCABULARY - 1
QWEN_VISION_START_ID = VOCABULARY - 12  # the first free one
QWEN_PROCESSORS = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen2_vl": "Qwen2VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
TILE_SIZE = 32
TILE_TOKENS = 4  # image tokens a tile: (32 / 8) ** 2 / 2 ** 2
PINPOINTS = [[TILE_SIZE, 2 * TILE_SIZE], [2 * TILE_SIZE, TILE_SIZE], [2 * TILE_SIZE] * 2, [TILE_SIZE, 3 * TILE_SIZE]]
TILE_MARKS = (  # of a SmolVLM's tokenizer; rows and columns as far as the tests cut
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)),
)
GEMMA_BEGIN_ID = VOCABULARY - 12  # and the end of a picture behind it
QWEN_GRID = (1, 8, 12)  # patches of 14 pixels in time, height and width; windows of 4 do not divide 12 / 2 evenly


LLAMA_TEXT = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIGLIP_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": TILE_SIZE,
    "patch_size": 8,
    "vision_use_head": False,
}
QWEN_TEXT = {
    **{name: value for name, value in LLAMA_TEXT.items() if name not in ("model_type", "pad_token_id")},
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
}
QWEN_TOKENS = {
    "image_token_id": IMAGE_TOKEN_ID,
    "video_token_id": QWEN_VIDEO_TOKEN_ID,
    "vision_start_token_id": QWEN_VISION_START_ID,
}


def tiny_qwen2_5_vl_config(*, tied: bool = True) -> Any:
    """Configuration of a Qwen2.5-VL with one window-attention and one full-attention vision block."""
    from transformers import Qwen2_5_VLConfig

    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 96,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLConfig(vision_config=vision, text_config=QWEN_TEXT, tie_word_embeddings=tied, **QWEN_TOKENS)


def tiny_qwen2_vl_config(*, tied: bool = True) -> Any:
    """Configuration of a Qwen2-VL."""
    from transformers import Qwen2VLConfig

    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 96, "mlp_ratio": 2, "num_heads": 2}
    return Qwen2VLConfig(vision_config=vision, text_config=QWEN_TEXT, tie_word_embeddings=tied, **QWEN_TOKENS)


def tiny_qwen3_vl_config(*, tied: bool = True) -> Any:
    """Configuration of a Qwen3-VL whose first vision block hands on its features; learned positions, 5 x 5 of them."""
    from transformers import Qwen3VLConfig

    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 96,
        "patch_size": 14,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0],
    }
    text = {**QWEN_TEXT, "head_dim": 16}
    return Qwen3VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=tied, **QWEN_TOKENS)


def tiny_smolvlm_config(*, model_type: str = "smolvlm", tied: bool = True) -> Any:
    """Configuration of a SmolVLM, or an Idefics3 of the same shape: tiles of 32 pixels give 4 image tokens each."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        model_type,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": TILE_SIZE,
            "patch_size": 8,
        },
        text_config=LLAMA_TEXT,
        scale_factor=2,
        image_token_id=IMAGE_TOKEN_ID,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )


def tiny_llava_next_config(*, tied: bool = True) -> Any:
    """Configuration of a LLaVA-NeXT: tiles of 32 pixels, 4 x 4 patches each."""
    from transformers import LlavaNextConfig

    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": TILE_SIZE,
        "patch_size": 8,
        "projection_dim": 32,
    }
    return LlavaNextConfig(
        vision_config=vision,
        text_config={**LLAMA_TEXT, "tie_word_embeddings": tied},
        image_token_index=IMAGE_TOKEN_ID,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=tied,
    )


def tiny_llava_onevision_config(*, tied: bool = True) -> Any:
    """Configuration of a LLaVA-OneVision: tiles of 32 pixels, 4 x 4 patches each; maps of more than 2 tiles shrink."""
    from transformers import LlavaOnevisionConfig

    return LlavaOnevisionConfig(
        vision_config=SIGLIP_VISION,
        text_config={**LLAMA_TEXT, "model_type": "qwen2", "tie_word_embeddings": tied},
        image_token_index=IMAGE_TOKEN_ID,
        video_token_index=QWEN_VIDEO_TOKEN_ID,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
        tie_word_embeddings=tied,
    )


def tiny_gemma3_config(*, tied: bool = True) -> Any:
    """Configuration of a Gemma 3: pictures of 32 pixels give 4 tokens; one layer sees 6 tokens back, one all."""
    from transformers import Gemma3Config

    text = {name: value for name, value in LLAMA_TEXT.items() if name != "model_type"}
    return Gemma3Config(
        text_config={
            **text,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config=SIGLIP_VISION,
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN_ID,
        boi_token_index=GEMMA_BEGIN_ID,
        eoi_token_index=GEMMA_BEGIN_ID + 1,
        tie_word_embeddings=tied,
    )


def tiny_internvl_config(*, tied: bool = True) -> Any:
    """Configuration of an InternVL: tiles of 32 pixels give 4 image tokens each."""
    from transformers import InternVLConfig

    vision = {name: value for name, value in SIGLIP_VISION.items() if name not in ("model_type", "vision_use_head")}
    return InternVLConfig(
        vision_config=vision,
        text_config={**LLAMA_TEXT, "model_type": "qwen2", "tie_word_embeddings": tied},
        image_token_id=IMAGE_TOKEN_ID,
        image_seq_length=TILE_TOKENS,
        tie_word_embeddings=tied,
    )


def tiny_paligemma_config(*, tied: bool = True) -> Any:
    """Configuration of a PaliGemma: pictures of 32 pixels give 16 tokens."""
    from transformers import PaliGemmaConfig

    return PaliGemmaConfig(
        vision_config=SIGLIP_VISION,
        text_config={**LLAMA_TEXT, "model_type": "gemma", "head_dim": 16},
        image_token_index=IMAGE_TOKEN_ID,
        projection_dim=96,
        hidden_size=96,
        tie_word_embeddings=tied,
    )


def tiny_llama_config() -> Any:
    """Configuration of a text-only Llama with tied embeddings, as SmolLM2 has them."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )


TINY_CONFIGS = {
    "gemma3": tiny_gemma3_config,
    "idefics3": partial(tiny_smolvlm_config, model_type="idefics3"),
    "internvl": tiny_internvl_config,
    "llama": tiny_llama_config,
    "llava": tiny_llava_config,
    "llava_next": tiny_llava_next_config,
    "llava_onevision": tiny_llava_onevision_config,
    "paligemma": tiny_paligemma_config,
    "qwen2_5_vl": tiny_qwen2_5_vl_config,
    "qwen2_vl": tiny_qwen2_vl_config,
    "qwen3_vl": tiny_qwen3_vl_config,
    "smolvlm": tiny_smolvlm_config,
}


def tiny_model(model_type: str, seed: int = 0, **config: Any) -> Any:
    """A model with random weights, biases and norms included, so that no weight can be missed unnoticed."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = getattr(transformers, adapter_for(model_type).model_class)
        model = auto.from_config(TINY_CONFIGS[model_type](**config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.1)
    return model


def tiny_tokenizer(**settings: Any) -> Any:
    """The byte-level tokenizer of `builders.tiny_processor` by itself."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = tiny_processor().tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        padding_side="left",
        **settings,
    )


def save_tile_processor(model_type: str, folder: Path) -> None:
    """Files of a SmolVLM's processor as hub folders have them; pictures become up to 3 x 3 tiles and a small copy."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(TILE_MARKS), special_tokens=True)
    tokenizer.save_pretrained(folder)
    name = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[model_type]
    settings = {
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
        "do_image_splitting": True,
        "size": {"longest_edge": 3 * TILE_SIZE},
        "max_image_size": {"longest_edge": TILE_SIZE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    processor = {"processor_class": f"{name}Processor", "image_seq_len": TILE_TOKENS}
    (folder / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def save_anyres_processor(model_type: str, folder: Path) -> None:
    """Files of a LLaVA-NeXT's or LLaVA-OneVision's processor."""
    tiny_tokenizer().save_pretrained(folder)
    name = {"llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}[model_type]
    square = {"height": TILE_SIZE, "width": TILE_SIZE}
    images = {
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
        "image_grid_pinpoints": PINPOINTS,
        "size": {"shortest_edge": TILE_SIZE} if model_type == "llava_next" else square,
        "crop_size": square,
    }
    both = {"processor_class": f"{name}Processor", "image_token": "<image>"}
    if model_type == "llava_next":
        both |= {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    else:
        both |= {
            "num_image_tokens": (TILE_SIZE // 8) ** 2,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_2",
        }
    (folder / "preprocessor_config.json").write_text(json.dumps(images), encoding="utf-8")
    (folder / "processor_config.json").write_text(json.dumps(both), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def save_gemma3_processor(_model_type: str, folder: Path) -> None:
    """Files of a Gemma 3's processor; the chat template writes the token that begins a picture."""
    tokenizer = tiny_tokenizer(
        extra_special_tokens={"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    )
    assert tokenizer.convert_tokens_to_ids(["<boi>", "<eoi>"]) == [GEMMA_BEGIN_ID, GEMMA_BEGIN_ID + 1]
    tokenizer.save_pretrained(folder)
    size = {"height": TILE_SIZE, "width": TILE_SIZE}
    images = {"image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor", "size": size}
    both = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    (folder / "preprocessor_config.json").write_text(json.dumps(images), encoding="utf-8")
    (folder / "processor_config.json").write_text(json.dumps(both), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("<image>", "<boi>"), encoding="utf-8")


def save_internvl_processor(_model_type: str, folder: Path) -> None:
    """Files of an InternVL's processor; pictures become up to 6 tiles and a small copy."""
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
    tiny_tokenizer(extra_special_tokens={**names, "context_image_token": "<image>"}).save_pretrained(folder)
    images = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "size": {"height": TILE_SIZE, "width": TILE_SIZE},
        "crop_to_patches": False,  # the processor as a whole does it nevertheless
        "max_patches": 6,
    }
    both = {"processor_class": "InternVLProcessor", "image_seq_length": TILE_TOKENS}
    (folder / "preprocessor_config.json").write_text(json.dumps(images), encoding="utf-8")
    (folder / "processor_config.json").write_text(json.dumps(both), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def save_paligemma_processor(_model_type: str, folder: Path) -> None:
    """Files of a PaliGemma's processor, which has no chat template."""
    tiny_tokenizer().save_pretrained(folder)
    images = {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
        "image_seq_length": 16,
        "size": {"height": TILE_SIZE, "width": TILE_SIZE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images), encoding="utf-8")


def save_qwen_processor(model_type: str, folder: Path) -> None:
    """Files of a Qwen-VL's processor; the chat template marks pictures as the family's own does."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<vision_start>"], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<vision_start>") == QWEN_VISION_START_ID
    tokenizer.save_pretrained(folder)
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": QWEN_PROCESSORS[model_type],
        "min_pixels": 56 * 56,
        "max_pixels": 112 * 168,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    template = CHAT_TEMPLATE.replace("<image>", "<vision_start><image>]")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")


PROCESSORS: dict[str, Callable[[str, Path], Any]] = {
    "gemma3": save_gemma3_processor,
    "idefics3": save_tile_processor,
    "internvl": save_internvl_processor,
    "llama": lambda _model_type, folder: tiny_tokenizer().save_pretrained(folder),
    "llava": lambda _model_type, folder: tiny_processor().save_pretrained(folder),
    "llava_next": save_anyres_processor,
    "llava_onevision": save_anyres_processor,
    "paligemma": save_paligemma_processor,
    **dict.fromkeys(QWEN_PROCESSORS, save_qwen_processor),
    "smolvlm": save_tile_processor,
}


def save_processor(model_type: str, folder: Path) -> None:
    """Processor files as the family's checkpoints have them."""
    PROCESSORS[model_type](model_type, folder)


def save_checkpoint(
    model_type: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16, shard: str = "200KB", **config: Any
) -> Path:
    """A checkpoint folder in several shards."""
    tiny_model(model_type, **config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    save_processor(model_type, folder)
    return folder


def tiny_inputs(model_type: str) -> dict[str, torch.Tensor]:
    """Model inputs of two left-padded prompts, each with an image where the family knows images."""
    inputs = INPUTS[model_type]()
    types = adapter_for(model_type).token_types
    return {**inputs, types: (inputs["input_ids"] == IMAGE_TOKEN_ID).int()} if types else inputs


def text_inputs() -> dict[str, torch.Tensor]:
    """Two prompts of text."""
    ids, mask = left_padded([prompt_ids("what is it?"), prompt_ids("red?")])
    return {"input_ids": ids, "attention_mask": mask}


def image_inputs(first: int, second: int, *size: int) -> dict[str, torch.Tensor]:
    """Two prompts with so many image tokens each; pixel_values of the given size."""
    ids, mask = left_padded(
        [
            prompt_ids("a") + [IMAGE_TOKEN_ID] * first + prompt_ids("what is it?"),
            prompt_ids() + [IMAGE_TOKEN_ID] * second + prompt_ids("red?"),
        ]
    )
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(*size, generator=rng())}


def anyres_inputs() -> dict[str, torch.Tensor]:
    """A wide and a tall picture of two tiles: 16 tokens of the small copy, lines of 8 and 4 with their ends."""
    sizes = torch.tensor([(TILE_SIZE, 2 * TILE_SIZE), (2 * TILE_SIZE, TILE_SIZE)])
    return {**image_inputs(16 + 4 * 9, 16 + 8 * 5, 6, 3, TILE_SIZE, TILE_SIZE), "image_sizes": sizes}


def qwen_inputs() -> dict[str, torch.Tensor]:
    """Two pictures of `QWEN_GRID`."""
    frames, height, width = QWEN_GRID
    patches = frames * height * width
    return {
        **image_inputs(patches // 4, patches // 4, 2 * patches, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([QWEN_GRID, QWEN_GRID]),
    }


INPUTS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "gemma3": partial(image_inputs, 4, 4, 2, 3, TILE_SIZE, TILE_SIZE),
    "idefics3": partial(image_inputs, 3 * TILE_TOKENS, TILE_TOKENS, 4, 1, 3, TILE_SIZE, TILE_SIZE),
    "internvl": partial(image_inputs, 2 * TILE_TOKENS, TILE_TOKENS, 3, 3, TILE_SIZE, TILE_SIZE),
    "llama": text_inputs,
    "llava": partial(image_inputs, IMAGE_TOKENS, IMAGE_TOKENS, 2, 3, 56, 56),
    "llava_next": anyres_inputs,
    "llava_onevision": anyres_inputs,
    "paligemma": partial(image_inputs, 16, 16, 2, 3, TILE_SIZE, TILE_SIZE),
    **dict.fromkeys(QWEN_PROCESSORS, qwen_inputs),
    "smolvlm": partial(image_inputs, 3 * TILE_TOKENS, TILE_TOKENS, 4, 1, 3, TILE_SIZE, TILE_SIZE),
}
