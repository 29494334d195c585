"""From a Hugging Face folder or hub id to model, processor and adapter; weights in memory or read on demand."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from splitq_edge.adapters.adapter import ModelAdapter
from splitq_edge.adapters.registry import adapter_for
from splitq_edge.artifacts import EXPORT_FILE
from splitq_edge.checkpoint import CheckpointWeights, check_files, safetensors_files, weight_names
from splitq_edge.errors import SplitQError
from splitq_edge.image_layout import ImageLayout
from splitq_edge.lora import CONFIG_FILE, LoraAdapter, read_adapter_config
from splitq_edge.modality import ModalityContext, modality_of
from splitq_edge.processors import image_only

CPU = torch.device("cpu")
REASON = 300  # characters kept of another library's message
TOKENIZER_FILES = "of the tokenizer (tokenizer.json or tokenizer.model, tokenizer_config.json)"
PICTURE_FILES = f"of the image processor (preprocessor_config.json or processor_config.json) and {TOKENIZER_FILES}"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class LoadedModel:
    """A model ready to be calibrated.

    Attributes:
        source: what the user gave: folder or hub id.
        model: the transformers model in float32, evaluation mode; on the meta device when loaded lazily, except for
            buffers that no checkpoint holds (rotary frequencies).
        processor: its processor (tokenizer + image processor + chat template); the tokenizer of a text-only model.
        adapter: description of the family.
        context: carries the modality mask to quantized layers; set by every forward of `model` from its input_ids.
        weights: reads the weights of a lazily loaded model; None when `model` holds them.
        device: where `model`, or what is read of it, lives.
        base: the checkpoint that an adapter was merged into, else `source`.
        lora: folder of that adapter, None for none.
    """

    source: str
    model: Any  # a transformers PreTrainedModel; its generated attributes escape type checkers
    processor: Any
    adapter: ModelAdapter
    context: ModalityContext
    weights: CheckpointWeights | None = None
    device: torch.device = CPU
    base: str = ""
    lora: Path | None = None

    @property
    def image_token_id(self) -> int | None:
        """Id of the token that image features replace, None for a text-only model."""
        field = self.adapter.image_token_field
        return int(getattr(self.model.config, field)) if field else None

    @property
    def image_layout(self) -> ImageLayout:
        """How pictures reach the model; of a text-only one it says nothing."""
        return ImageLayout.of(self.adapter, self.model.config)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, inside a processor or by itself."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def text_config(self) -> Any:
        """Configuration of the language model."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def final_norm_path(self) -> str:
        """Module between the last block and the output projection."""
        return self.adapter.final_norm

    @property
    def block_count(self) -> int:
        """Number of language blocks."""
        return len(self.language_blocks())

    def language_blocks(self) -> nn.ModuleList:
        """The blocks whose linears are quantized."""
        blocks = self.model.get_submodule(self.adapter.language_blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def block(self, index: int) -> nn.Module:
        """A copy of a language block that the caller owns: float32 weights on `device`, evaluation mode, no gradients.

        Args:
            index: 0 to `block_count` - 1.

        Raises:
            SplitQError: a weight cannot be read.
        """
        block = copy.deepcopy(self.language_blocks()[index])
        if self.weights is not None:
            path = f"{self.adapter.language_blocks}.{index}"
            self.weights.fill(
                [(f"{path}.{name}" if name else path, module) for name, module in block.named_modules()], self.device
            )
        return block.eval().requires_grad_(False)

    @contextmanager
    def outside_blocks(self) -> Iterator[None]:
        """Within the `with` block everything but the language blocks has its weights, in float32 on `device`.

        `model` then runs up to its first language block, and what follows the last one (`final_norm_path`, lm_head)
        can be called. On exit a lazily loaded model gives the weights up again.

        Raises:
            SplitQError: a weight cannot be read.
        """
        if self.weights is None:
            yield
            return
        blocks = self.adapter.language_blocks + "."
        modules = [(path, module) for path, module in self.model.named_modules() if not path.startswith(blocks)]
        undo = self.weights.fill(modules, self.device)
        try:
            yield
        finally:
            for restore in undo:
                restore()

    @contextmanager
    def having(self, module: nn.Module) -> Iterator[None]:
        """Within the `with` block a module of the model has its own weights, in float32 on `device`.

        Raises:
            SplitQError: a weight cannot be read.
        """
        if self.weights is None:
            yield
            return
        undo = self.weights.fill(self._named(module), self.device)
        try:
            yield
        finally:
            for restore in undo:
                restore()

    def keep(self, *modules: nn.Module) -> None:
        """Give modules of a lazily loaded model their own weights for good; one that they share is read once.

        Raises:
            SplitQError: a weight cannot be read.
        """
        if self.weights is not None:
            self.weights.fill(self._named(*modules), self.device)

    def _named(self, *modules: nn.Module) -> list[tuple[str, nn.Module]]:
        paths = {module: path for path, module in self.model.named_modules()}
        return [(paths[module], module) for module in modules]

    def read_rest(self) -> None:
        """Give a lazily loaded model the weights that it has on the meta device only, for good.

        Raises:
            SplitQError: a weight cannot be read.
        """
        if self.weights is not None:
            self.weights.fill(self.model.named_modules(), self.device)

    def give_up(self) -> None:
        """Free the memory of the weights for good, whoever refers to them still; the model can no longer run."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data = tensor.new_empty(0)

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


def tied(loaded: LoadedModel) -> bool:
    """Whether the output projection's weight is the token embedding's."""
    head = loaded.model.get_submodule(loaded.adapter.lm_head)
    return getattr(head, "weight", None) is loaded.model.get_input_embeddings().weight


def load_model(
    source: str,
    *,
    revision: str | None = None,
    lazy: bool | None = False,
    device: torch.device | str = CPU,
    adapter: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a checkpoint in float32.

    Args:
        source: local folder, or a hub id such as "llava-hf/llava-1.5-7b-hf"; or the folder of a LoRA adapter, whose
            adapter_config.json names its base.
        revision: hub revision.
        lazy: leave the weights in their files and read them when `block`, `outside_blocks` or `read_rest` asks for
            them; None: if the files are safetensors.
        device: where the weights live once read.
        adapter: folder of a LoRA adapter to merge into the weights.
        trust_remote_code: let transformers run code that comes with the checkpoint.

    Raises:
        SplitQError: folder missing or without config.json, unsupported model type, a checkpoint that is quantized
            already, weights that are unreadable, missing or not the model's, a processor that does not fit the model;
            lazily also weights that are not in safetensors files.
    """
    import transformers
    from transformers.utils import logging as hf_logging

    check_name(source)
    given = source
    if adapter is None and _is_adapter(Path(source)):
        adapter, source = source, _base_of(Path(source))
    if revision is not None and Path(source).is_dir():
        raise SplitQError(
            f"--revision: expected a hub id as MODEL beside it, got the folder {source}; leave --revision out"
        )
    code = {"trust_remote_code": trust_remote_code}
    family = adapter_for(_model_type(source, revision, code))
    device = torch.device(device)
    hf_logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=revision, **code)
        if getattr(config, "quantization_config", None) is not None:
            raise SplitQError(f"model {source}: expected float weights, got a quantized checkpoint; give the original")
        # On the meta device transformers checks names and shapes against the files' headers and reads no weight.
        files = [] if lazy is False else safetensors_files(source, revision, required=bool(lazy))
        lazy = bool(files)
        model: Any
        info: dict[str, Any]
        model, info = getattr(transformers, family.model_class).from_pretrained(
            source,
            revision=revision,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the weight's name
            **({"device_map": "meta"} if lazy else {}),
            **code,
        )
        processor = _processor(source, revision, family, config, code)
        if family.pixel_layout == "tiles":
            _check_tiles(source, processor, config)
    except SplitQError:
        raise
    except Exception as error:
        check_files(_files_at_hand(source, revision))
        raise SplitQError(
            f"model {source}: expected a loadable checkpoint ({_one_line(error)}); fetch or save it again"
        ) from error
    _check_complete(source, model, info)
    lora = None if adapter is None else _lora(Path(adapter), model)
    if lazy:
        _materialize_buffers(model, device)
        weights = CheckpointWeights(model, files, lora)
    else:
        if lora is not None:
            lora.merge_into(_parameters(model))
        model.to(device)
        weights = None
    merged = None if adapter is None else Path(adapter)
    return LoadedModel(given, model.eval(), processor, family, ModalityContext(), weights, device, source, merged)


