"""The same decoder for the engines that others made: a GGUF file a type, and onnxruntime-genai's int4 folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_graphs import text_config

GGUF_TYPES = ("Q4_0", "Q4_K_M", "Q3_K_M")


def write_checkpoint(shape: str, folder: Path) -> None:
    """A Hugging Face folder of random bfloat16 weights and a tokenizer that nobody uses."""
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(text_config(shape), dtype=torch.bfloat16)
    words = Tokenizer(models.WordLevel({"<end>": 0, "a": 1}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    model.save_pretrained(folder)


def write_genai(checkpoint: Path, shape: str, folder: Path) -> None:
    """What `onnxruntime_genai.models.builder` makes of a checkpoint in int4 for the CPU, its defaults."""
    if not (folder / "genai_config.json").exists():
        write_checkpoint(shape, checkpoint)
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
        subprocess.run([*builder, "-i", str(checkpoint), "-o", str(folder), "-c", str(folder.parent)], check=True)


def write_gguf(checkpoint: Path, shape: str, folder: Path) -> None:
    """llama.cpp's quantizations of a checkpoint; its 16-bit file between goes again."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [kind for kind in GGUF_TYPES if not (folder / f"{kind}.gguf").exists()]
    if not missing:
        return
    full = folder / "F16.gguf"
    if not full.exists():
        write_checkpoint(shape, checkpoint)
        _write_full(checkpoint, shape, full)
    for kind in missing:
        _quantize(full, folder / f"{kind}.gguf", kind)
    full.unlink()


def _quantize(source: Path, target: Path, kind: str) -> None:
    import llama_cpp as cpp

    settings = cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings):
        raise RuntimeError(f"llama.cpp: cannot quantize {source} to {kind}")


NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    """GGUF's name of one of transformers' tensors."""
    if name in NAMES:
        return NAMES[name]
    _, _, block, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{block}.{NAMES[module]}.{kind}"


def _write_full(checkpoint: Path, shape: str, path: Path) -> None:
    import gguf
    from safetensors import safe_open

    config: Any = text_config(shape)
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no dict
                value = tensors.get_tensor(name)
                plain = value.dim() == 1  # llama.cpp wants norms and biases in 32 bits
                writer.add_tensor(_gguf_name(name), value.float().numpy().astype(np.float32 if plain else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
