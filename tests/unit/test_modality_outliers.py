"""Where the modalities have their largest channels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import lora_adapter, write_chats, write_checkpoint
from click.testing import CliRunner

from splitq_edge.calibration.observer import SiteStats
from splitq_edge.cli import main
from splitq_edge.report.modality_outliers import SiteOutliers, as_json, describe, medians, plot

MODEL = "models/easyvqa-tiny-stressed"


def stats(text: dict[int, float], vision: dict[int, float], channels: int = 100) -> SiteStats:
    absmax = []
    for planted in (text, vision):
        values = torch.ones(channels)
        for channel, value in planted.items():
            values[channel] = value
        absmax.append(values)
    none = torch.zeros(0, channels)
    return SiteStats("site", absmax[1], absmax[0], none, none, 1, 1)


def test_planted_channels_are_compared() -> None:
    one = describe(0, "site", stats({3: 9.0, 7: 5.0}, {7: 4.0, 50: 21.0}), share=0.02)
    assert (one.text_peak, one.vision_peak) == (9.0, 21.0)
    assert one.overlap == pytest.approx(1 / 3)
    assert one.borrowed == pytest.approx(4 / 12)  # above the median: 8 and 4; the image's set holds the second


def test_equal_sets_overlap_wholly() -> None:
    one = describe(0, "site", stats({3: 9.0, 7: 5.0}, {7: 4.0, 3: 8.0}), share=0.02)
    assert (one.overlap, one.borrowed) == (1.0, 1.0)


def test_flat_channels_have_nothing_to_borrow() -> None:
    assert describe(0, "site", stats({}, {}), share=0.02).borrowed == 1.0


def sites() -> list[SiteOutliers]:
    return [
        describe(block, site, stats({3: 2.0 + block}, {5: 3.0}), share=0.01)
        for block in range(5)
        for site in ("a", "b")
    ]


def test_medians_are_over_blocks() -> None:
    assert medians(sites())["a"]["text_peak"] == 4.0
    assert json.loads(json.dumps(as_json(sites(), 0.01)))["medians"]["b"]["overlap"] == 0.0


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_plot_is_a_picture(blocks: int, tmp_path: Path) -> None:
    plot([one for one in sites() if one.block < blocks], 0.01, "model", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_command_finds_the_planted_channels(tmp_path: Path) -> None:
    """The stressed model has its text and image outliers in different channels by construction."""
    found = tmp_path / "found.json"
    result = CliRunner().invoke(main, ["outliers", MODEL, "--calib-samples", "4", "--json", str(found)])
    assert result.exit_code == 0, result.output
    content = json.loads(found.read_text())
    assert content["medians"]["attn_in"]["overlap"] < 0.1
    assert "attn_in" in result.output


def test_command_refuses_a_picture_of_unknown_form(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["outliers", MODEL, "--plot", str(tmp_path / "plot.xyz")])
    assert result.exit_code != 0
    assert "expected a name that ends in" in result.output
    assert len(result.output.splitlines()) == 1


def test_an_adapter_moves_the_channels(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base")
    adapter = lora_adapter(tmp_path / "adapter", base=str(base))
    chats = ["--calib", str(write_chats(tmp_path / "chats")), "--calib-samples", "2"]
    found = {}
    for name, asked in (
        ("base", [str(base)]),
        ("joined", [str(base), "--adapter", str(adapter)]),
        ("alone", [str(adapter)]),
    ):
        file = tmp_path / f"{name}.json"
        result = CliRunner().invoke(main, ["outliers", *asked, *chats, "--json", str(file)])
        assert result.exit_code == 0, result.output
        found[name] = json.loads(file.read_text())
    assert found["joined"] == found["alone"] != found["base"]
