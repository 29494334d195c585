"""The portable flavour in ONNX Runtime's own format for small builds: same outputs, without the native library."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from builders import no_split, random_site, site_model

from splitq_edge.config import CorrectionConfig

FEEDS = {
    "x": np.random.default_rng(0).standard_normal((2, 3, 96)).astype(np.float32),
    "modality": np.array([[0, 0, 1], [1, 0, 1]], np.int8),
}


def outputs(path: Path) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: FEEDS[value.name] for value in session.get_inputs()})[0]


@pytest.mark.slow
def test_a_converted_site_gives_the_same_numbers(tmp_path: Path) -> None:
    branches = CorrectionConfig(cws_ratio=0.1, mac_ratio=0.1)
    site, _ = random_site(replace(no_split(), correction=branches), widths=(64, 16, 16), bias=True)
    onnx.save(site_model(site, packed=False), tmp_path / "site.onnx")
    convert = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(tmp_path)]
    style = ["--optimization_style", "Fixed"]
    done = subprocess.run([*convert, *style], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert np.abs(outputs(tmp_path / "site.ort") - outputs(tmp_path / "site.onnx")).max() < 1e-5
