"""Calibration on disk: one file a finished block, so that an interrupted run goes on where it stopped.

Sites outside the language blocks ("vision", "lm_head") have a file for each of these names.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from splitq_edge.artifacts import write_bytes, write_json
from splitq_edge.errors import ArtifactError, SplitQError
from splitq_edge.modality import ModalityContext
from splitq_edge.modules.split_linear import Correction, GroupWeights, SplitLinear

STATE_SCHEMA = 3
HEADER_FILE = "calibration.json"
TIMES_FILE = "times.json"
CORRECTION_TENSORS = ("u", "u_scale", "v", "v_scale", "gate_cws", "gate_mac")


@dataclass(frozen=True)
class BlockRecord:
    """What one finished block leaves behind.

    Attributes:
        sites: quantized sites by name.
        report: JSON content: learning errors and per-site quality, see `report.site_quality`.
    """

    sites: dict[str, SplitLinear]
    report: dict[str, Any]


class CalibrationState:
    """A folder with `calibration.json` and one safetensors file a block.

    Args:
        folder: where.
        header: what the run depends on (recipe, seed, samples, checkpoint); a resumed run must have the same.

    Raises:
        SplitQError: the folder holds other files, or another run's state.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.folder = folder
        self.header = {"schema": STATE_SCHEMA, **header}

    @classmethod
    def recorded(cls, folder: Path) -> CalibrationState:
        """The state that is in a folder.

        Raises:
            SplitQError: there is none.
            ArtifactError: it cannot be read, is of another schema, or does not say what it is of.
        """
        path = folder / HEADER_FILE
        if not path.is_file():
            raise SplitQError(
                f"calibration state {folder}: expected {HEADER_FILE}, found none; export --keep-state leaves one"
            )
        header = cls._read(path)
        if header.get("schema") != STATE_SCHEMA:
            raise ArtifactError(
                f"{path}: expected schema {STATE_SCHEMA}, got {header.get('schema')!r}; calibrate with this version"
            )
        for key in ("recipe", "weights"):
            if key not in header:
                raise ArtifactError(f"{path}: expected a calibration state, {key} is missing; calibrate again")
        return cls(folder, header)

    def start(self, *, resume: bool) -> int:
        """Prepare the folder; returns how many blocks it already holds.

        Raises:
            SplitQError: there is a state with finished sites and `resume` is False, or it belongs to another run.
        """
        path = self.folder / HEADER_FILE
        if path.is_file() and not resume and not self._holds_records():
            self.remove()  # of a run that failed before its first block: there is nothing to go on with
            write_json(path, self.header)
            return 0
        if not path.is_file():
            if self.folder.exists() and set(self.folder.iterdir()) - set(self._leftovers()):
                raise SplitQError(
                    f"calibration state {self.folder}: expected an empty or new folder, it has other files; "
                    "choose another with --state"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, self.header)
            return 0
        found = self._read(path)
        if not resume:
            raise SplitQError(
                f"calibration state {self.folder}: an earlier run left {self.finished()} finished blocks; go on with "
                "--resume, or delete the folder to begin anew"
            )
        recipe = found.get("recipe")
        if isinstance(recipe, dict) and "kv_cache_bits" in recipe:
            recipe["kv_cache_bits"] = 0  # older versions counted the cache, too, on which no integer depends
        wanted = json.loads(json.dumps(self.header))
        changed = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        if changed:
            raise SplitQError(
                f"calibration state {self.folder}: expected the same run, {', '.join(changed)} changed; use the "
                f"options of the first run, or delete the folder to begin anew{_recipe_changes(recipe, wanted)}"
            )
        return self.finished()

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ArtifactError(f"{path}: expected a calibration state ({error}); delete the folder") from error

    def times(self) -> dict[str, float]:
        """Seconds that all runs together have calibrated, by the kind of device ("cpu", "cuda")."""
        path = self.folder / TIMES_FILE
        return {str(device): float(seconds) for device, seconds in self._read(path).items()} if path.is_file() else {}

    def add_time(self, device: str, seconds: float) -> None:
        """Count a run's seconds."""
        known = self.times()
        write_json(self.folder / TIMES_FILE, {**known, device: round(known.get(device, 0.0) + seconds, 1)})

    def finished(self) -> int:
        """Blocks finished without a gap."""
        count = 0
        while self._path(count).is_file():
            count += 1
        return count

    def _holds_records(self) -> bool:
        """Whether anything is finished, blocks behind a gap included."""
        return any(True for kind in ("block", "extra") for _ in self.folder.glob(f"{kind}_*.safetensors"))

    def finished_extras(self) -> tuple[str, ...]:
        """Names of the records that `save_extra` wrote."""
        return tuple(sorted(path.stem.removeprefix("extra_") for path in self.folder.glob("extra_*.safetensors")))

    def save(self, index: int, record: BlockRecord) -> None:
        """Write a finished block; a reader never sees half of it."""
        self._save(self._path(index), record)

    def save_extra(self, name: str, record: BlockRecord) -> None:
        """Write the sites of a part outside the language blocks, likewise."""
        self._save(self._extra_path(name), record)

    def _save(self, path: Path, record: BlockRecord) -> None:
        tensors: dict[str, torch.Tensor] = {}
        sites = {}
        for name, site in record.sites.items():
            sites[name], parts = _pack_site(site)
            tensors |= {f"{name}/{key}": value.detach().cpu().contiguous() for key, value in parts.items()}
        # One entry: safetensors writes several in any order, and equal runs should leave equal bytes.
        content = {"sites": sites, "report": record.report, "sha256": _digest(tensors)}
        metadata = {"record": json.dumps(content)}
        write_bytes(path, save(tensors, metadata))

    def load(self, index: int, context: ModalityContext, device: torch.device | None = None) -> BlockRecord:
        """A finished block.

        Raises:
            ArtifactError: the file is damaged.
        """
        return self._load(self._path(index), context, device)

    def load_extra(self, name: str, context: ModalityContext) -> BlockRecord:
        """What `save_extra` wrote.

        Raises:
            ArtifactError: the file is damaged.
        """
        return self._load(self._extra_path(name), context)

    def _load(self, path: Path, context: ModalityContext, device: torch.device | None = None) -> BlockRecord:
        try:
            with safe_open(path, "pt", device=str(device or "cpu")) as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            described = json.loads(metadata["record"])
            if described["sha256"] != _digest(tensors):
                raise ValueError("its tensors are not those that were written")
            sites = {name: _unpack_site(name, values, tensors, context) for name, values in described["sites"].items()}
            return BlockRecord(sites, described["report"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ArtifactError(f"{path}: expected finished sites ({error}); delete it and --resume") from error

    def _path(self, index: int) -> Path:
        return self.folder / f"block_{index:04d}.safetensors"

    def _extra_path(self, name: str) -> Path:
        return self.folder / f"extra_{name}.safetensors"

    def _leftovers(self) -> list[Path]:
        """Temporary files of writers that were killed."""
        return [
            path for name in ("block_*", "extra_*", HEADER_FILE, TIMES_FILE) for path in self.folder.glob(f".{name}.*")
        ]

    def scratch(self, rank: int) -> Path:
        """Folder for one process's hidden states beyond the memory limit; not part of the state."""
        return self.folder / f"activations-{rank}"

    def remove(self) -> None:
        """Delete what belongs to the state; other files stay."""
        for folder in self.folder.glob("activations-*"):
            shutil.rmtree(folder, ignore_errors=True)
        written = [path for kind in ("block", "extra") for path in self.folder.glob(f"{kind}_*.safetensors")]
        for path in [*written, *self._leftovers(), self.folder / TIMES_FILE, self.folder / HEADER_FILE]:
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            os.rmdir(self.folder)


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """Hex digest of all tensors, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _recipe_changes(recipe: Any, header: dict[str, Any]) -> str:
    """Which settings of the recipe differ, for the end of a message; '' if none or if there is none to compare."""
    wanted = header.get("recipe")
    if not isinstance(recipe, dict) or not isinstance(wanted, dict):
        return ""
    names = sorted(name for name in {*recipe, *wanted} if recipe.get(name) != wanted.get(name))
    changes = [f"{name} was {recipe.get(name)!r}, is {wanted.get(name)!r}" for name in names]
    return f" ({'; '.join(changes)})" if changes else ""


def _pack_site(site: SplitLinear) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {"order": site.order}
    for key in ("bias", "channel_scale"):
        if getattr(site, key) is not None:
            tensors[key] = getattr(site, key)
    groups = {}
    for name, group in site.groups.items():
        values = vars(group)
        tensors |= {f"{name}.{key}": v for key, v in values.items() if isinstance(v, torch.Tensor)}
        groups[name] = {key: v for key, v in values.items() if not isinstance(v, torch.Tensor | None)}
    correction = None
    if site.correction is not None:
        tensors |= {f"correction.{key}": getattr(site.correction, key) for key in CORRECTION_TENSORS}
        correction = {k: v for k, v in vars(site.correction).items() if k not in CORRECTION_TENSORS}
    described = {
        "groups": groups,
        "correction": correction,
        "group_size": site.group_size,
        "activation_symmetric": site.activation_symmetric,
    }
    return described, tensors


def _unpack_site(
    name: str, described: dict[str, Any], tensors: dict[str, torch.Tensor], context: ModalityContext
) -> SplitLinear:
    own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
    groups = {
        group: GroupWeights(
            qweight=own[f"{group}.qweight"],
            scale=own[f"{group}.scale"],
            p1=own.get(f"{group}.p1"),
            p2=own.get(f"{group}.p2"),
            **values,
        )
        for group, values in described["groups"].items()
    }
    correction = None
    if described["correction"] is not None:
        parts: dict[str, Any] = {key: own[f"correction.{key}"] for key in CORRECTION_TENSORS}
        correction = Correction(**parts, **described["correction"])
    return SplitLinear(
        name,
        order=own["order"],
        groups=groups,
        context=context,
        correction=correction,
        bias=own.get("bias"),
        channel_scale=own.get("channel_scale"),
        group_size=described["group_size"],
        activation_symmetric=described["activation_symmetric"],
    )
