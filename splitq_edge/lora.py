"""LoRA adapters as peft saves them, merged into weights: W + scale * B A (Hu et al. 2021, eq. 3)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from splitq_edge.damage import weights_damage
from splitq_edge.errors import SplitQError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings under which the factors mean more than a product to add, with the value that says they do not.
PLAIN = {
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "use_qalora": False,
    "use_bdlora": False,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}
# Starts of the factors that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, ...) take a part out of
# it: their factors belong to a base that is in no file.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
T = TypeVar("T")
FACTORS = (".lora_A.weight", ".lora_B.weight")


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
        _check_plain(folder / CONFIG_FILE, self._config)
        self._alpha = _number(folder / CONFIG_FILE, "lora_alpha", self._config.get("lora_alpha", 1))
        self._alphas = _pattern(folder / CONFIG_FILE, self._config, "alpha_pattern")
        self._rank = _rank(folder / CONFIG_FILE, self._config)
        self._ranks = _pattern(folder / CONFIG_FILE, self._config, "rank_pattern")
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._modules: dict[str, str] = {}  # weight's name -> module as the adapter names it
        self._whole: dict[str, torch.Tensor] = {}
        tensors = _read(self._file)
        if not tensors:
            raise SplitQError(
                f"{self._file}: expected the factors of an adapter, got no tensor; save it with peft again"
            )
        for key in sorted(tensors):
            module, kind = key.removeprefix(PREFIX), ""
            for found in FACTORS:
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
                self._check_rank(key, module, tensors[key].shape[0])
            elif kind and key.replace(".lora_B.", ".lora_A.") not in tensors:
                raise SplitQError(
                    f"{self._file}: expected lora_A beside {key} {list(tensors[key].shape)}, got none; "
                    "save the adapter again"
                )
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

    def _check_rank(self, key: str, module: str, found: int) -> None:
        """The scale is alpha by rank: factors of another rank than the settings say are another run's."""
        rank = _chosen(self._ranks, module, self._rank)
        if rank is not None and rank != found:
            raise SplitQError(
                f"{self._file}: expected {key} of rank {rank:g}, as {CONFIG_FILE} says (r, rank_pattern), got {found}; "
                "give the settings that were saved with these factors"
            )

    def _scale(self, module: str, rank: int) -> float:
        """Of a module's product; peft lets a pattern at the end of its name choose alpha."""
        alpha = _chosen(self._alphas, module, self._alpha)
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _check(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Every changed weight must be the model's, of the same shape, and used once; those trained whole are there."""
        for module in self._config.get("modules_to_save") or ():
            there = [name for name in weights if name.rpartition(".")[0].endswith(str(module))]
            if there and not any(name in self._whole for name in there):
                raise SplitQError(
                    f"{self._file}: expected {there[0]}, which {CONFIG_FILE} says was trained whole (modules_to_save), "
                    "got none; save the adapter again"
                )
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


def _check_plain(path: Path, config: dict[str, Any]) -> None:
    """See that the adapter means `base + scale * B A`.

    Raises:
        SplitQError: a setting says that it means something else.
    """
    for setting, plain in PLAIN.items():
        got = config.get(setting)
        if got != plain and got not in (None, [], {}, False):
            raise SplitQError(
                f"{path}: expected {setting} {plain}, got {got}; "
                "merge the adapter with peft (merge_and_unload, save_pretrained) and give the merged model"
            )
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise SplitQError(
            f"{path}: expected factors that started beside the base as it is, got init_lora_weights {start}, which "
            "changes the base too; merge the adapter with peft (merge_and_unload, save_pretrained) and give the merged "
            "model, or save it with path_initial_model_for_weight_conversion"
        )


def _number(path: Path, setting: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SplitQError(f"{path}: expected a number as {setting}, got {value!r}; mend the settings")
    return float(value)


def _rank(path: Path, config: dict[str, Any]) -> float | None:
    """Of modules that no pattern names; None: the settings do not say."""
    return None if config.get("r") is None else _number(path, "r", config["r"])


def _pattern(path: Path, config: dict[str, Any], setting: str) -> dict[re.Pattern[str], float]:
    """A setting that gives modules, chosen by the end of their names, numbers of their own.

    Raises:
        SplitQError: it is no mapping, or a key is no regular expression, or a value no number.
    """
    given = config.get(setting) or {}
    if not isinstance(given, dict):
        raise SplitQError(f"{path}: expected {setting} from module names to numbers, got {given!r}; mend the settings")
    found = {}
    for pattern, value in given.items():
        try:
            compiled = re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise SplitQError(
                f"{path}: expected a regular expression in {setting}, got {pattern!r} ({error}); mend the settings"
            ) from error
        found[compiled] = _number(path, f"{setting} of {pattern!r}", value)
    return found


def _chosen(patterns: dict[re.Pattern[str], float], module: str, default: T) -> float | T:
    """The number of the first pattern that names the module."""
    return next((value for pattern, value in patterns.items() if pattern.match(module)), default)


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
        raise SplitQError(f"{file}: {weights_damage(file, error)}") from error
