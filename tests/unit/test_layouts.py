"""Layouts by name, what they refuse before long work, and the metadata that names linears."""

from __future__ import annotations

import platform
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders import CLOSED_FORM, calibrated, chat_batches, tiny_loaded
from torch import nn

from splitq_edge.adapters.registry import ADAPTERS, adapter_for
from splitq_edge.cli import LAYOUT_NAMES
from splitq_edge.commands.run import RunOptions, _by_genai
from splitq_edge.config import preset
from splitq_edge.errors import SplitQError
from splitq_edge.exporters.layouts.registry import LAYOUTS, default_layout, layout_named
from splitq_edge.exporters.quantization_config import quantization_config
from splitq_edge.runtime_ops import genai
from splitq_edge.runtime_ops.generate import answer_pieces


def test_command_line_offers_every_layout_and_no_other() -> None:
    assert tuple(LAYOUTS) == LAYOUT_NAMES
    assert all(name == layout.name for name, layout in LAYOUTS.items())


def test_the_default_is_genai_for_the_types_that_it_knows_itself() -> None:
    llava = adapter_for("llava")
    assert default_layout(llava, None) == "flat"  # runs under a borrowed type, which must be asked for
    known = replace(llava, model_type="gemma3")
    assert default_layout(known, preset("W4A8")) == "genai"
    assert default_layout(known, replace(preset("W4A8"), kv_cache_bits=16)) == "genai"
    assert default_layout(known, replace(preset("W4A8"), kv_cache_bits=8)) == "flat"


CACHED = replace(preset("W4A8"), kv_cache_bits=8)


@pytest.mark.parametrize(
    ("layout", "model_type", "changes", "problem"),
    [
        ("genai", "llama", {}, "expected a model type that onnxruntime-genai can run, got 'llama'; use --layout flat"),
        ("genai", "llava", {"config": CACHED}, "expected a cache of float32 or float16 .* got int8; change it"),
        ("onnx-community", "llama", {}, "transformers.js prepares pictures for .* got 'llama'; use --layout flat"),
        ("onnx-community", "llava", {"config": CACHED}, "expected a cache of float32 .* got int8"),
        ("onnx-community", "llava", {"flavour": "packed"}, "expected --flavour portable, .* got packed"),
        ("onnx-community", "llava", {"attention": "fused"}, "expected --attention standard, .* got fused"),
    ],
)
def test_a_layout_refuses_what_its_readers_cannot_run(
    layout: str, model_type: str, changes: dict[str, object], problem: str
) -> None:
    chosen = layout_named(layout)
    options: dict[str, object] = {"flavour": "portable", "attention": chosen.attention, **changes}
    config = options.pop("config", preset("W4A8"))
    with pytest.raises(SplitQError, match=f"--layout {layout}: .*{problem}"):
        chosen.check(adapter_for(model_type), config, **options)  # type: ignore[arg-type]
    chosen.check(adapter_for("llava"), preset("W4A8"), flavour="portable", attention=chosen.attention)


def test_the_flat_layout_takes_everything() -> None:
    for adapter in ADAPTERS.values():
        layout_named("flat").check(adapter, CACHED, flavour="packed", attention="fused")


def matches(pattern: str, path: str) -> bool:
    """As compressed-tensors reads a target."""
    return (
        re.match(pattern.removeprefix("re:") + "$", path) is not None if pattern.startswith("re:") else pattern == path
    )


def test_every_linear_is_a_target_of_one_group_or_ignored(tmp_path: Path) -> None:
    config = replace(preset("W4A4"), learning=CLOSED_FORM, vision="W8A8", lm_head="W4A8", group_size=32)
    loaded = tiny_loaded()
    linears = [path for path, module in loaded.model.named_modules() if isinstance(module, nn.Linear)]
    found = quantization_config(calibrated(loaded, config, chat_batches(2), tmp_path))
    groups = found["config_groups"]
    assert {name: group["weights"]["num_bits"] for name, group in groups.items()} == {
        "language": 4,
        "vision": 8,
        "lm_head": 4,
    }
    assert groups["language"]["weights"] | {"strategy": "group", "group_size": 32} == groups["language"]["weights"]
    assert groups["vision"]["weights"]["strategy"] == "channel"
    lists = {**{name: group["targets"] for name, group in groups.items()}, "ignore": found["ignore"]}
    for path in linears:
        holders = [name for name, patterns in lists.items() if any(matches(pattern, path) for pattern in patterns)]
        assert len(holders) == 1, path
        expected = "vision" if "vision_tower" in path else "lm_head" if path == "lm_head" else "language"
        assert holders == (
            ["ignore"] if "projector" in path or ("layers.1" in path and expected == "vision") else [expected]
        )


