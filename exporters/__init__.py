"""Export of converted models to ONNX: node specs, function bodies, passes and flavours."""
