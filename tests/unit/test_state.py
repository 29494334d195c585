"""Calibration on disk: what is read back is what was written, and nothing else is taken for it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from builders import no_split, random_site, rng

from splitq_edge.calibration import state as state_module
from splitq_edge.calibration.state import BlockRecord, CalibrationState
from splitq_edge.config import CorrectionConfig, QuantConfig, preset
from splitq_edge.errors import ArtifactError, SplitQError
from splitq_edge.modality import ModalityContext
from splitq_edge.modules.split_linear import SplitLinear

ACC = CorrectionConfig(0.2, 0.4)
KINDS: dict[str, tuple[QuantConfig, tuple[int, int, int], bool]] = {
    "all": (preset("W4A4"), (64, 8, 8), True),
    "main_alone": (no_split(), (64, 0, 0), False),
    "text_alone": (no_split(bits=2), (64, 8, 0), True),
    "vision_alone": (no_split(bits=8), (64, 0, 8), False),
    "groups": (dataclasses.replace(preset("W4A8"), group_size=32), (80, 8, 8), True),
    "asymmetric": (no_split(activation_bits=2, activation_symmetric=False), (64, 8, 8), False),
    "cws_alone": (no_split(correction=CorrectionConfig(0.3, 0)), (64, 8, 8), False),
    "mac_alone": (no_split(correction=CorrectionConfig(0, 0.3, bits=8, mac_rows="all")), (64, 0, 8), True),
    "identity_with_correction": (no_split(correction=ACC), (64, 8, 8), True),
}
HEADER = {"seed": 0, "recipe": {"bits": 4}}


def site_of(kind: str, *, channel_scale: bool, seed: int = 0) -> SplitLinear:
    config, widths, bias = KINDS[kind]
    site, _ = random_site(config, widths=widths, bias=bias, seed=seed)
    site.groups = {
        name: dataclasses.replace(g, clip=0.1 + 0.7 / (1 + i)) for i, (name, g) in enumerate(site.groups.items())
    }
    site.channel_scale = torch.rand(sum(widths), generator=rng(seed)) + 0.1 if channel_scale else None
    return site


def same(a: object, b: object) -> bool:
    """Equal to the last bit, tensors' kinds included."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and a == b


def started(folder: Path, blocks: int = 1) -> CalibrationState:
    state = CalibrationState(folder, HEADER)
    state.start(resume=False)
    for index in range(blocks):
        state.save(index, BlockRecord({"site": site_of("all", channel_scale=True)}, {"block": index}))
    return state


