"""The script that writes a checkpoint of Qwen2.5-VL-3B's shape: its size, its files, its processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders import load_script, write_image
from families import tiny_qwen2_5_vl_config

from splitq_edge.adapters.registry import adapter_for
from splitq_edge.loading import _load_processor, load_model

SCRIPT = Path(__file__).resolve().parents[2] / "models" / "qwen2.5-vl-3b-shaped" / "make.py"


@pytest.fixture(scope="module")
def make() -> Any:
    return load_script(SCRIPT)


def write(make: Any, folder: Path, seed: int) -> Path:
    """The script's files for a tiny configuration."""
    folder.mkdir()
    config = tiny_qwen2_5_vl_config()
    make.write_weights(config, folder, seed=seed, shard=200_000)
    config.save_pretrained(folder)
    return folder


def test_the_full_model_has_the_real_ones_number_of_weights(make: Any) -> None:
    weights = make.shapes(make.shaped_config(36, 32))
    assert sum(weight.numel() for weight in weights.values()) == 3_754_622_976


def test_weights_carry_the_names_of_published_checkpoints(make: Any) -> None:
    names = make.shapes(make.shaped_config(1, 1)).keys()
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"} <= names
    assert {"visual.patch_embed.proj.weight", "visual.blocks.0.attn.qkv.weight", "visual.merger.mlp.2.bias"} <= names
    assert "lm_head.weight" not in names


def test_a_seed_gives_the_same_files_again(make: Any, tmp_path: Path) -> None:
    first, same, other = (write(make, tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    shards = sorted(path.name for path in first.glob("*.safetensors"))
    assert len(shards) > 1
    assert all((first / name).read_bytes() == (same / name).read_bytes() for name in shards)
    assert any((first / name).read_bytes() != (other / name).read_bytes() for name in shards)
    assert set(json.loads((first / "model.safetensors.index.json").read_text())["weight_map"].values()) == set(shards)


def test_its_files_load_lazily(make: Any, tmp_path: Path) -> None:
    folder = write(make, tmp_path / "model", 0)
    make.write_processor(folder)
    loaded = load_model(str(folder), lazy=True)
    assert all(parameter.any() for parameter in loaded.block(1).parameters())


@pytest.mark.parametrize("loader", ["transformers", "splitq_edge"])
def test_its_processor_places_images_and_knows_the_real_ids(make: Any, tmp_path: Path, loader: str) -> None:
    from transformers import AutoProcessor

    make.write_processor(tmp_path)
    if loader == "transformers":
        processor = AutoProcessor.from_pretrained(tmp_path)
    else:
        processor = _load_processor(str(tmp_path), None, adapter_for("qwen2_5_vl"), make.shaped_config(1, 1), {})
    image = write_image(tmp_path / "image.png")
    chat = [{"role": "user", "content": [{"type": "image", "path": str(image)}, {"type": "text", "text": "what?"}]}]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    real = make.shaped_config(36, 32)
    is_image = inputs["input_ids"] == real.image_token_id
    assert is_image.sum() == inputs["image_grid_thw"].prod() // 4
    start, stop = is_image[0].nonzero()[[0, -1], 0].tolist()
    assert inputs["input_ids"][0, start - 1] == real.vision_start_token_id
    assert inputs["input_ids"][0, stop + 1] == real.vision_end_token_id
    assert inputs["mm_token_type_ids"].bool().equal(is_image)
    text = processor.decode(inputs["input_ids"][0])
    assert text.endswith("what?<|im_end|>\n<|im_start|>assistant\n")
    assert processor.tokenizer.eos_token_id == real.text_config.eos_token_id
