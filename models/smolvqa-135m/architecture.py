"""What smolvqa-135m is made of: SmolLM2-135M-Instruct, a small vision encoder, a connector, low-rank adapters."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "smollm2-135m"))

from weights import checkpoint  # noqa: E402

IMAGE_SIZE, PATCH_SIZE, SCALE_FACTOR = 96, 8, 2
GRID = IMAGE_SIZE // PATCH_SIZE
IMAGE_TOKENS = (GRID // SCALE_FACTOR) ** 2
VISION = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
GLOBAL, FAKE, IMAGE = NEW_TOKENS = ("<global-img>", "<fake_token_around_image>", "<image>")
UNUSED = "<end_of_utterance>"  # the processor wants it in the vocabulary; this model ends with <|im_end|>
BASE_VOCABULARY = 49152
VOCABULARY = 49216  # with the new tokens, rounded up to a multiple of 64
RANK = 8
LORA_SCALE = 2.0
LANGUAGE = "model.text_model"
VISION_PARTS = ("model.vision_model", "model.connector")


class LoraLinear(nn.Module):
    """A frozen linear with a trainable low-rank branch: y = W x + scale * up (down x). The branch starts at zero.

    Args:
        base: the linear, without bias.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        self.down = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]. Merged at every call: cheaper here than two thin products with every token."""
        branch = (LORA_SCALE * self.up.to(x.dtype)) @ self.down.to(x.dtype)
        return functional.linear(x, self.weight + branch)


def build_tokenizer(base: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer with the image tokens behind its own 49,152."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": [*NEW_TOKENS, UNUSED]})
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = 2048
    return tokenizer


def build_model(base: Path, tokenizer: Any) -> SmolVLMForConditionalGeneration:
    """The model in float32: SmolLM2's weights, the rest from torch's global generator, the new tokens' rows zero."""
    text = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    language = copy.deepcopy(text.config)
    language.vocab_size = VOCABULARY
    config = SmolVLMConfig(
        vision_config=dict(VISION),
        text_config=language,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        scale_factor=SCALE_FACTOR,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = SmolVLMForConditionalGeneration(config)
    rows = torch.zeros(VOCABULARY, language.hidden_size)
    known = text.state_dict()
    rows[:BASE_VOCABULARY] = known.pop("model.embed_tokens.weight")
    known.pop("lm_head.weight", None)  # tied
    target = model.get_submodule(LANGUAGE)
    result = target.load_state_dict(
        {"embed_tokens.weight": rows, **{name.removeprefix("model."): value for name, value in known.items()}}
    )
    assert not result.missing_keys
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=16,
    )
    return model


def language_linears(model: nn.Module) -> list[str]:
    """Names, below the language model, of the linears that get an adapter: all seven of every block."""
    found = model.get_submodule(LANGUAGE).named_modules()
    return [name for name, module in found if isinstance(module, nn.Linear | LoraLinear)]


def add_adapters(model: nn.Module) -> None:
    """Put a `LoraLinear` in place of every linear of the language blocks."""
    language = model.get_submodule(LANGUAGE)
    for name in language_linears(model):
        language.set_submodule(name, LoraLinear(language.get_submodule(name)))


def delta_of(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What training changed, in bfloat16: vision encoder, connector, rows of the new tokens, adapters."""
    delta = {"tokens": tokens}
    for part in VISION_PARTS:
        delta |= {f"{part}.{name}": value for name, value in model.get_submodule(part).state_dict().items()}
    language = model.get_submodule(LANGUAGE)
    for name in language_linears(model):
        adapter = language.get_submodule(name)
        delta |= {f"lora.{name}.down": adapter.down, f"lora.{name}.up": adapter.up}
    return {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in delta.items()}


@torch.no_grad()
def apply_delta(model: SmolVLMForConditionalGeneration, delta: dict[str, torch.Tensor]) -> None:
    """Turn an untrained model of `build_model` into the trained one; adapters are merged into the weights."""
    left = {name: value.float() for name, value in delta.items()}
    for part in VISION_PARTS:
        module = model.get_submodule(part)
        module.load_state_dict({name: left.pop(f"{part}.{name}") for name in module.state_dict()})
    language = model.get_submodule(LANGUAGE)
    language.embed_tokens.weight[BASE_VOCABULARY : BASE_VOCABULARY + len(NEW_TOKENS)] = left.pop("tokens")
    for name in language_linears(model):
        weight = language.get_submodule(name).weight
        weight += LORA_SCALE * left.pop(f"lora.{name}.up") @ left.pop(f"lora.{name}.down")
    if left:
        raise ValueError(f"delta: unknown tensors {sorted(left)[:3]}")


__all__ = ["checkpoint"]
