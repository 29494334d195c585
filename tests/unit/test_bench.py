"""`splitq-edge bench` on a small export: what it counts, prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import IMAGE_TOKENS, chat_batches, tiny_loaded
from click.testing import CliRunner, Result

from splitq_edge.cli import main
from splitq_edge.exporters.export_folder import ExportRequest, write_export

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("exported")
    write_export(tiny_loaded(), None, ExportRequest("portable", chat_batches(1)[0], None, 0), place)
    return place


def bench(folder: Path, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", str(folder), "--rounds", "1", *map(str, arguments)])


@pytest.mark.parametrize("images", [0, 2])
def test_result_counts_the_tokens_and_times_each_part(folder: Path, tmp_path: Path, images: int) -> None:
    target = tmp_path / "bench.json"
    shown = bench(folder, "--images", images, "--prompt-tokens", 64, "--new-tokens", 3, "--json", target)
    assert shown.exit_code == 0, shown.output
    result = json.loads(target.read_text(encoding="utf-8"))
    assert result["prompt_tokens"] == 64 > 2 * IMAGE_TOKENS
    assert result["prefill_tps"] == pytest.approx(64 / result["first_token_s"], rel=0.2)
    assert all(result[name] > 0 for name in ("load_s", "first_token_s", "decode_tps", "peak_rss_mb"))
    used = ("vision_encoder", "embed_tokens", "decoder") if images else ("embed_tokens", "decoder")
    files = sum(path.stat().st_size for part in used for path in folder.glob(f"{part}.onnx*"))
    assert result["file_mb"] == pytest.approx(files / 2**20, abs=0.06)
    assert result["cache_mb"] == pytest.approx(2 * 2 * 3 * 16 * 4 * 67 / 2**20, abs=0.06)
    assert (f"{images} images" in shown.output) == (images > 0)
    assert f"behind {result['prompt_tokens']} tokens" in shown.output


def test_more_tokens_than_positions_are_an_error(folder: Path) -> None:
    shown = bench(folder, "--images", 0, "--prompt-tokens", 300)
    assert shown.exit_code == 2
    assert "expected at most 256 tokens" in shown.stderr
