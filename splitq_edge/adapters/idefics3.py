"""Idefics3, and the first SmolVLM checkpoints, which have its model type: SmolVLM's modules under other classes."""

from dataclasses import replace

from splitq_edge.adapters import smolvlm

ADAPTER = replace(smolvlm.ADAPTER, model_type="idefics3", image_only_processor="")
