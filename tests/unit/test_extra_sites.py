"""Vision encoder and output projection as quantized sites: which, from what statistics, and resumable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import CLOSED_FORM, chat_batches, tiny_loaded
from families import tiny_inputs, tiny_model

from splitq_edge.adapters.registry import adapter_for
from splitq_edge.calibration import extra_sites as extra_sites_module
from splitq_edge.calibration.activations import ActivationStore
from splitq_edge.calibration.block_inputs import first_block_inputs, padded_batches
from splitq_edge.calibration.extra_sites import (
    extra_config,
    extra_sites,
    observing_vision,
    place_extra,
    used_vision_blocks,
)
from splitq_edge.calibration.observer import SiteStats
from splitq_edge.calibration.runner import Calibration
from splitq_edge.calibration.state import CalibrationState
from splitq_edge.config import QuantConfig, preset
from splitq_edge.convert import assemble, effective_bits
from splitq_edge.errors import SplitQError
from splitq_edge.estimate import estimate
from splitq_edge.loading import LoadedModel
from splitq_edge.modality import ModalityContext
from splitq_edge.modules.split_linear import SitePart
from splitq_edge.parallel import Processes

ALONE = Processes(alone=True)
EVERYTHING = replace(preset("W4A8"), learning=CLOSED_FORM, vision="W4A8", lm_head="W8A8")
VISION_SITES = [f"vision.0.{name}" for name in ("attn_in", "attn_out", "mlp_in", "mlp_mid")]


def loaded_family(model_type: str) -> LoadedModel:
    return LoadedModel(model_type, tiny_model(model_type), None, adapter_for(model_type), ModalityContext())


def run_over(loaded: LoadedModel, config: QuantConfig, folder: Path) -> Calibration:
    state = CalibrationState(folder / "state", {})
    return Calibration(loaded, config, state, ActivationStore(folder / "activations"), 0, ALONE)


def files_of(run: Calibration) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.state.folder.iterdir()}


def vision_stats(
    loaded: LoadedModel, samples: list[dict[str, torch.Tensor]], size: int, folder: Path
) -> dict[str, SiteStats]:
    batches = padded_batches(samples, size, 0, ALONE)
    with observing_vision(loaded, len(samples)) as observer:
        first_block_inputs(loaded, batches, ActivationStore(folder), before=observer.begin)
    return observer.stats(ALONE)


@pytest.mark.parametrize(("layers", "used"), [(-2, 1), (-1, 2), (1, 1), ([-2, -1], 2)])
def test_vision_blocks_behind_the_chosen_features_are_left_alone(layers: int | list[int], used: int) -> None:
    loaded = tiny_loaded()
    loaded.model.config.vision_feature_layer = layers
    assert used_vision_blocks(loaded) == used
    assert {site.name.split(".")[1] for site in extra_sites(loaded, "vision")} == {str(i) for i in range(used)}


@pytest.mark.parametrize("size", [1, 4])
def test_every_row_of_the_vision_encoder_is_seen_and_some_of_each_sample_kept(size: int, tmp_path: Path) -> None:
    loaded, samples = tiny_loaded(), chat_batches(3)
    two = {**samples[2], "pixel_values": torch.cat([samples[0]["pixel_values"], samples[1]["pixel_values"]])}
    image = samples[2]["input_ids"] == 3
    two["input_ids"] = torch.cat([samples[2]["input_ids"][image][None], samples[2]["input_ids"]], 1)
    two["attention_mask"] = torch.ones_like(two["input_ids"])
    stats = vision_stats(loaded, [*samples[:2], two], size, tmp_path)
    assert list(stats) == VISION_SITES
    rows: list[torch.Tensor] = []
    first = loaded.model.get_submodule("model.vision_tower.encoder.layers.0.self_attn.q_proj")
    handle = first.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for sample in (*samples[:2], two):
            loaded.model.model.vision_tower(sample["pixel_values"])
    handle.remove()
    site, expected = stats["vision.0.attn_in"], torch.cat(rows)
    assert (site.vision_tokens, site.text_tokens) == (expected.shape[0], 0)
    torch.testing.assert_close(site.absmax, expected.abs().amax(0))
    torch.testing.assert_close(site.vision_rows, expected)  # few enough to keep them all, in the samples' order
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())


def test_rows_of_packed_patches_are_seen_too(tmp_path: Path) -> None:
    loaded, both = loaded_family("qwen2_5_vl"), tiny_inputs("qwen2_5_vl")
    patches = both["pixel_values"].shape[0] // 2
    samples = [
        {
            name: value[i * patches : (i + 1) * patches] if name == "pixel_values" else value[i : i + 1]
            for name, value in both.items()
        }
        for i in range(2)
    ]
    stats = vision_stats(loaded, samples, 2, tmp_path)
    assert len(stats) == 8
    assert {site.vision_tokens for site in stats.values()} == {2 * patches}


def test_rows_of_tiles_belong_to_the_sample_that_they_came_with(tmp_path: Path) -> None:
    loaded, both = loaded_family("smolvlm"), tiny_inputs("smolvlm")
    samples = [
        {name: value[tiles] if name == "pixel_values" else value[i : i + 1] for name, value in both.items()}
        for i, tiles in enumerate((slice(0, 3), slice(3, 4)))
    ]
    alone = [vision_stats(loaded, [sample], 1, tmp_path / str(i)) for i, sample in enumerate(samples)]
    stats = vision_stats(loaded, samples, 2, tmp_path / "both")
    assert {site.vision_tokens for site in stats.values()} == {4 * 16}
    for name, site in stats.items():
        torch.testing.assert_close(site.vision_rows, torch.cat([part[name].vision_rows for part in alone]))


def test_a_width_without_near_equal_factors_stays_untransformed() -> None:
    assert extra_config(EVERYTHING, "vision", 64).transform == "hadamard"
    odd = extra_config(EVERYTHING, "vision", 122)  # 2 x 61
    assert odd.transform == "identity"
    assert (odd.bits, odd.activation_bits, odd.rounding) == (4, 8, EVERYTHING.rounding)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_quantized_extras_stand_in_the_model_and_answer_nearly_as_it(rounding: str, tmp_path: Path) -> None:
    loaded, samples = tiny_loaded(), chat_batches(2)
    config = replace(EVERYTHING, rounding=rounding)
    run = run_over(loaded, config, tmp_path)
    run.run(samples, finished=run.state.start(resume=False))
    pixels = samples[0]["pixel_values"]
    with torch.no_grad():
        before = loaded.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        quantized = assemble(loaded, config, run.state)
        after = loaded.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    assert list(quantized.extras) == ["vision", "lm_head"]
    assert list(quantized.extras["vision"]) == VISION_SITES
    assert effective_bits(quantized.extras["vision"]) == 4
    assert effective_bits(quantized.extras["lm_head"]) == 8
    assert isinstance(loaded.model.lm_head, SitePart)
    error = float((after - before).norm() / before.norm())
    assert 0 < error < 0.1
    report = quantized.extra_reports["vision"]["sites"]
    assert list(report) == VISION_SITES
    for site in report.values():
        rtn, final = (site["sqnr_db"][stage] for stage in ("rtn", "final"))
        assert rtn[0] is None
        assert final[1] > rtn[1]


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_slices_of_output_channels_are_what_the_whole_is(
    rounding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, records = tiny_loaded(), []
    for slice_size in (extra_sites_module.SLICE, 10 * loaded.model.lm_head.in_features):
        monkeypatch.setattr(extra_sites_module, "SLICE", slice_size)
        run = run_over(loaded, replace(EVERYTHING, rounding=rounding), tmp_path / str(slice_size))
        run.run(chat_batches(2), finished=run.state.start(resume=False))
        records.append(run.state.load_extra("lm_head", loaded.context))
    one, other = (record.sites["lm_head"].groups["main"] for record in records)
    assert one.qweight.shape[1] > 10
    assert (one.qweight.int() - other.qweight.int()).abs().max() <= 1  # sums of other lengths round differently
    assert (one.qweight != other.qweight).float().mean() < 0.01
    torch.testing.assert_close(other.scale, one.scale, rtol=1e-5, atol=0)
    assert other.clip == one.clip
    was, is_now = (record.report["sites"]["lm_head"]["sqnr_db"] for record in records)
    assert is_now["final"][0] == pytest.approx(was["final"][0], abs=0.05)
    assert is_now["rtn"][0] == pytest.approx(was["rtn"][0], abs=0.05)


def test_resumed_calibration_ends_with_the_same_bytes(tmp_path: Path) -> None:
    samples = chat_batches(3)
    whole = run_over(tiny_loaded(), EVERYTHING, tmp_path / "whole")
    whole.run(samples, finished=whole.state.start(resume=False))
    assert set(files_of(whole)) >= {"extra_vision.safetensors", "extra_lm_head.safetensors"}
    pieces = run_over(tiny_loaded(), EVERYTHING, tmp_path / "pieces")
    pieces.run(samples, finished=pieces.state.start(resume=False), stop_after=1)
    assert pieces.state.finished_extras() == ("vision",)
    pieces.run(samples, finished=pieces.state.start(resume=True))
    assert files_of(pieces) == files_of(whole)
    for lost in ("extra_vision.safetensors", "extra_lm_head.safetensors"):  # stopped just before it was written
        (pieces.state.folder / lost).unlink()
        pieces.run(samples, finished=pieces.state.start(resume=True))
        assert files_of(pieces) == files_of(whole), lost
        assert not pieces.store._in_memory
    whole.state.remove()
    assert not whole.state.folder.exists()


def test_a_tied_embedding_stays_float_when_the_output_projection_is_quantized(tmp_path: Path) -> None:
    loaded, both = loaded_family("llama"), tiny_inputs("llama")
    loaded.processor = type("Tokenizer", (), {"pad_token_id": 0})()
    config = replace(EVERYTHING, vision="none")
    run = run_over(loaded, config, tmp_path)
    samples = [{name: value[i : i + 1] for name, value in both.items()} for i in range(2)]
    run.run(samples, finished=run.state.start(resume=False))
    embedding = loaded.model.get_input_embeddings()
    before = embedding.weight.clone()
    place_extra(loaded, "lm_head", run.state.load_extra("lm_head", loaded.context).sites)
    assert loaded.model.get_input_embeddings() is embedding
    assert torch.equal(embedding.weight, before)
    assert isinstance(loaded.model.lm_head, SitePart)


def test_vision_scheme_of_a_text_model_is_refused(tmp_path: Path) -> None:
    run = run_over(loaded_family("llama"), EVERYTHING, tmp_path)
    with pytest.raises(
        SplitQError, match=r"recipe: vision: expected none for a model without vision encoder \('llama'\)"
    ):
        run.run([tiny_inputs("llama")], finished=0)


def test_calibration_without_images_cannot_quantize_the_vision_encoder(tmp_path: Path) -> None:
    run = run_over(tiny_loaded(), EVERYTHING, tmp_path)
    text = {"input_ids": torch.tensor([[1, 70, 71]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(SplitQError, match=r"vision\.0\.attn_in: expected calibration samples with images, got none"):
        run.run([text], finished=0)


def test_a_four_bit_cache_needs_heads_of_an_even_width(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    loaded.model.config.text_config.head_dim = 15
    run = run_over(loaded, replace(EVERYTHING, kv_cache_bits=4), tmp_path)
    with pytest.raises(SplitQError, match="kv_cache_bits: expected 0 or 8 for heads of 15 channels"):
        run.run(chat_batches(1), finished=0)


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
def test_estimate_moves_the_extra_weights_out_of_float32(model_type: str) -> None:
    loaded = loaded_family(model_type)
    plain, extra = (
        estimate(loaded, config, tokens=10, samples=1, packed=False)
        for config in (replace(EVERYTHING, vision="none", lm_head="none"), EVERYTHING)
    )
    assert plain.extra_bytes == {}
    assert list(extra.extra_bytes) == ["vision", "lm_head"]
    assert extra.effective_bits == plain.effective_bits
    moved = [linear for site in extra_sites(loaded, "vision") for linear in site.linears]
    moved += ["lm_head"] if model_type == "llava" else []  # the other's is tied to the embedding
    weights = sum(loaded.model.get_submodule(path).weight.numel() for path in moved)
    assert plain.float_bytes - extra.float_bytes == 4 * weights
