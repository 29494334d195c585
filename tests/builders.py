"""Small things that several test files build: sites, one-node models, a tiny random LLaVA and its folder."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import nn

from splitq_edge.adapters.registry import adapter_for
from splitq_edge.calibration.activations import ActivationStore
from splitq_edge.calibration.runner import Calibration
from splitq_edge.calibration.state import CalibrationState
from splitq_edge.config import CorrectionConfig, LearningConfig, QuantConfig, SplitConfig
from splitq_edge.convert import QuantizedModel, assemble
from splitq_edge.learning.site import TrainableSite
from splitq_edge.loading import LoadedModel
from splitq_edge.modality import ModalityContext
from splitq_edge.modules.split_linear import SplitLinear
from splitq_edge.parallel import Processes
from splitq_edge.splitting.plan import SplitPlan

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>")
IMAGE_TOKEN_ID = 3
IMAGE_TOKENS = 16  # (56 / 14) ** 2
IMAGE_SIZE = 56
PATCH_SIZE = 14
VOCABULARY = 272  # 256 bytes and the special tokens, rounded up
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}:"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def rng(seed: int = 0) -> torch.Generator:
    """A generator of its own, so that no test depends on another's draws."""
    return torch.Generator().manual_seed(seed)


def no_split(**settings: Any) -> QuantConfig:
    """A recipe without split, transform and correction; every part that a test wants is given by hand."""
    plain: dict[str, Any] = {
        "scheme": "test",
        "bits": 4,
        "activation_bits": 8,
        "transform": "identity",
        "scale": "none",
        "split": SplitConfig(ratio=0),
        "correction": CorrectionConfig(cws_ratio=0, mac_ratio=0),
    }
    return QuantConfig(**(plain | settings))


def random_plan(channels: int, text: int, vision: int, *, seed: int = 0) -> SplitPlan:
    """Random disjoint channel sets of the given sizes, each ascending."""
    order = torch.randperm(channels, generator=rng(seed))
    sets = order.split((channels - text - vision, text, vision))
    return SplitPlan(*(part.sort().values for part in sets))


def random_linears(channels: int, outputs: Sequence[int], *, bias: bool = False, seed: int = 0) -> list[nn.Linear]:
    """Linears with weights of about 1 / sqrt(channels)."""
    generator = rng(seed)
    linears = []
    for width in outputs:
        linear = nn.Linear(channels, width, bias=bias)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(width, channels, generator=generator) * channels**-0.5)
            if bias:
                linear.bias.copy_(torch.randn(width, generator=generator))
        linears.append(linear)
    return linears


def load_script(path: Path) -> ModuleType:
    """A script beside the package, as a module."""
    name = f"{path.parent.name}/{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


CLOSED_FORM = LearningConfig(epochs=0)


def closed_form_site(
    name: str, linears: list[nn.Linear], plan: SplitPlan, config: QuantConfig, context: ModalityContext
) -> SplitLinear:
    """A quantized site with nothing learned."""
    return TrainableSite(name, linears, plan, replace(config, learning=CLOSED_FORM), context).freeze()


def random_site(
    config: QuantConfig,
    *,
    widths: tuple[int, int, int],
    outputs: Sequence[int] = (24,),
    bias: bool = False,
    context: ModalityContext | None = None,
    seed: int = 0,
) -> tuple[SplitLinear, torch.Tensor]:
    """A quantized site of random linears and the float weight [K, N] behind it."""
    channels = sum(widths)
    linears = random_linears(channels, outputs, bias=bias, seed=seed)
    plan = random_plan(channels, *widths[1:], seed=seed)
    with torch.no_grad():
        site = closed_form_site("site", linears, plan, config, context or ModalityContext())
        return site, torch.cat([linear.weight for linear in linears]).T.contiguous()


def calibrated(
    loaded: LoadedModel, config: QuantConfig, batches: Sequence[dict[str, torch.Tensor]], folder: Path, seed: int = 0
) -> QuantizedModel:
    """The model quantized in place, by way of a calibration state in `folder`."""
    state = calibration_state(loaded, config, batches, folder, seed)
    return assemble(loaded, config, state)


def calibration_state(
    loaded: LoadedModel, config: QuantConfig, batches: Sequence[dict[str, torch.Tensor]], folder: Path, seed: int = 0
) -> CalibrationState:
    """A finished calibration in `folder`; the model is left as it was."""
    state = CalibrationState(folder / "state", {"seed": seed})
    store = ActivationStore(folder / "activations")
    run = Calibration(loaded, config, state, store, seed, Processes(alone=True))
    run.run(batches, finished=state.start(resume=False))
    return state


