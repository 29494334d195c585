"""A model family as data: where its blocks are, which linears share an input, how images enter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One activation and the linears that read it (names relative to the block)."""

    name: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class ModelAdapter:
    """What the pipeline must know of a model type; module paths are those of the transformers class.

    The fields of a text-only family that speak of vision stay empty.

    Attributes:
        model_type: `config.model_type`.
        model_class: the transformers auto class that loads it.
        language_model: module that maps inputs_embeds to hidden states.
        language_blocks: module list of its blocks.
        language_block: sites of one of them.
        final_norm: module between the last of them and `lm_head`.
        lm_head: the output projection.
        image_token_field: config field that holds the image token id.
        vision_encoder: module that maps pixel_values to hidden states.
        vision_blocks: module list of its blocks.
        vision_block: sites of one of them.
        patch_positions: embedding of the patches' positions, where the vision encoder works them out from a mask that
            says which patches hold pixels.
        patch_encoder: the part of the vision encoder that takes this mask.
        deepstack: module list of further projectors, one for each depth of the vision encoder whose features the first
            language blocks add to image tokens; they stay float.
        downsample_field: config field with the ratio by which neighbouring patches are folded into channels before the
            projector, where no module of the model does it.
        projector_module: module between the vision encoder and the language model.
        projector: its linears.
        pixel_layout: how the processor lays out pixel_values: "images" [images, 3, height, width], "tiles" [chats,
            tiles, 3, height, width]; with the pictures' sizes beside them "anyres" [pictures, tiles, 3, height, width]
            or "patches" [patches, channels]; see `splitq_edge.image_layout`.
        line_end: anyres: parameter with the row that ends every line of a picture.
        bidirectional: which tokens see each other beside those before them: "" none, "image" those of one picture,
            "prompt" all of the prompt.
        token_types: input of the transformers model that tells image tokens (1) from text (0), if it has one; where
            `bidirectional` is "prompt", what follows the prompt (1) from the prompt.
        mrope: whether the language model's positions have three axes (`splitq_edge.mrope`).
        chat_template: Jinja template of chats where the family's checkpoints have none.
        image_only_processor: transformers class that is loaded as the family's processor, without its half for videos
            where it has one: that needs torchvision, here and where the exported folder runs. It may be another
            family's that makes the same inputs of text and images.
        genai_type: model type under which onnxruntime-genai runs the exported graphs; another than `model_type` is a
            borrowed one of the same parts.
        transformers_js: whether transformers.js knows the model type and gives its pictures to the exported graphs.
    """

    model_type: str
    language_model: str
    language_blocks: str
    language_block: tuple[Site, ...]
    final_norm: str
    lm_head: str = "lm_head"
    model_class: str = "AutoModelForImageTextToText"
    image_token_field: str = ""
    vision_encoder: str = ""
    vision_blocks: str = ""
    vision_block: tuple[Site, ...] = ()
    patch_positions: str = ""
    patch_encoder: str = ""
    deepstack: str = ""
    downsample_field: str = ""
    projector_module: str = ""
    projector: tuple[str, ...] = ()
    pixel_layout: str = ""
    line_end: str = ""
    bidirectional: str = ""
    token_types: str = ""
    mrope: bool = False
    chat_template: str = ""
    image_only_processor: str = ""
    genai_type: str = ""
    transformers_js: bool = False

    def site_name(self, block: int, site: Site) -> str:
        """Name of a language site in plans, files and messages: "layers.3.attn_in"."""
        return f"layers.{block}.{site.name}"

    def claims(self, linear: str) -> list[str]:
        """What claims a linear (its dotted name): exactly one entry when the adapter fits the model."""
        hits = [linear] if linear in self.projector or linear == self.lm_head else []
        if self.deepstack and linear.startswith(self.deepstack + "."):
            hits.append(self.deepstack)
        for prefix, sites in (
            (self.vision_blocks, self.vision_block),
            (self.language_blocks, self.language_block),
        ):
            head, _, tail = linear.removeprefix(prefix + ".").partition(".")
            if linear.startswith(prefix + ".") and head.isdigit():
                hits += [site.name for site in sites if tail in site.linears]
        return hits