@pytest.mark.parametrize("channel_scale", [False, True], ids=["plain", "channel_scale"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_site_comes_back_bit_for_bit(kind: str, channel_scale: bool, tmp_path: Path) -> None:
    sites = {name: site_of(kind, channel_scale=channel_scale, seed=seed) for seed, name in enumerate(("a.b", "a.b.c"))}
    context = ModalityContext()
    state = CalibrationState(tmp_path / "state", HEADER)
    state.start(resume=False)
    report = {"block": 0, "relative_error": {"final": 0.1}, "sites": {"a.b": {"sqnr_db": [1.5, None]}}}
    state.save(0, BlockRecord(sites, report))
    record = state.load(0, context)
    assert record.report == report
    assert list(record.sites) == list(sites)
    for site_name, found in record.sites.items():
        site = sites[site_name]
        assert found.context is context
        for name in ("order", "bias", "channel_scale", "group_size", "activation_symmetric", "widths"):
            assert same(getattr(found, name), getattr(site, name)), name
        assert list(found.groups) == list(site.groups)
        for name, group in site.groups.items():
            for key, value in vars(group).items():
                assert same(getattr(found.groups[name], key), value), f"{name}.{key}"
        assert (found.correction is None) == (site.correction is None)
        for key, value in vars(site.correction).items() if site.correction else ():
            assert same(getattr(found.correction, key), value), key


def test_start_counts_blocks_up_to_the_first_gap(tmp_path: Path) -> None:
    state = started(tmp_path / "state", 3)
    assert state.finished() == 3
    (tmp_path / "state" / "block_0001.safetensors").unlink()
    assert CalibrationState(tmp_path / "state", HEADER).start(resume=True) == 1


def test_resume_without_a_state_begins_anew(tmp_path: Path) -> None:
    # A run may have been killed before it wrote anything; the same command must still do.
    assert CalibrationState(tmp_path / "state", HEADER).start(resume=True) == 0
    (tmp_path / "empty").mkdir()
    assert CalibrationState(tmp_path / "empty", HEADER).start(resume=True) == 0
    assert (tmp_path / "empty" / "calibration.json").is_file()


def test_state_of_an_earlier_run_is_not_overwritten(tmp_path: Path) -> None:
    started(tmp_path / "state", 2)
    with pytest.raises(SplitQError, match="earlier run left 2 finished blocks; go on with --resume, or delete"):
        CalibrationState(tmp_path / "state", HEADER).start(resume=False)


@pytest.mark.parametrize("header", [None, "{"], ids=["whole", "damaged"])
def test_run_that_failed_before_its_first_block_does_not_block_the_next(tmp_path: Path, header: str | None) -> None:
    folder = tmp_path / "state"
    started(folder, 0)
    (folder / "activations-0").mkdir()
    (folder / "notes.txt").write_text("mine")
    if header is not None:
        (folder / "calibration.json").write_text(header)
    other = CalibrationState(folder, {"seed": 1})
    assert other.start(resume=False) == 0
    assert json.loads((folder / "calibration.json").read_text())["seed"] == 1
    assert sorted(path.name for path in folder.iterdir()) == ["calibration.json", "notes.txt"]


@pytest.mark.parametrize("name", ["block_0001", "extra_vision"])
def test_a_state_with_anything_finished_is_kept(tmp_path: Path, name: str) -> None:
    started(tmp_path / "state", 0)
    (tmp_path / "state" / f"{name}.safetensors").write_bytes(b"finished")
    with pytest.raises(SplitQError, match="an earlier run left 0 finished blocks"):
        CalibrationState(tmp_path / "state", HEADER).start(resume=False)


def test_state_of_another_run_names_what_changed(tmp_path: Path) -> None:
    started(tmp_path / "state")
    other = {"seed": 1, "recipe": {"bits": 3}, "samples": 4}
    with pytest.raises(SplitQError, match="same run, recipe, samples, seed changed; use the options of the first run"):
        CalibrationState(tmp_path / "state", other).start(resume=True)


def test_settings_that_changed_are_named_with_both_values(tmp_path: Path) -> None:
    recipe = {"bits": 4, "lm_head": "W8A8"}
    started(tmp_path / "state")
    path = tmp_path / "state" / "calibration.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **HEADER, "recipe": recipe}))
    other = {**HEADER, "recipe": {**recipe, "lm_head": "W6A8"}}
    with pytest.raises(SplitQError, match=r"recipe changed; .* begin anew \(lm_head was 'W8A8', is 'W6A8'\)$"):
        CalibrationState(tmp_path / "state", other).start(resume=True)


def test_newer_schema_is_not_resumed(tmp_path: Path) -> None:
    started(tmp_path / "state")
    path = tmp_path / "state" / "calibration.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(SplitQError, match="schema changed"):
        CalibrationState(tmp_path / "state", HEADER).start(resume=True)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x00\x01"])
def test_damaged_header_is_said_in_one_line(content: str, tmp_path: Path) -> None:
    started(tmp_path / "state")
    (tmp_path / "state" / "calibration.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"calibration\.json: expected a calibration state .* delete the folder"):
        CalibrationState(tmp_path / "state", HEADER).start(resume=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected schema 3, got None; calibrate with this version"),
        ({"schema": 4, "recipe": {}, "weights": "0"}, "expected schema 3, got 4"),
        ({"schema": 3, "weights": "0"}, "expected a calibration state, recipe is missing"),
        ({"schema": 3, "recipe": {}}, "expected a calibration state, weights is missing"),
    ],
)
def test_recorded_state_that_does_not_say_what_it_is_of_is_refused(
    content: dict[str, object], message: str, tmp_path: Path
) -> None:
    (tmp_path / "calibration.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=message):
        CalibrationState.recorded(tmp_path)


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"not ours")
    with pytest.raises(SplitQError, match="expected an empty or new folder, it has other files; choose another"):
        CalibrationState(tmp_path, HEADER).start(resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


@pytest.mark.parametrize("damage", ["cut", "empty", "head", "flipped_bit", "no_metadata", "lost_tensor"])
def test_damaged_block_is_said_in_one_line(damage: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = started(tmp_path / "state")
    path = tmp_path / "state" / "block_0000.safetensors"
    content = path.read_bytes()
    if damage == "no_metadata":
        save_file(load_file(path), path)
    elif damage == "lost_tensor":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        del tensors["site/main.qweight"]
        save_file(tensors, path, metadata)
    else:
        path.write_bytes(
            {
                "cut": content[:-7],
                "empty": b"",
                "head": b"\xff" * 16 + content[16:],
                "flipped_bit": content[:-1] + bytes([content[-1] ^ 1]),
            }[damage]
        )
    with pytest.raises(ArtifactError, match=r"block_0000\.safetensors: expected finished sites .*--resume") as raised:
        state.load(0, ModalityContext())
    assert "\n" not in str(raised.value)


def test_missing_block_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"block_0003\.safetensors: expected finished sites"):
        started(tmp_path / "state").load(3, ModalityContext())


def killed_while_writing(state: CalibrationState, monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """What SIGKILL leaves: the temporary file is there, nobody renamed or deleted it."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(SystemExit))
        patch.setattr(os, "unlink", lambda *_: None)
        with pytest.raises(SystemExit):
            state.save(index, BlockRecord({"site": site_of("all", channel_scale=False)}, {}))


def test_times_of_all_runs_are_summed_by_device_and_go_with_the_state(tmp_path: Path) -> None:
    state = CalibrationState(tmp_path / "state", HEADER)
    state.start(resume=False)
    assert state.times() == {}
    for device, seconds in (("cuda", 1.04), ("cpu", 3.0), ("cuda", 0.5)):
        state.add_time(device, seconds)
    again = CalibrationState(tmp_path / "state", HEADER)
    assert again.times() == {"cuda": 1.5, "cpu": 3.0}  # to a tenth
    again.remove()
    assert not again.folder.exists()


def test_leftovers_of_a_killed_writer_do_not_disturb_and_go_with_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "state"
    state = started(folder)
    killed_while_writing(state, monkeypatch, 1)
    assert len(list(folder.iterdir())) == 3
    again = CalibrationState(folder, HEADER)
    assert again.start(resume=True) == 1
    again.save(1, BlockRecord({"site": site_of("all", channel_scale=False)}, {}))
    assert again.finished() == 2
    again.remove()
    assert not folder.exists()


def test_run_killed_while_writing_the_header_can_begin_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "state"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(SystemExit))
        patch.setattr(os, "unlink", lambda *_: None)
        with pytest.raises(SystemExit):
            CalibrationState(folder, HEADER).start(resume=False)
    assert [path.name.startswith(".calibration.json.") for path in folder.iterdir()] == [True]
    assert CalibrationState(folder, HEADER).start(resume=False) == 0


def test_removal_keeps_what_it_did_not_write(tmp_path: Path) -> None:
    state = started(tmp_path / "state", 2)
    (tmp_path / "state" / "notes.txt").write_text("mine")
    state.remove()
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["notes.txt"]
    CalibrationState(tmp_path / "never", HEADER).remove()


def test_all_tensors_of_a_correction_are_listed() -> None:
    tensors = {f.name for f in dataclasses.fields(state_module.Correction) if f.type == "torch.Tensor"}
    assert tensors == set(state_module.CORRECTION_TENSORS)
