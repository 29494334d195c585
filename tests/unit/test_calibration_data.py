"""What a calibration sample becomes: model inputs, and which of its tokens are the answer."""

from __future__ import annotations

from pathlib import Path

from builders import IMAGE_TOKENS, tiny_loaded, write_image

from splitq_edge.calibration.data import CalibrationSample, encode_sample


def test_answer_is_the_last_assistant_turn_and_nothing_before_it(tmp_path: Path) -> None:
    picture = {"type": "image", "path": str(write_image(tmp_path / "0.png"))}
    turns = (("user", "what?"), ("assistant", "an x"), ("user", "and?"), ("assistant", "a y"))
    messages = tuple({"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns)
    messages[0]["content"].insert(0, picture)  # type: ignore[attr-defined]
    loaded = tiny_loaded()
    encoded = encode_sample(loaded.processor, CalibrationSample(messages, "chats.jsonl:1"), loaded.image_layout)
    ids = encoded["input_ids"][0]
    assert encoded["answer"].shape == encoded["input_ids"].shape
    assert loaded.processor.tokenizer.decode(ids[encoded["answer"][0]]) == "a y"
    assert encoded["answer"][0].nonzero()[-1] == len(ids) - 1
    assert int((ids == loaded.image_token_id).sum()) == IMAGE_TOKENS
    assert encoded["pixel_values"].shape[0] == 1
