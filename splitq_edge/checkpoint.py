"""Weights of a safetensors checkpoint, read by the names that the model gives them, when they are asked for."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from splitq_edge.damage import weights_damage
from splitq_edge.errors import SplitQError
from splitq_edge.lora import LoraAdapter


def safetensors_files(source: str, revision: str | None, *, required: bool = True) -> list[Path]:
    """Weight files of a checkpoint, fetched from the hub if they are not in its cache.

    Args:
        source: local folder or hub id.
        revision: hub revision.
        required: a checkpoint without safetensors file is an error; else the list is empty.

    Raises:
        SplitQError: none where one is required, or the index is damaged.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    def find(name: str) -> str | None:
        path = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return None if path is None else str(path)

    single = find(SAFE_WEIGHTS_NAME)
    if single is not None:
        return [Path(single)]
    index = find(SAFE_WEIGHTS_INDEX_NAME)
    if index is None and not required:
        return []
    if index is None:
        raise SplitQError(
            f"model {source}: expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}, got neither; "
            "convert the weights to safetensors (load with transformers, save_pretrained)"
        )
    try:
        shards, _ = get_checkpoint_shard_files(source, index, revision=revision)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise SplitQError(f"{index}: expected JSON with metadata and weight_map ({error!r}); mend the index") from error
    return [Path(shard) for shard in shards]


def weight_names(model: Any) -> Callable[[str], str | None]:
    """The model's name of a weight, given the name that a checkpoint has for it.

    Old checkpoints name their weights otherwise than the model does; transformers' own mapping for it tells how.

    Args:
        model: transformers model, on any device.

    Returns:
        A function; it returns None for a weight that is stored in another form than the model holds it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict()

    def name_of(key: str) -> str | None:
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known and key in known:  # transformers undoes a renaming that leads nowhere
            return key
        return None if converter is not None else str(name)

    return name_of


class CheckpointWeights:
    """Where each weight of a model lies in its safetensors files. Holds names only, no tensor and no open file."""

    def __init__(self, model: Any, files: Iterable[Path], adapter: LoraAdapter | None = None) -> None:
        """Index the files.

        Args:
            model: transformers model, on any device.
            files: safetensors files of the checkpoint.
            adapter: merged into the weights that are read.

        Raises:
            SplitQError: a file is damaged, or a weight is stored in another form than the model holds it.
        """
        name_of = weight_names(model)
        self._adapter = adapter
        self._places: dict[str, tuple[Path, str]] = {}
        for file in files:
            with _opened(file) as tensors:
                keys = list(tensors.keys())
            for key in keys:
                name = name_of(key)
                if name is None:
                    raise SplitQError(
                        f"{file}: expected {key} in the form the model holds it, got one that transformers converts "
                        "while loading; load the model with transformers and save it again"
                    )
                self._places[name] = (file, key)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @torch.no_grad()
    def read(self, names: Iterable[str], device: torch.device) -> dict[str, torch.Tensor]:
        """Copies of weights.

        Args:
            names: the model's names, see `in`.
            device: where the copies live.

        Returns:
            By name; floating point tensors as float32.

        Raises:
            SplitQError: a file has gone or changed.
        """
        by_file: dict[Path, list[tuple[str, str]]] = defaultdict(list)
        for name in names:
            file, key = self._places[name]
            by_file[file].append((name, key))
        result = {}
        for file, entries in by_file.items():
            with _opened(file) as tensors:
                for name, key in entries:
                    stored = tensors.get_tensor(key)
                    dtype = torch.float32 if stored.is_floating_point() else stored.dtype
                    result[name] = stored.to(device=device, dtype=dtype)
                    if self._adapter is not None:
                        result[name] = self._adapter.merged(name, result[name])
        return result

    def fill(self, modules: Iterable[tuple[str, nn.Module]], device: torch.device) -> list[Callable[[], None]]:
        """Give modules the weights that they have on the meta device only. A weight that several share is read once.

        Args:
            modules: with their dotted names in the model; their own parameters and buffers are filled, not those of
                modules within them.
            device: where the weights shall live.

        Returns:
            Calls that put the meta tensors back.

        Raises:
            SplitQError: a weight is not in the checkpoint.
        """
        holders: dict[int, list[tuple[str, dict[str, Any], str]]] = defaultdict(list)
        for path, module in modules:
            owned: tuple[dict[str, Any], dict[str, Any]] = (module._parameters, module._buffers)
            for tensors in owned:
                for key, tensor in tensors.items():
                    if tensor is not None and tensor.is_meta:
                        holders[id(tensor)].append((f"{path}.{key}" if path else key, tensors, key))
        stored = {}  # tied weights lie in the file under one of their names
        for identity, places in holders.items():
            found = [name for name, _, _ in places if name in self]
            if not found:
                raise SplitQError(f"checkpoint: expected weight {places[0][0]}, got none; check that it is complete")
            stored[identity] = found[0]
        weights = self.read(stored.values(), device)
        undo: list[Callable[[], None]] = []
        for identity, places in holders.items():
            value = weights[stored[identity]]
            _, tensors, key = places[0]
            if isinstance(tensors[key], nn.Parameter):
                value = nn.Parameter(value, requires_grad=False)
            for _, tensors, key in places:
                undo.append(partial(tensors.__setitem__, key, tensors[key]))
                tensors[key] = value
        return undo


def check_files(files: Iterable[Path]) -> None:
    """See that safetensors files can be opened; their headers say how long they must be.

    Raises:
        SplitQError: one cannot.
    """
    for file in files:
        with _opened(file):
            pass


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file. It is read, not mapped: pages of a mapped file count as memory in use until it is closed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", backend="pread") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise SplitQError(f"{file}: {weights_damage(file, error)}") from error
