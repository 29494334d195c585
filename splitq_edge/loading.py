"""From a Hugging Face folder or hub id to model, processor and adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from splitq_edge.adapters.adapter import ModelAdapter
from splitq_edge.adapters.registry import adapter_for
from splitq_edge.errors import SplitQError
from splitq_edge.modality import ModalityContext, modality_of


@dataclass
class LoadedModel:
    """A vision-language model ready to be calibrated.

    Attributes:
        source: what the user gave: folder or hub id.
        model: the transformers model in float32, evaluation mode.
        processor: its processor (tokenizer + image processor + chat template).
        adapter: description of the family.
        context: carries the modality mask to quantized layers; set by every forward of `model` from its input_ids.
    """

    source: str
    model: Any  # a transformers PreTrainedModel; its generated attributes escape type checkers
    processor: Any
    adapter: ModelAdapter
    context: ModalityContext

    @property
    def image_token_id(self) -> int:
        """Id of the token that image features replace."""
        return int(getattr(self.model.config, self.adapter.image_token_field))

    def language_blocks(self) -> nn.ModuleList:
        """The blocks whose linears are quantized."""
        blocks = self.model.get_submodule(self.adapter.language_blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @contextmanager
    def modality_from_inputs(self) -> Iterator[None]:
        """Within the block every forward of the model sets the mask from its own input_ids."""

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            input_ids = kwargs.get("input_ids", args[0] if args else None)
            self.context._mask = None if input_ids is None else modality_of(input_ids, self.image_token_id)

        handle = self.model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            with self.context.using(None):
                yield
        finally:
            handle.remove()


def load_model(source: str, *, revision: str | None = None) -> LoadedModel:
    """Load a checkpoint in float32.

    Args:
        source: local folder, or a hub id such as "llava-hf/llava-1.5-7b-hf".
        revision: hub revision.

    Raises:
        SplitQError: folder missing or without config.json, unsupported model type, unreadable or incomplete weights.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging as hf_logging

    adapter = adapter_for(_model_type(source, revision))
    hf_logging.disable_progress_bar()
    try:
        model: Any
        info: dict[str, Any]
        model, info = AutoModelForImageTextToText.from_pretrained(  # type: ignore[misc]
            source, revision=revision, dtype=torch.float32, output_loading_info=True
        )
        processor = AutoProcessor.from_pretrained(source, revision=revision)
    except Exception as error:
        raise SplitQError(f"model {source}: expected a loadable checkpoint ({_one_line(error)})") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise SplitQError(
            f"model {source}: expected all weights, {len(missing)} are missing, the first is {missing[0]}; "
            "check that the checkpoint is complete"
        )
    return LoadedModel(source, model.eval(), processor, adapter, ModalityContext())


def _model_type(source: str, revision: str | None) -> str:
    folder = Path(source)
    if folder.is_dir():
        config = folder / "config.json"
        if not config.is_file():
            raise SplitQError(f"model {source}: expected a folder with config.json, got none; give a checkpoint folder")
        try:
            return str(json.loads(config.read_text(encoding="utf-8"))["model_type"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise SplitQError(f"{config}: expected JSON with model_type ({_one_line(error)})") from error
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise SplitQError(
            f"model {source}: expected a folder or a hub id such as org/name, got neither; check the path"
        )
    from transformers import AutoConfig

    try:
        return str(AutoConfig.from_pretrained(source, revision=revision).model_type)
    except Exception as error:
        raise SplitQError(
            f"model {source}: expected a local folder or a reachable hub model ({_one_line(error)}); check the name"
        ) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]