class Letters:
    """Decodes token n as the n-th letter; 0 is half of a character."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(96 + token) if token else "\ufffd" for token in tokens)


@pytest.mark.parametrize(
    ("tokens", "stop", "pieces"),
    [
        ([1, 2, 3], [], ["a", "b", "c"]),
        ([1, 2, 3, 4], ["cd"], ["a", "b"]),  # c waits, then ends the answer
        ([1, 3, 5, 4], ["cd"], ["a", "ce", "d"]),  # c waited for nothing
        ([1, 2, 3], ["cd"], ["a", "b", "c"]),  # the answer ends while c waits
        ([1, 2, 3, 4], ["d", "bc"], ["a"]),  # the first that appears
        ([1, 0], [], ["a", "\ufffd"]),
        ([], ["a"], []),
    ],
)
def test_an_answer_ends_before_a_stop_text(tokens: list[int], stop: list[str], pieces: list[str]) -> None:
    assert list(answer_pieces(Letters(), tokens, stop)) == pieces


HERE = f"{sys.platform}-{platform.machine()}"


def exported(**manifest: Any) -> Any:
    """As much of an exported model as the choice of an engine looks at."""
    return SimpleNamespace(folder=Path("OUT"), manifest=manifest)


GENAI = {"layout": "genai", "native_library": {"file": "libsplitq_ops.so", "platform": HERE}}


@pytest.mark.parametrize(
    ("manifest", "native", "reason"),
    [
        (GENAI, None, None),
        (GENAI, True, None),
        ({"layout": "genai"}, None, None),
        ({"layout": "genai"}, False, None),
        ({"layout": "flat"}, None, "has the layout flat; export with --layout genai"),
        ({}, None, "has the layout flat"),  # of an older version
        ({"layout": "genai"}, True, "exported without the native library"),
        (GENAI, False, "names the native library, which --functions leaves out"),
        (GENAI | {"native_library": {"file": "x", "platform": "win32-AMD64"}}, None, "one of win32-AMD64, this is"),
    ],
)
def test_genai_runs_what_it_can_and_says_why_not(
    manifest: dict[str, Any], native: bool | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(genai, "PACKAGE", "numpy")  # stands for an installed onnxruntime-genai
    found = genai.why_not(exported(**manifest), native=native)
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)
    assert _by_genai(exported(**manifest), RunOptions(native=native)) == (reason is None)
    if reason is not None:
        for wanted in (RunOptions(native=native, engine="genai"), RunOptions(native=native, temperature=1.0)):
            with pytest.raises(SplitQError, match="expected onnxruntime-genai to run OUT, but"):
                _by_genai(exported(**manifest), wanted)


def test_without_genai_the_loop_answers_greedily(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genai, "PACKAGE", "no_such_package")
    assert not _by_genai(exported(**GENAI), RunOptions())
    with pytest.raises(SplitQError, match=r"--temperature: .* not installed; run: pip install 'splitq-edge\[genai\]'"):
        _by_genai(exported(**GENAI), RunOptions(temperature=0.7))


def test_sampling_options_need_a_temperature() -> None:
    with pytest.raises(SplitQError, match="expected --temperature above 0 beside them, got 0"):
        _by_genai(exported(**GENAI), RunOptions(top_k=3))
    assert not _by_genai(exported(**GENAI), RunOptions(engine="loop"))
    with pytest.raises(SplitQError, match="--engine loop leaves it out"):
        _by_genai(exported(**GENAI), RunOptions(engine="loop", temperature=1.0))
