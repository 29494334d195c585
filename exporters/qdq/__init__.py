"""The flavour `qdq`: static graphs of plain QuantizeLinear and DequantizeLinear, for NPUs (docs/targets.md)."""
