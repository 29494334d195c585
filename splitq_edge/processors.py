"""Processors for pictures and text alone, without the half for videos that needs torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
VIDEO_HALF = "video_processor"


def image_only(name: str) -> Any:
    """A processor class of transformers; where it has a half for videos, the class without it, under the same name.

    What it makes of pictures and text is the same, and folders that it writes can be read by the whole class too.
    """
    import transformers

    whole = getattr(transformers, name)
    if VIDEO_HALF not in whole.get_attributes():
        return whole

    def get_attributes(_cls: type) -> list[str]:
        return [attribute for attribute in whole.get_attributes() if attribute != VIDEO_HALF]

    return type(name, (whole,), {"get_attributes": classmethod(get_attributes)})


def load_image_only(folder: Path) -> Any:
    """The processor of a folder without its half for videos."""
    from transformers import AutoProcessor

    for file in PROCESSOR_FILES:
        path = folder / file
        name = json.loads(path.read_text(encoding="utf-8")).get("processor_class") if path.is_file() else None
        if name:
            return image_only(name).from_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)