def _files_at_hand(source: str, revision: str | None) -> list[Path]:
    """Safetensors files of a checkpoint that could not be loaded, as far as they can be found."""
    try:
        return safetensors_files(source, revision, required=False)
    except Exception:  # the first error tells more
        return []


def check_name(source: str) -> None:
    """Check that a model has a name at all; an empty one would be the current folder.

    Raises:
        SplitQError: it has none.
    """
    if not source.strip():
        raise SplitQError("MODEL: expected a folder or a hub id such as org/name, got an empty text; name the model")


def check_model(source: str) -> None:
    """Check what can be known of a checkpoint without its weights: that it is there and of a supported type.

    Args:
        source: as for `load_model`.

    Raises:
        SplitQError: it is not.
    """
    check_name(source)
    base = _base_of(Path(source)) if _is_adapter(Path(source)) else source
    adapter_for(_model_type(base, None, {"trust_remote_code": False}))


def _is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no weights of a model."""
    return (folder / CONFIG_FILE).is_file() and not any(
        True for pattern in ("model*.safetensors", "pytorch_model*.bin") for _ in folder.glob(pattern)
    )


def _base_of(folder: Path) -> str:
    """The checkpoint that an adapter was trained on; a relative path counts from the adapter's folder too."""
    base = read_adapter_config(folder).get("base_model_name_or_path")
    if not base:
        raise SplitQError(
            f"{folder / CONFIG_FILE}: expected base_model_name_or_path, got none; give the base as MODEL and --adapter"
        )
    beside = folder / str(base)
    return str(beside) if not Path(base).is_dir() and beside.is_dir() else str(base)


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    """By every name that they have."""
    return dict(model.named_parameters(remove_duplicate=False))


