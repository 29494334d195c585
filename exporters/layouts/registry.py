"""The folder layouts by name."""

from splitq_edge.adapters.adapter import ModelAdapter
from splitq_edge.config import QuantConfig
from splitq_edge.exporters.layouts.genai import CACHE_BITS, Genai
from splitq_edge.exporters.layouts.layout import Flat, Layout
from splitq_edge.exporters.layouts.onnx_community import OnnxCommunity

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Genai(), OnnxCommunity(), Flat())}


def default_layout(adapter: ModelAdapter, config: QuantConfig | None) -> str:
    """genai where onnxruntime-genai knows the model type itself and can run the export, else flat."""
    known = adapter.genai_type == adapter.model_type
    passed_on = config is None or config.kv_cache_bits in CACHE_BITS
    return Genai.name if known and passed_on else Flat.name


def layout_named(name: str) -> Layout:
    """The layout of this name, one of `LAYOUTS`."""
    return LAYOUTS[name]
