"""LoRA adapters as peft saves them, merged into weights: W + scale * B A (Hu et al. 2021, eq. 3)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from splitq_edge.errors import SplitQError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings under which the factors mean more than a product to add, with the value that says they do not.
PLAIN = {"use_dora": False, "bias": "none", "lora_bias": False, "fan_in_fan_out": False, "layer_replication": None}


class LoraAdapter:
    """What an adapter changes in a model: products added to linear weights, and whole weights put in their place.

    Args:
        folder: adapter_config.json and adapter_model.safetensors.
        rename: the model's name of a weight from the name that a checkpoint gives it.
        weights: the model's parameters by name, on any device; a tensor with two names is shared by two layers.

    Raises:
        SplitQError: the folder holds no such adapter, one of another kind, or one of another model.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str], weights: Mapping[str, torch.Tensor]) -> None:
        self._file = folder / WEIGHTS_FILE
        self._config = read_adapter_config(folder)
        for setting, plain in PLAIN.items():
            if self._config.get(setting, plain) not in (plain, None):
                raise SplitQError(
                    f"{folder / CONFIG_FILE}: expected {setting} {plain}, got {self._config[setting]}; "
                    "merge the adapter with peft (merge_and_unload, save_pretrained) and give the merged model"
                )
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._modules: dict[str, str] = {}  # weight's name -> module as the adapter names it
        self._whole: dict[str, torch.Tensor] = {}
        tensors = _read(self._file)
        for key in sorted(tensors):
            module, kind = key.removeprefix(PREFIX), ""
            for found in (".lora_A.weight", ".lora_B.weight"):
                if key.endswith(found):
                    module, kind = module.removesuffix(found), found
            if "lora_" in module:
                raise SplitQError(
                    f"{self._file}: expected factors of linear layers only, got {key}; merge it with peft"
                )
            if kind == ".lora_A.weight":
                name = rename(f"{module}.weight")
                other = tensors.get(key.replace(".lora_A.", ".lora_B."))
                self._factors[name], self._modules[name] = self._pair(key, tensors[key], other), module
            elif not kind:
                self._whole[rename(module)] = tensors[key]
        self._check(weights)

    def __contains__(self, name: str) -> bool:
        return name in self._factors or name in self._whole

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the adapter's change.

        Args:
            name: the model's name of it.
            weight: float32; left as it is.
        """
        if name in self._whole:
            return self._whole[name].to(weight)
        if name not in self._factors:
            return weight
        down, up = (factor.to(weight) for factor in self._factors[name])  # [rank, in], [out, rank]
        return weight + self._scale(self._modules[name], down.shape[0]) * (up @ down)

    def merge_into(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Change a model's parameters in place."""
        with torch.no_grad():
            for name in (*self._factors, *self._whole):
                weights[name].copy_(self.merged(name, weights[name]))

    def _pair(self, key: str, down: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if up is None or down.dim() != 2 or up.dim() != 2 or up.shape[1] != down.shape[0]:
            got = "none" if up is None else f"{list(up.shape)}"
            raise SplitQError(
                f"{self._file}: expected lora_B [out, {down.shape[0]}] beside {key} {list(down.shape)}, got {got}; "
                "save the adapter again"
            )
        return down, up

    def _scale(self, module: str, rank: int) -> float:
        """Of a module's product; peft lets a pattern at the end of its name choose alpha."""
        alpha = float(self._config.get("lora_alpha", 1))
        for pattern, value in (self._config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = float(value)
                break
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _check(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Every changed weight must be the model's, of the same shape, and used once."""
        shapes = {name: [up.shape[0], down.shape[1]] for name, (down, up) in self._factors.items()}
        shapes |= {name: list(tensor.shape) for name, tensor in self._whole.items()}
        for name, shape in shapes.items():
            if name not in weights or list(weights[name].shape) != shape:
                got = f"a weight of shape {list(weights[name].shape)}" if name in weights else "no such weight"
                raise SplitQError(
                    f"{self._file}: expected a model with a weight {name} of shape {shape}, got {got}; "
                    "give the adapter's own base model"
                )
            shared = [other for other, weight in weights.items() if other != name and weight is weights[name]]
            if shared:
                raise SplitQError(
                    f"{self._file}: expected no change to {name}, which is also {shared[0]}; merge it with peft"
                )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter.

    Raises:
        SplitQError: missing, damaged or of another kind of adapter.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SplitQError(f"{path}: expected the settings of a peft adapter ({error!r}); check the folder") from error
    if kind != "LORA":
        raise SplitQError(f"{path}: expected an adapter of peft_type LORA, got {kind}; merge it with peft")
    return dict(config)


def _read(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise SplitQError(
            f"{file}: expected the weights of a LoRA adapter ({error}); save it with peft again"
        ) from error