def site_model(site: SplitLinear, *, packed: bool) -> onnx.ModelProto:
    """A model of one SplitQLinear node with its function body; inputs x and, if read, modality."""
    from splitq_edge.exporters.functions import functions_for
    from splitq_edge.exporters.nodes import DOMAIN, VERSION, make_node
    from splitq_edge.exporters.site_weights import site_node

    spec, initializers = site_node(site, packed=packed)
    names = {name: initializers[name].name if name in initializers else name for name in spec.present_inputs}
    feeds = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", site.in_features])]
    if "modality" in names:
        feeds.append(helper.make_tensor_value_info("modality", TensorProto.INT8, ["batch", "sequence"]))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", site.out_features])
    node = make_node(spec, names, "y", "site")
    graph = helper.make_graph([node], "site", feeds, [output], list(initializers.values()))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions_for([spec]), ir_version=10)


def site_engines() -> list[str]:
    """What can run a site's node here: "functions" and, where the library is built or asked for, "native"."""
    from splitq_edge.runtime_ops import library_path

    wanted = os.environ.get("SPLITQ_EXPECT_NATIVE") == "1" or library_path() is not None
    return ["functions", "native"] if wanted else ["functions"]


def run_site(
    site: SplitLinear, x: torch.Tensor, modality: torch.Tensor, *, packed: bool, native: bool
) -> np.ndarray[Any, Any]:
    """The site's node in ONNX Runtime: x [batch, sequence, K], modality [batch, sequence] -> [batch, sequence, N]."""
    import onnxruntime as ort

    from splitq_edge.runtime_ops import library_path

    model = site_model(site, packed=packed)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if native:
        options.register_custom_ops_library(str(library_path()))
        del model.functions[:]  # nothing but the kernels can run it
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    known = {"x": x.numpy(), "modality": modality.numpy()}
    return session.run(None, {value.name: known[value.name] for value in session.get_inputs()})[0]


def tiny_llava_config(*, tied: bool = False) -> Any:
    """Configuration of a LLaVA of 0.4 million parameters: every width small, no two alike by chance."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=32,
    )
    text = LlamaConfig(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN_ID, tie_word_embeddings=tied
    )


def tiny_llava(seed: int = 0) -> nn.Module:
    """The model with random weights; it never says a special token, so greedy answers run their full length."""
    from transformers import LlavaForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(tiny_llava_config()).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:  # transformers starts at 0.02, where every layer is almost the identity
                    nn.init.normal_(parameter, std=1.0 if "embed" in name else parameter.shape[1] ** -0.5)
            model.lm_head.weight[: len(SPECIAL_TOKENS)] = 0
    return model


def tiny_processor() -> Any:
    """Byte-level tokenizer, CLIP image processor in PIL, and a plain chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        tokenizer=fast,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_loaded(seed: int = 0) -> LoadedModel:
    """The tiny LLaVA as `load_model` would give it."""
    return LoadedModel("tiny-llava", tiny_llava(seed), tiny_processor(), adapter_for("llava"), ModalityContext())


def prompt_ids(*parts: int | str) -> list[int]:
    """Token ids of a prompt: a string stands for its bytes' tokens, a number for so many images."""
    ids = [1]
    for part in parts:
        if isinstance(part, int):
            ids += [IMAGE_TOKEN_ID] * (IMAGE_TOKENS * part)
        else:
            ids += [len(SPECIAL_TOKENS) + byte % 256 for byte in part.encode()]
    return ids


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask [batch, sequence] int64."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def random_pixels(images: int, seed: int = 0) -> torch.Tensor:
    """[images, 3, 56, 56] float32."""
    return torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=rng(seed))


def chat_batches(count: int = 4, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Model inputs of `count` conversations, one image each."""
    questions = ("what shape is it?", "is there a circle?", "name the colour", "red?")
    batches = []
    for index in range(count):
        ids, mask = left_padded([prompt_ids("user:", 1, questions[index % 4], "\nassistant: yes")])
        pixels = random_pixels(1, seed + index)
        batches.append({"input_ids": ids, "attention_mask": mask, "pixel_values": pixels})
    return batches


def write_image(path: Path, seed: int = 0) -> Path:
    """A 64 x 48 picture of noise."""
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


def write_chats(folder: Path, count: int = 2) -> Path:
    """A calibration folder: pictures and one .jsonl file of chats about them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        image = write_image(folder / f"{index}.png", index)
        content = [{"type": "image", "path": image.name}, {"type": "text", "text": f"what is it, {index}?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "noise"}]
        lines.append(json.dumps({"messages": messages}))
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_checkpoint(folder: Path) -> Path:
    """The tiny LLaVA as a Hugging Face folder."""
    tiny_llava().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def lora_adapter(folder: Path, *, base: str) -> Path:
    """A LoRA adapter of the tiny LLaVA's query and up projections, in both blocks."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tensors, generator = {}, rng(2)
    for layer in range(2):
        for name, rows in (("self_attn.q_proj", 96), ("mlp.up_proj", 160)):
            module = f"base_model.model.model.language_model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, 96, generator=generator) * 0.2
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