def _lora(folder: Path, model: Any) -> LoraAdapter:
    name_of = weight_names(model)
    return LoraAdapter(folder, lambda key: name_of(key) or key, _parameters(model))


def _check_complete(source: str, model: Any, info: dict[str, Any]) -> None:
    for problem, advice in (
        ("missing", "check that the checkpoint is complete"),
        ("unexpected", "check that config.json belongs to the weights"),
        ("mismatched", "check that config.json belongs to the weights"),
    ):
        names = sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in info[f"{problem}_keys"])
        if names:
            raise SplitQError(
                f"model {source}: expected the weights of {type(model).__name__}, "
                f"{len(names)} are {problem}, the first is {names[0]}; {advice}"
            )


def _materialize_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds; parameters are marked as loaded and stay on the meta device."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        module._buffers[key] = torch.empty_like(buffer, device=device)
        module._is_hf_initialized = False
    model.initialize_weights()


def _processor(source: str, revision: str | None, adapter: ModelAdapter, config: Any, code: dict[str, bool]) -> Any:
    """See `_load_processor`.

    Raises:
        SplitQError: its files are missing or damaged, or have no chat template.
    """
    try:
        processor = _load_processor(source, revision, adapter, config, code)
    except ImportError:  # a package is missing, no file
        raise
    except Exception as error:
        kinds = PICTURE_FILES if adapter.image_token_field else TOKENIZER_FILES
        raise SplitQError(
            f"model {source}: expected beside the weights the files {kinds}; transformers cannot load them "
            f"({_one_line(error)}); copy the missing or damaged ones from the original checkpoint"
        ) from error
    if adapter.image_token_field and not processor.chat_template:
        raise SplitQError(
            f"model {source}: expected a chat template (chat_template.jinja, or chat_template in processor_config.json "
            "or tokenizer_config.json), got none; copy it from the original checkpoint"
        )
    return processor


def _load_processor(
    source: str, revision: str | None, adapter: ModelAdapter, config: Any, code: dict[str, bool]
) -> Any:
    """Processor of a vision-language model, tokenizer of a text-only one."""
    import transformers

    if not adapter.image_token_field:
        return transformers.AutoTokenizer.from_pretrained(source, revision=revision, **code)
    if not adapter.image_only_processor:
        processor = transformers.AutoProcessor.from_pretrained(source, revision=revision, **code)
        if adapter.chat_template and not processor.chat_template:
            processor.chat_template = adapter.chat_template
        return processor
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision, **code)
    image_token = tokenizer.convert_ids_to_tokens(int(getattr(config, adapter.image_token_field)))
    return image_only(adapter.image_only_processor).from_pretrained(
        source, revision=revision, **code, extra_special_tokens={"image_token": image_token}
    )


def _check_tiles(source: str, processor: Any, config: Any) -> None:
    """A processor that cuts images into tiles must cut them as the vision encoder takes them."""
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2
    for setting, expected, got in (
        ("image_seq_len", tokens, processor.image_seq_len),
        ("max_image_size.longest_edge", vision.image_size, processor.image_processor.max_image_size["longest_edge"]),
        ("image token id", config.image_token_id, processor.image_token_id),
    ):
        if got != expected:
            raise SplitQError(
                f"model {source}: expected a processor with {setting} {expected}, as config.json wants it, got {got}; "
                "mend the processor's files"
            )


def _model_type(source: str, revision: str | None, code: dict[str, bool]) -> str:
    folder = Path(source)
    if folder.is_dir():
        config = folder / "config.json"
        if (folder / EXPORT_FILE).is_file():
            raise SplitQError(
                f"model {source}: expected a checkpoint, got a folder that splitq-edge exported ({EXPORT_FILE}); give "
                "the model that it was made from"
            )
        if not config.is_file():
            raise SplitQError(f"model {source}: expected a folder with config.json, got none; give a checkpoint folder")
        try:
            return str(json.loads(config.read_text(encoding="utf-8"))["model_type"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise SplitQError(
                f"{config}: expected JSON with model_type ({_one_line(error)}); fetch or save the checkpoint again"
            ) from error
    local = source.startswith((".", "/", "~")) or (folder.parent.is_dir() and folder.parent != Path())
    if folder.exists() or local or not HUB_ID.fullmatch(source):
        raise SplitQError(
            f"model {source}: expected a folder or a hub id such as org/name, got neither; check the path"
        )
    from transformers import AutoConfig

    try:
        return str(AutoConfig.from_pretrained(source, revision=revision, **code).model_type)
    except Exception as error:
        raise SplitQError(
            f"model {source}: expected a local folder or a reachable hub model ({_one_line(error)}); check the name"
        ) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= REASON:
        return text
    sentences = text[:REASON].rpartition(". ")[0]
    return sentences or f"{text[:REASON].rpartition(' ')[0]} ..."
