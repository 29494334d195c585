"""quality.json: what calibration found out about every site, and how `inspect` shows it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CLOSED_FORM, calibrated, chat_batches, tiny_loaded
from click.testing import CliRunner

from splitq_edge.calibration.observer import SiteStats
from splitq_edge.cli import main
from splitq_edge.config import preset
from splitq_edge.convert import effective_bits
from splitq_edge.errors import ArtifactError, SplitQError
from splitq_edge.quant.metrics import MAX_DB, sqnr_db
from splitq_edge.report.quality_report import REPORT_FILE, STAGES, build_report, read_report
from splitq_edge.report.site_quality import channel_report
from splitq_edge.splitting.plan import SplitPlan


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # On text rows MAC leaves the others alone; gptq's integers are made for the inputs that the report takes.
    config = replace(preset("W3A3"), rounding="gptq", learning=CLOSED_FORM)
    config = replace(config, correction=replace(config.correction, mac_rows="text"))
    quantized = calibrated(tiny_loaded(), config, chat_batches(), tmp_path_factory.mktemp("calibration"))
    return build_report(config.to_dict(), effective_bits(quantized.sites), quantized.reports, {})


@pytest.fixture
def folder(content: dict[str, Any], tmp_path: Path) -> Path:
    (tmp_path / REPORT_FILE).write_text(json.dumps(content))
    return tmp_path


def test_report_names_every_stage_of_every_site_for_both_modalities(content: dict[str, Any]) -> None:
    assert [block["block"] for block in content["blocks"]] == [0, 1]
    for block in content["blocks"]:
        assert list(block["relative_error"]) == ["final"]  # nothing was learned
        assert len(block["sites"]) == 4
        for site in block["sites"].values():
            assert tuple(site["sqnr_db"]) == STAGES
            for values in site["sqnr_db"].values():
                assert len(values) == 2
                assert all(0 < value < 60 for value in values)
            channels = site["channels"]
            assert len(channels["text"]) == len(channels["vision"]) == 16
            assert not set(channels["text"]) & set(channels["vision"])
    assert content["recipe"]["scheme"] == "W3A3"


def test_mac_helps_text_rows_and_leaves_vision_rows_alone(content: dict[str, Any]) -> None:
    gains = []
    for block in content["blocks"]:
        for site in block["sites"].values():
            stages = site["sqnr_db"]
            assert stages["mac"][1] == stages["cws"][1]
            gains.append(stages["mac"][0] - stages["cws"][0])
    assert sum(gains) > 0


def test_integers_are_as_good_as_the_trained_site(content: dict[str, Any]) -> None:
    for block in content["blocks"]:
        for site in block["sites"].values():
            for learned, integers in zip(site["sqnr_db"]["mac"], site["sqnr_db"]["final"], strict=True):
                assert integers > learned - 0.3  # GPTQ may be better than the nearest rounding of training


def test_signal_to_noise_by_hand() -> None:
    assert sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(20.0)  # 25 / 0.25
    assert sqnr_db(torch.ones(3), torch.ones(3)) == MAX_DB
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -MAX_DB


def stats_of(text: list[float], vision: list[float], vision_tokens: int = 5) -> SiteStats:
    none = torch.zeros(0, len(text))
    return SiteStats("site", torch.tensor(vision), torch.tensor(text), none, none, vision_tokens, 5)


def plan_of(channels: int, text: list[int], vision: list[int]) -> SplitPlan:
    main = [c for c in range(channels) if c not in (*text, *vision)]
    return SplitPlan(*(torch.tensor(part, dtype=torch.long) for part in (main, text, vision)))


def test_channel_report_by_hand() -> None:
    stats = stats_of([8.0, 1.0, 2.0, 4.0, 5.0], [1.0, 30.0, 2.0, 4.0, 3.0])
    report = channel_report(plan_of(5, [0, 4], [1, 3]), stats)
    assert report["absmax_share"] == [0.65, 0.85]  # (8 + 5) / 20, (30 + 4) / 40
    assert report["absmax_over_median"] == [2.0, 10.0]  # 8 / 4, 30 / 3
    assert report["jaccard"] == 0.0  # the top two: {0, 4} and {1, 3}
    agreeing = stats_of([8.0, 1.0, 2.0, 4.0, 5.0], [9.0, 3.0, 2.0, 4.0, 3.0])
    assert channel_report(plan_of(5, [0, 4], [1, 3]), agreeing)["jaccard"] == pytest.approx(1 / 3, abs=1e-4)


def test_one_modality_has_no_overlap_to_report() -> None:
    stats = stats_of([8.0, 1.0, 2.0], [0.0, 0.0, 0.0], vision_tokens=0)
    report = channel_report(plan_of(3, [], []), stats)
    assert report["jaccard"] is None
    assert report["absmax_share"] == [0.0, 0.0]


def inspect(folder: Path) -> str:
    result = CliRunner().invoke(main, ["inspect", str(folder)])
    assert result.exit_code == 0, result.output
    return result.output


def test_inspect_shows_sites_stages_channels_and_blocks(folder: Path, content: dict[str, Any]) -> None:
    output = inspect(folder)
    assert f"method splitq, scheme W3A3, {content['effective_bits']:.2f} effective bits a weight" in output
    lines = output.splitlines()
    header = next(line for line in lines if "rtn" in line)
    assert header.split() == ["site", "rtn", "+split", "+transform", "+cws", "+mac", "final"]
    for block in content["blocks"]:
        for name, site in block["sites"].items():
            first, second = (line.split() for line in lines if line.split()[:1] == [name])
            text, vision = site["sqnr_db"]["final"]
            assert first[-3:] == [f"{text:.1f}", "/", f"{vision:.1f}"]
            assert second[1:3] == ["16", "16"]
        error = block["relative_error"]["final"]
        assert [str(block["block"]), "-", "-", f"{error:.5f}"] in [line.split() for line in lines]


def test_inspect_writes_a_dash_for_what_was_not_measured(folder: Path, content: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(content))
    site = next(iter(changed["blocks"][0]["sites"].values()))
    site["sqnr_db"] = {stage: [1.0, None] for stage in STAGES}
    site["channels"]["jaccard"] = None
    (folder / REPORT_FILE).write_text(json.dumps(changed))
    assert "1.0 / -" in inspect(folder)


def test_inspect_needs_no_torch(folder: Path) -> None:
    import subprocess
    import sys

    code = (
        f"import sys; sys.modules['torch'] = None\nfrom splitq_edge.cli import main\nmain(['inspect', {str(folder)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "effective bits" in done.stdout


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("{", "expected a quality report"),
        ("[]", "expected a quality report"),
        ('{"schema": 1, "blocks": [{}]}', "expected a quality report"),
        ('{"schema": 1, "blocks": []}', "expected a quality report"),
        ('{"schema": 1, "recipe": [], "effective_bits": 4, "blocks": []}', "expected a quality report"),
        ('{"schema": 99, "blocks": []}', "expected schema 1 or older, got 99; upgrade"),
        ('{"schema": "1", "blocks": []}', "expected schema 1 or older, got '1'"),
    ],
)
def test_damaged_or_newer_report_is_said_in_one_line(damage: str, message: str, tmp_path: Path) -> None:
    (tmp_path / REPORT_FILE).write_text(damage)
    with pytest.raises(ArtifactError, match=message) as raised:
        read_report(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("lost", ["recipe", "effective_bits", "blocks", "sites", "sqnr_db", "cws", "jaccard"])
def test_report_that_lacks_a_field_is_said_in_one_line(lost: str, folder: Path, content: dict[str, Any]) -> None:
    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(inner) for key, inner in value.items() if key != lost}
        return [without(inner) for inner in value] if isinstance(value, list) else value

    (folder / REPORT_FILE).write_text(json.dumps(without(content)))
    result = CliRunner().invoke(main, ["inspect", str(folder)])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert f"expected a quality report (KeyError('{lost}')); export the model again" in result.stderr


def test_folder_without_report_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        SplitQError, match="expected the report of a quantized export, found none; export with a scheme"
    ):
        read_report(tmp_path)
    with pytest.raises(SplitQError, match="expected a folder, found none"):
        read_report(tmp_path / "missing")
