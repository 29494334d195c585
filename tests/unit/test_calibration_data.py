"""What a calibration sample becomes: model inputs, and which of its tokens are the answer."""

from __future__ import annotations

from pathlib import Path

from builders import IMAGE_TOKENS, tiny_loaded, write_chats, write_image

from splitq_edge.calibration.data import CalibrationSample, encode_sample, load_samples


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


def test_file_of_a_windows_editor_is_read(tmp_path: Path) -> None:
    folder = write_chats(tmp_path / "chats", 2)
    plain = load_samples(str(folder), 2, seed=0)
    content = (folder / "chats.jsonl").read_bytes()
    (folder / "chats.jsonl").write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert load_samples(str(folder), 2, seed=0) == plain


def test_draw_of_samples_repeats_with_its_seed_and_takes_none_twice(tmp_path: Path) -> None:
    folder = write_chats(tmp_path / "chats", 8)
    drawn = [sample.origin for sample in load_samples(str(folder), 5, seed=3)]
    assert drawn == [sample.origin for sample in load_samples(str(folder), 5, seed=3)]
    assert len(set(drawn)) == 5
    assert drawn != [sample.origin for sample in load_samples(str(folder), 5, seed=4)]
    assert len(load_samples(str(folder), 20, seed=3)) == 8


def test_chat_without_an_answer_at_its_end_has_none(tmp_path: Path) -> None:
    picture = {"type": "image", "path": str(write_image(tmp_path / "0.png"))}
    messages = ({"role": "user", "content": [picture, {"type": "text", "text": "what?"}]},)
    loaded = tiny_loaded()
    encoded = encode_sample(loaded.processor, CalibrationSample(messages, "chats.jsonl:1"), loaded.image_layout)
    assert "answer" not in encoded
