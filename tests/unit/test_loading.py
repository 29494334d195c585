"""Lazy loading gives what eager loading gives and keeps no weight; damaged checkpoints are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import IMAGE_TOKEN_ID, write_image
from families import TINY_CONFIGS, save_checkpoint, tiny_inputs, tiny_model
from safetensors.torch import load_file, save_file

from splitq_edge.calibration.activations import ActivationStore
from splitq_edge.calibration.block_inputs import BlockInputs, PaddedBatch, block_output, first_block_inputs
from splitq_edge.errors import SplitQError
from splitq_edge.loading import LoadedModel, load_model

FAMILIES = sorted(TINY_CONFIGS)
TIED = [("llama", True), ("llava", False), ("qwen2_5_vl", True), ("smolvlm", True)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_checkpoint(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Path:
    return checkpoints[request.param]


@pytest.fixture
def copied(tmp_path: Path, checkpoints: dict[str, Path]) -> Path:
    return shutil.copytree(checkpoints["llava"], tmp_path / "copy")


def block_inputs(loaded: LoadedModel, folder: Path) -> BlockInputs:
    """What the blocks are called with; none of them runs."""
    batch = PaddedBatch(tiny_inputs(loaded.adapter.model_type), torch.arange(2))
    with loaded.outside_blocks():
        return first_block_inputs(loaded, [batch], ActivationStore(folder))


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_of(item)


def assert_no_weight(loaded: LoadedModel) -> None:
    assert {parameter.device.type for parameter in loaded.model.parameters()} == {"meta"}


def test_checkpoints_of_the_tests_have_several_shards_in_bfloat16(checkpoint: Path) -> None:
    shards = list(checkpoint.glob("*.safetensors"))
    assert len(shards) > 1
    assert {tensor.dtype for shard in shards for tensor in load_file(shard).values()} == {torch.bfloat16}


def test_a_lazy_model_has_real_buffers_and_no_weight(checkpoint: Path) -> None:
    eager, lazy = load_model(str(checkpoint)), load_model(str(checkpoint), lazy=True)
    assert_no_weight(lazy)
    buffers = dict(lazy.model.named_buffers())
    assert buffers.keys() == dict(eager.model.named_buffers()).keys()
    for name, buffer in eager.model.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=0, atol=0)
    assert not lazy.model.training
    assert lazy.model.generation_config.to_dict() == eager.model.generation_config.to_dict()


def test_lazy_and_eager_blocks_get_and_give_the_same_bits(checkpoint: Path, tmp_path: Path) -> None:
    eager, lazy = load_model(str(checkpoint)), load_model(str(checkpoint), lazy=True)
    both = {name: block_inputs(loaded, tmp_path / name) for name, loaded in (("eager", eager), ("lazy", lazy))}
    assert_no_weight(lazy)
    assert eager.block_count == lazy.block_count == 2
    with torch.no_grad():
        for index in range(2):
            states, arguments = [], []
            for loaded, inputs in zip((eager, lazy), both.values(), strict=True):
                inputs.begin(index)
                states.append(inputs.get("float", 0))
                arguments.append(inputs.batch(0).kwargs)
                inputs.put("float", 0, block_output(loaded.block(index), states[-1], inputs.batch(0), loaded.context))
            assert torch.equal(*states)
            assert arguments[0].keys() == arguments[1].keys()
            pairs = list(zip(*map(tensors_of, arguments), strict=True))
            assert pairs
            assert all(torch.equal(left, right) for left, right in pairs)
        hidden, lazy_hidden = (inputs.get("float", 0) for inputs in both.values())
        assert torch.equal(hidden, lazy_hidden)
        with eager.outside_blocks(), lazy.outside_blocks():
            logits = [
                loaded.model.get_submodule(loaded.adapter.lm_head)(
                    loaded.model.get_submodule(loaded.final_norm_path)(hidden)
                )
                for loaded in (eager, lazy)
            ]
    assert torch.equal(*logits)
    assert_no_weight(lazy)
    with torch.no_grad():
        whole = eager.model(**tiny_inputs(eager.adapter.model_type), use_cache=False).logits
    torch.testing.assert_close(logits[0], whole)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_block_is_a_float32_copy_that_does_not_touch_the_model(checkpoint: Path, lazy: bool) -> None:
    loaded = load_model(str(checkpoint), lazy=lazy)
    before = {name: (id(tensor), tensor.device) for name, tensor in loaded.model.named_parameters()}
    block, again = loaded.block(1), loaded.block(1)
    assert not block.training
    for parameter in block.parameters():
        assert parameter.dtype == torch.float32
        assert not parameter.is_meta
        assert not parameter.requires_grad
        parameter.data.zero_()
    assert all(parameter.any() for parameter in again.parameters())
    assert all(parameter.any() for parameter in loaded.block(1).parameters())
    assert {name: (id(tensor), tensor.device) for name, tensor in loaded.model.named_parameters()} == before


def test_outside_blocks_gives_weights_to_everything_but_the_blocks(checkpoint: Path) -> None:
    loaded = load_model(str(checkpoint), lazy=True)
    inside = loaded.adapter.language_blocks + "."
    with loaded.outside_blocks():
        devices = {name: parameter.device.type for name, parameter in loaded.model.named_parameters()}
        assert devices == {name: "meta" if name.startswith(inside) else "cpu" for name in devices}
        with loaded.outside_blocks():  # within itself it changes nothing
            pass
        assert {name: p.device.type for name, p in loaded.model.named_parameters()} == devices
    assert_no_weight(loaded)


def test_outside_blocks_gives_the_weights_up_after_an_error(checkpoint: Path) -> None:
    loaded = load_model(str(checkpoint), lazy=True)
    with pytest.raises(KeyboardInterrupt), loaded.outside_blocks():
        raise KeyboardInterrupt
    assert_no_weight(loaded)


@pytest.mark.parametrize(("name", "tied"), TIED)
def test_tied_weights_are_one_tensor_outside_the_blocks(checkpoints: dict[str, Path], name: str, tied: bool) -> None:
    loaded = load_model(str(checkpoints[name]), lazy=True)
    with loaded.outside_blocks():
        head = loaded.model.get_submodule(loaded.adapter.lm_head).weight
        assert (head is loaded.model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("lazy", [False, True])
def test_image_token_tokenizer_and_text_config_of_each_family(checkpoint: Path, lazy: bool) -> None:
    loaded = load_model(str(checkpoint), lazy=lazy)
    text_only = loaded.adapter.model_type == "llama"
    assert loaded.image_token_id == (None if text_only else IMAGE_TOKEN_ID)
    assert loaded.tokenizer.eos_token_id == 2
    assert (loaded.tokenizer is loaded.processor) == text_only
    assert loaded.text_config.num_hidden_layers == loaded.block_count


def test_a_processor_without_videos_makes_inputs_that_the_model_takes(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    loaded = load_model(str(checkpoints["qwen2_5_vl"]))
    image = write_image(tmp_path / "image.png")  # 64 x 48 pixels, scaled to 2 x 2 tokens
    chat = [{"role": "user", "content": [{"type": "image", "path": str(image)}, {"type": "text", "text": "what?"}]}]
    inputs = loaded.processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    is_image = inputs["input_ids"] == loaded.image_token_id
    assert is_image.sum() == 4
    assert torch.equal(inputs["mm_token_type_ids"], is_image.to(inputs["mm_token_type_ids"].dtype))
    with torch.no_grad():
        assert torch.isfinite(loaded.model(**inputs).logits).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_single_file_of_another_float_type_is_read_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_checkpoint("llava", tmp_path / "model", dtype=dtype, shard="1GB")
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    eager, lazy = load_model(str(folder)), load_model(str(folder), lazy=True)
    expected = eager.block(0).state_dict()
    for name, tensor in lazy.block(0).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name])


def test_weights_read_lazily_do_not_change_with_the_file(tmp_path: Path) -> None:
    folder = save_checkpoint("llama", tmp_path / "model", dtype=torch.float32, shard="1GB")
    loaded = load_model(str(folder), lazy=True)
    weight = loaded.block(0).get_parameter("mlp.down_proj.weight")
    before = weight.clone()
    with (folder / "model.safetensors").open("r+b") as file:  # a mapped weight would show these zeros
        size = file.seek(0, 2)
        file.seek(size // 8)
        file.write(bytes(size - size // 8))
    assert torch.equal(weight, before)


def test_a_hub_snapshot_in_the_cache_is_read_lazily(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import subprocess
    import sys

    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(checkpoints["qwen2_5_vl"], snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40, encoding="utf-8")
    code = (
        "from splitq_edge.loading import load_model\n"
        "loaded = load_model('org/tiny', lazy=True)\n"
        "print(loaded.block(1).get_parameter('mlp.down_proj.weight').sum().item())\n"
    )
    # huggingface_hub reads the place of its cache when it is imported
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    expected = load_model(str(checkpoints["qwen2_5_vl"])).block(1).get_parameter("mlp.down_proj.weight")
    assert float(result.stdout) == pytest.approx(expected.sum().item(), abs=1e-4)


def test_export_refuses_a_text_only_model(checkpoints: dict[str, Path]) -> None:
    from splitq_edge.exporters.export_folder import check_exportable

    with pytest.raises(SplitQError, match="got model type 'llama', text only"):
        check_exportable(load_model(str(checkpoints["llama"]), lazy=True))
    for exported in set(FAMILIES) - {"llama"}:
        assert check_exportable(load_model(str(checkpoints[exported]), lazy=True)) == IMAGE_TOKEN_ID


@pytest.mark.parametrize(
    ("file", "changed", "problem"),
    [
        ("processor_config.json", {"image_seq_len": 169}, "image_seq_len 4, as config.json wants it, got 169"),
        ("preprocessor_config.json", {"max_image_size": {"longest_edge": 48}}, "longest_edge 32, .* got 48"),
        ("config.json", {"image_token_id": 4}, "image token id 4, .* got 3"),
    ],
)
def test_a_processor_that_cuts_other_tiles_than_the_model_takes_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, file: str, changed: dict[str, Any], problem: str
) -> None:
    folder = shutil.copytree(checkpoints["smolvlm"], tmp_path / "copy")
    settings = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps(settings | changed), encoding="utf-8")
    with pytest.raises(SplitQError, match=f"expected a processor with .*{problem}; mend the processor's files"):
        load_model(str(folder), lazy=True)


def shard_with(folder: Path, key: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return folder / index["weight_map"][key]


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


KEY = "language_model.model.layers.1.mlp.up_proj.weight"  # as LLaVA checkpoints name it
NAME = "model.language_model.layers.1.mlp.up_proj.weight"  # as the model does


@pytest.mark.parametrize("lazy", [False, True])
def test_a_missing_weight_is_named(copied: Path, lazy: bool) -> None:
    rewrite(shard_with(copied, KEY), lambda tensors: tensors.pop(KEY))
    with pytest.raises(SplitQError, match=f"1 are missing, the first is {NAME}; check that"):
        load_model(str(copied), lazy=lazy)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_weight_that_the_model_does_not_know_is_named(copied: Path, lazy: bool) -> None:
    rewrite(shard_with(copied, KEY), lambda tensors: tensors.update(stranger=torch.zeros(1)))
    with pytest.raises(SplitQError, match="1 are unexpected, the first is stranger; check that"):
        load_model(str(copied), lazy=lazy)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_weight_of_another_shape_is_named(copied: Path, lazy: bool) -> None:
    rewrite(shard_with(copied, KEY), lambda tensors: tensors.update({KEY: torch.zeros(3, 5)}))
    with pytest.raises(SplitQError, match=f"1 are mismatched, the first is {NAME}; check that"):
        load_model(str(copied), lazy=lazy)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_truncated_shard_is_refused(copied: Path, lazy: bool) -> None:
    shard = shard_with(copied, KEY)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(SplitQError) as raised:
        load_model(str(copied), lazy=lazy)
    assert "\n" not in str(raised.value)


def test_a_shard_that_goes_away_after_loading_is_named(copied: Path) -> None:
    loaded = load_model(str(copied), lazy=True)
    shard = shard_with(copied, KEY)
    shard.unlink()
    with pytest.raises(SplitQError, match=f"{shard.name}: expected a whole safetensors file"):
        loaded.block(1)
    assert_no_weight(loaded)


def test_an_index_that_is_no_index_is_refused(copied: Path) -> None:
    (copied / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SplitQError, match="expected JSON with metadata and weight_map"):
        load_model(str(copied), lazy=True)


def test_lazily_a_checkpoint_without_safetensors_must_be_converted(copied: Path) -> None:
    for file in copied.glob("*.safetensors*"):
        file.unlink()
    torch.save(tiny_model("llava").state_dict(), copied / "pytorch_model.bin")
    with pytest.raises(SplitQError, match="convert the weights to safetensors"):
        load_model(str(copied), lazy=True)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_quantized_checkpoint_is_refused(copied: Path, lazy: bool) -> None:
    config = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copied / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SplitQError, match="quantized checkpoint; give the original"):
        load_model(str(copied), lazy=lazy)
