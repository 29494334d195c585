"""LoRA adapters of peft's format: merged by the formula, eagerly and lazily, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import rng
from families import save_checkpoint
from safetensors.torch import load_file, save_file

from splitq_edge.errors import SplitQError
from splitq_edge.loading import LoadedModel, load_model

RANK, ALPHA = 4, 8.0
OLD = "base_model.model.language_model.model.layers.1.mlp.up_proj"  # as peft saved LLaVA with older transformers
NEW = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
VISION = "base_model.model.model.vision_tower.encoder.layers.1.mlp.fc1"
WEIGHTS = {  # the adapter's name, the model's name, [out, in]
    OLD: ("model.language_model.layers.1.mlp.up_proj.weight", (160, 96)),
    NEW: ("model.language_model.layers.0.self_attn.q_proj.weight", (96, 96)),
    VISION: ("model.vision_tower.encoder.layers.1.mlp.fc1.weight", (48, 32)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("llava", tmp_path_factory.mktemp("models") / "base")


def write_adapter(
    folder: Path, base: Path | str, tensors: dict[str, torch.Tensor] | None = None, **settings: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": RANK, "lora_alpha": ALPHA, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(factors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def factors() -> dict[str, torch.Tensor]:
    generator, found = rng(5), {}
    for key, (_, (rows, columns)) in WEIGHTS.items():
        found[f"{key}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        found[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator).bfloat16()
    return found


@torch.no_grad()
def weights_of(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    loaded.read_rest()
    return {name: value.clone() for name, value in loaded.model.named_parameters()}


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"mlp.up_proj": 3.0}}])
def test_weights_are_the_bases_and_the_scaled_products(
    base: Path, tmp_path: Path, lazy: bool, settings: dict[str, Any]
) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, **settings)
    before = weights_of(load_model(str(base)))
    after = weights_of(load_model(str(base), lazy=lazy, adapter=str(adapter)))
    given = factors()
    for key, (name, _) in WEIGHTS.items():
        alpha = 3.0 if settings.get("alpha_pattern") and key == OLD else ALPHA
        scale = alpha / (RANK**0.5 if settings.get("use_rslora") else RANK)
        product = given[f"{key}.lora_B.weight"].float() @ given[f"{key}.lora_A.weight"].float()
        torch.testing.assert_close(after.pop(name), before.pop(name) + scale * product)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("lazy", [False, True])
def test_weights_that_were_trained_whole_take_the_place_of_the_bases(base: Path, tmp_path: Path, lazy: bool) -> None:
    head = torch.randn(272, 96, generator=rng())
    whole = {"base_model.model.lm_head.weight": head}
    adapter = write_adapter(tmp_path / "adapter", base, whole, modules_to_save=["lm_head"])
    assert torch.equal(weights_of(load_model(str(base), lazy=lazy, adapter=str(adapter)))["lm_head.weight"], head)


@pytest.mark.parametrize("lazy", [False, True])
def test_blocks_of_a_lazy_model_carry_the_adapter(base: Path, tmp_path: Path, lazy: bool) -> None:
    loaded = load_model(str(base), lazy=lazy, adapter=str(write_adapter(tmp_path / "adapter", base)))
    weight = loaded.block(1).get_parameter("mlp.up_proj.weight")
    whole = weights_of(load_model(str(base), adapter=str(tmp_path / "adapter")))
    assert torch.equal(weight, whole[WEIGHTS[OLD][0]])


@pytest.mark.parametrize("relative", [False, True])
def test_an_adapters_folder_is_a_model_by_itself(base: Path, tmp_path: Path, relative: bool) -> None:
    shutil.copytree(base, tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", "../base" if relative else tmp_path / "base")
    alone = load_model(str(adapter))
    assert alone.source == str(adapter)
    assert Path(alone.base).resolve() == (tmp_path / "base").resolve()
    whole = weights_of(load_model(str(base), adapter=str(adapter)))
    assert all(torch.equal(value, whole[name]) for name, value in weights_of(alone).items())


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "modules_to_save": ["classifier", "score"]},
        {"init_lora_weights": True, "target_parameters": [], "trainable_token_indices": None, "loftq_config": {}},
        {"r": 9, "rank_pattern": {"up_proj": RANK, "layers.0.self_attn.q_proj": RANK, "fc1": RANK}},
    ],
)
def test_settings_that_change_no_weight_are_merged_as_without(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    plain = weights_of(load_model(str(base), adapter=str(write_adapter(tmp_path / "plain", base))))
    found = weights_of(load_model(str(base), adapter=str(write_adapter(tmp_path / "other", base, **settings))))
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def one(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**factors(), key: tensor}


@pytest.mark.parametrize(
    ("tensors", "settings", "problem"),
    [
        (None, {"use_dora": True}, "expected use_dora False, got True; merge the adapter with peft"),
        (None, {"bias": "all"}, "expected bias none, got all"),
        (None, {"use_qalora": True}, "expected use_qalora False, got True"),
        (None, {"layer_replication": [[0, 2], [1, 2]]}, "expected layer_replication None, got"),
        (None, {"alora_invocation_tokens": [5, 6]}, r"expected alora_invocation_tokens None, got \[5, 6\]; merge"),
        (None, {"trainable_token_indices": [5]}, "expected trainable_token_indices None"),
        (None, {"target_parameters": ["mlp.experts"]}, "expected target_parameters None"),
        (None, {"arrow_config": {"top_k": 3}}, "expected arrow_config None"),
        (
            None,
            {"init_lora_weights": "pissa"},
            "got init_lora_weights pissa, .*; merge .* or save it with path_initial",
        ),
        (None, {"init_lora_weights": "pissa_niter_4"}, "got init_lora_weights pissa_niter_4"),
        (None, {"init_lora_weights": "olora"}, "got init_lora_weights olora"),
        (None, {"init_lora_weights": "corda"}, "got init_lora_weights corda"),
        (None, {"init_lora_weights": "loftq"}, "got init_lora_weights loftq"),
        (None, {"r": 16}, "expected .*lora_A.weight of rank 16, as adapter_config.json says .* got 4"),
        (None, {"rank_pattern": {"up_proj": 2}}, f"expected {OLD}.lora_A.weight of rank 2, .* got 4"),
        (None, {"r": "4"}, "expected a number as r, got '4'; mend"),
        (None, {"lora_alpha": None}, "expected a number as lora_alpha, got None; mend"),
        (None, {"lora_alpha": "8"}, "expected a number as lora_alpha, got '8'; mend"),
        (None, {"alpha_pattern": {"up_proj(": 2}}, r"expected a regular expression in alpha_pattern, got 'up_proj\('"),
        (None, {"rank_pattern": {"*": 4}}, r"expected a regular expression in rank_pattern, got '\*'"),
        (None, {"alpha_pattern": {"up_proj": "8"}}, "expected a number as alpha_pattern of 'up_proj', got '8'"),
        (None, {"alpha_pattern": [1]}, r"expected alpha_pattern from module names to numbers, got \[1\]"),
        (None, {"modules_to_save": ["lm_head"]}, r"expected lm_head.weight, which .* \(modules_to_save\), got none"),
        ({}, {}, "expected the factors of an adapter, got no tensor"),
        ({f"{NEW}.lora_B.weight": torch.zeros(96, 4)}, {}, rf"expected lora_A beside {NEW}.lora_B.weight \[96, 4\]"),
        (None, {"peft_type": "IA3"}, "expected an adapter of peft_type LORA, got IA3"),
        (one(f"{NEW}.lora_embedding_A", torch.zeros(4, 4)), {}, f"linear layers only, got {NEW}.lora_embedding_A"),
        ({f"{NEW}.lora_A.weight": torch.zeros(4, 96)}, {}, r"expected lora_B \[out, 4\] beside .*q_proj.*, got none"),
        (
            one(f"{NEW}.lora_A.weight", torch.zeros(4, 95)),
            {},
            r"a weight .*layers.0.self_attn.q_proj.weight of shape \[96, 95\], got a weight of shape \[96, 96\]",
        ),
        (one("base_model.model.stranger.weight", torch.zeros(1)), {}, "a weight stranger.weight .* got no such weight"),
    ],
)
def test_what_cannot_be_merged_is_named(
    base: Path, tmp_path: Path, tensors: dict[str, torch.Tensor] | None, settings: dict[str, Any], problem: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, tensors, **settings)
    with pytest.raises(SplitQError, match=problem) as raised:
        load_model(str(base), lazy=True, adapter=str(adapter))
    assert "\n" not in str(raised.value)


def test_a_weight_that_two_layers_share_is_not_changed_for_one(tmp_path: Path) -> None:
    base = save_checkpoint("smolvlm", tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, {"base_model.model.lm_head.weight": torch.zeros(272, 96)})
    with pytest.raises(
        SplitQError, match=r"expected no change to lm_head.weight, which is also model.text_model.embed"
    ):
        load_model(str(adapter))


@pytest.mark.parametrize(("file", "content"), [("adapter_config.json", b"{}"), ("adapter_model.safetensors", b"half")])
def test_a_damaged_adapter_is_refused(base: Path, tmp_path: Path, file: str, content: bytes) -> None:
    adapter = write_adapter(tmp_path / "adapter", base)
    (adapter / file).write_bytes(content)
    with pytest.raises(SplitQError, match=f"{file}: expected"):
        load_model(str(base), adapter=str(adapter))


def test_an_adapter_without_a_base_says_how_to_name_it(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", "")
    with pytest.raises(
        SplitQError, match="expected base_model_name_or_path, got none; give the base as MODEL and --ad"
    ):
        load_model(str(adapter))
    assert load_file(adapter / "adapter_model.safetensors")
