"""What is trained: the tokenizer, the processor and the untrained model of easyvqa-tiny."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    GPT2Tokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils.chat_template_utils import render_jinja_template

from splitq_edge.evaluate.tasks import Question

IMAGE_SIZE, PATCH_SIZE = 64, 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
VISION_HIDDEN = 128
PAD, BOS, EOS, UNK, IMAGE = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")


def conversation(text: str, answer: str | None = None) -> list[dict[str, Any]]:
    """Chat messages: one question about one image, and the answer where there is one."""
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    if answer is None:
        return [asked]
    return [asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def build_tokenizer(template: str, questions: Sequence[Question]) -> GPT2Tokenizer:
    """Byte-level BPE in which every word of the task is one token and any other text still has tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # an upper bound: it runs out of pairs to merge long before
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = sorted({(q.text, q.answer) for q in questions} | {(q.text.capitalize(), q.answer) for q in questions})
    specials = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    rendered, _ = render_jinja_template([conversation(text, answer) for text, answer in texts], chat_template=template)
    # Cut at the special tokens: the trainer would learn their letters as words.
    tokenizer.train_from_iterator((piece for text in rendered for piece in specials.split(text)), trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    return GPT2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=256,
    )


def build_processor(template: str, questions: Sequence[Question]) -> LlavaProcessor:
    """The processor a user loads: CLIP's image steps at 64 x 64, the tokenizer and the chat template."""
    # The other CLIP class needs torchvision. This one is saved under the name that both share.
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(template, questions),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy drops again
        chat_template=template,
    )


def build_model(tokenizer: GPT2Tokenizer) -> LlavaForConditionalGeneration:
    """The untrained model; its initial weights come from torch's global generator."""
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=VISION_HIDDEN,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=VISION_HIDDEN,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            **special,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**special, do_sample=False, max_new_tokens=8)
    return model
