"""SplitQ low-bit quantization of vision-language models, exported to ONNX."""

__version__ = "0.1.0"
