"""Placeholder nodes -> the site in standard ops with dequantized integer weights and float activations.

Requires: `npu_forms`; `SitePart` placeholders, all parts of a site reading the same value.
Ensures: no placeholder is left. Each group of channels is gathered, transformed and multiplied by its own weight; where
a group's activation gets a range (and bits) of its own stands an Identity, which `insert_qdq` turns into a requantizing
pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from splitq_edge.errors import SplitQError
from splitq_edge.exporters.qdq.builder import Writer, replace
from splitq_edge.exporters.symbolic import DOMAIN, PLACEHOLDER
from splitq_edge.modules.split_linear import GROUPS, GroupWeights, SplitLinear
from splitq_edge.quant.transforms import block_diagonal

FACTOR_SUFFIX = ".factor"  # constants that are multiplied at 16 bits, not 8: Kronecker factors
EIGHT_BITS = "splitq.bits8"  # metadata of a node whose output has 8 bits


def lower_sites(model: ir.Model, sites: dict[str, SplitLinear], *, activation_bits: int) -> int:
    """Lower all placeholders in place.

    Args:
        model: traced graph.
        sites: its quantized sites by name.
        activation_bits: 16 or 8, of the groups' activations. At 16 bits the activation is not rounded noticeably, so
            MAC has nothing to compensate and is left out; at 8 it works on the rounding error of the main group.

    Returns:
        Number of sites.

    Raises:
        SplitQError: a site is missing from the graph or its parts read different values.
    """
    parts: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type == PLACEHOLDER:
            parts.setdefault(node.attributes["site"].as_string(), []).append(node)
    if set(parts) != set(sites):
        lost = sorted(set(sites) ^ set(parts))
        raise SplitQError(f"export: expected every quantized site in the traced graph, {lost[0]} differs")
    for name, nodes in parts.items():
        if any(tuple(part.inputs) != tuple(nodes[0].inputs) for part in nodes):
            raise SplitQError(f"export: {name}: expected its linears to read one value, they read several")
        _Lowering(model, sites[name], nodes, activation_bits).run()
    return len(parts)


class _Lowering:
    """One site."""

    def __init__(self, model: ir.Model, site: SplitLinear, parts: list[ir.Node], activation_bits: int) -> None:
        self.site = site
        self.parts = parts
        self.bits = activation_bits
        self.write = Writer(model, parts[0])
        x, *mask = parts[0].inputs
        assert x is not None
        assert x.shape is not None
        self.x = x
        self.text_rows = mask[0] if mask else None
        self.rows: tuple[int, ...] = tuple(int(size) for size in x.shape.numpy()[:-1])  # leading axes

    def run(self) -> None:
        total: ir.Value | None = None
        start = 0
        for name, width in zip(GROUPS, self.site.widths, strict=True):
            if not width:
                continue
            group = self.site.groups[name]
            full = self._group_rows(name, group, start, width)
            rows = self._requantize(full, f"{name}.activation", width)
            total = self._add(total, self._product(name, group, rows), name)
            if name == "main" and self.site.correction is not None:
                total = self._add(total, self._correction(full, rows), "correction")
            start += width
        assert total is not None
        if self.site.bias is not None:
            bias = self.write.constant(_numpy(self.site.bias), self._name("bias"))
            total = self._op("Add", [total, bias], "y", self.site.out_features)
        pieces = self._pieces(total)
        for part, piece in zip(self.parts, pieces, strict=True):
            replace(part.outputs[0], piece)
        self.write.model.graph.remove(self.parts, safe=True)

    def _group_rows(self, name: str, group: GroupWeights, start: int, width: int) -> ir.Value:
        """The group's channels of x, scaled and transformed; a transformed row lies in the order (b, a)."""
        site, rows = self.site, self.x
        channels = _numpy(site.order[start : start + width]).astype(np.int64)
        if width < site.in_features or (channels != np.arange(width)).any():
            index = self.write.constant(channels, self._name(f"{name}.channels"))
            rows = self._op("Gather", [rows, index], f"{name}.gathered", width, axis=len(self.rows))
        if site.channel_scale is not None:
            scale = self.write.constant(
                _numpy(site.channel_scale[start : start + width]), self._name(f"{name}.channel_scale")
            )
            rows = self._op("Mul", [rows, scale], f"{name}.scaled", width)
        if group.p1 is None or group.p2 is None:
            return rows
        a, b = group.p1.shape[0], group.p2.shape[0]
        rows = self._reshape(rows, f"{name}.matrix", (*self.rows, a, b))
        rows = self._factor(rows, _numpy(group.p2), f"{name}.p2", (*self.rows, a, b))
        leading = len(self.rows)
        rows = self.write.op(
            "Transpose",
            [rows],
            self._name(f"{name}.turned"),
            shape=(*self.rows, b, a),
            perm=[*range(leading), leading + 1, leading],
        )
        # One matrix with the blocks on its diagonal: QNN takes no product of five axes, nor a matrix for each block.
        rows = self._factor(rows, _numpy(block_diagonal(group.p1)), f"{name}.p1", (*self.rows, b, a))
        return self._reshape(rows, f"{name}.transformed", (*self.rows, width))

    def _factor(self, rows: ir.Value, factor: np.ndarray, name: str, shape: Sequence[int]) -> ir.Value:
        value = self.write.constant(factor, self._name(f"{name}{FACTOR_SUFFIX}"))
        return self.write.op("MatMul", [rows, value], self._name(name), shape=shape)

    def _reshape(self, rows: ir.Value, name: str, shape: Sequence[int]) -> ir.Value:
        target = self.write.constant(np.array(shape, np.int64), self._name(f"{name}.shape"))
        return self.write.op("Reshape", [rows, target], self._name(name), shape=shape)

    def _requantize(self, rows: ir.Value, name: str, width: int) -> ir.Value:
        """Where the group would else share its source's quantizer, or needs one of 8 bits."""
        producer = rows.producer()
        gathered = producer is not None and rows is not self.x and producer.op_type == "Gather"
        if self.bits != 8 and not gathered:
            return rows
        value = self._op("Identity", [rows], name, width)
        return self._eight_bits(value) if self.bits == 8 else value

    def _eight_bits(self, value: ir.Value) -> ir.Value:
        node = value.producer()
        assert node is not None
        node.metadata_props[EIGHT_BITS] = "1"
        return value

    def _product(self, name: str, group: GroupWeights, rows: ir.Value) -> ir.Value:
        codes, scale = _turned(_numpy(group.qweight), group), _numpy(group.scale)
        if scale.ndim > 1 and group.p1 is not None:
            raise SplitQError(
                f"{self.site.name}: expected one weight scale an output channel under a transform, got "
                f"group_size {self.site.group_size}; set group_size 0 in the recipe for --flavour qdq"
            )
        weight = self.write.weight(codes, scale, group.bits, self._name(f"{name}.weight"))
        return self._matmul(rows, weight, f"{name}.y", self.site.out_features)

    def _correction(self, full: ir.Value, rows: ir.Value) -> ir.Value:
        """CWS and, on 8-bit activations, MAC: two thin matrices each, the gate folded into the first."""
        c = self.site.correction
        assert c is not None
        main = self.site.groups["main"]
        rank = c.u.shape[1]
        u = _turned(_numpy(c.u), main)
        latent: ir.Value | None = None
        if c.gate_cws.numel():
            latent = self._matmul(rows, self._left(u, _numpy(c.gate_cws), "cws"), "cws.latent", rank)
        if c.gate_mac.numel() and self.bits == 8:
            rounded = self._op("Identity", [rows], "mac.rounded", self.site.widths[0])
            error = self._op("Sub", [full, rounded], "mac.residual", self.site.widths[0])
            mac = self._matmul(error, self._left(u, _numpy(c.gate_mac), "mac"), "mac.latent", rank)
            if self.text_rows is not None:
                mac = self._op("Mul", [mac, self.text_rows], "mac.text", rank)
            latent = self._add(latent, mac, "latent")
        if latent is None:
            return None  # type: ignore[return-value]
        right = self.write.weight(_numpy(c.v), _numpy(c.v_scale), 8, self._name("v"))
        return self._matmul(latent, right, "correction", self.site.out_features)

    def _left(self, u: np.ndarray, gate: np.ndarray, name: str) -> ir.Value:
        """U [K_m, R] with a branch's gate in its scale; columns that the branch does not use are zero."""
        c = self.site.correction
        assert c is not None
        codes, scale = np.zeros_like(u), _numpy(c.u_scale).copy()
        used = gate.size
        codes[:, :used] = u[:, :used] * np.where(gate < 0, -1, 1).astype(u.dtype)
        scale[:used] *= np.abs(gate)
        return self.write.weight(codes, np.maximum(scale, np.float32(1e-12)), 8, self._name(f"{name}.u"))

    def _matmul(self, rows: ir.Value, weight: ir.Value, name: str, width: int) -> ir.Value:
        """A product has the bits of its activation; what follows it has 16."""
        node = rows.producer()
        if node is None or EIGHT_BITS not in node.metadata_props:
            return self._op("MatMul", [rows, weight], name, width)
        product = self._eight_bits(self._op("MatMul", [rows, weight], f"{name}.8", width))
        return self._op("Identity", [product], name, width)

    def _add(self, total: ir.Value | None, term: ir.Value | None, name: str) -> ir.Value:
        if total is None or term is None:
            value = term if total is None else total
            assert value is not None
            return value
        return self._op("Add", [total, term], f"with.{name}", int(total.shape[-1]))  # type: ignore[index, arg-type]

    def _pieces(self, total: ir.Value) -> list[ir.Value]:
        """The linears' outputs out of the site's."""
        if len(self.parts) == 1:
            return [total]
        pieces, start = [], 0
        for part in self.parts:
            width = part.attributes["width"].as_int()
            linear = part.attributes["part"].as_string().rpartition(".")[2]
            ends = [
                self.write.constant(np.array([value], np.int64), self._name(f"{linear}.{what}"))
                for what, value in (("start", start), ("end", start + width), ("axis", len(self.rows)))
            ]
            pieces.append(self._op("Slice", [total, *ends], linear, width))
            start += width
        return pieces

    def _op(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, width: int, **attributes: int
    ) -> ir.Value:
        shape = (*self.rows, width)
        return self.write.op(op_type, inputs, self._name(name), shape=shape, **attributes)  # type: ignore[arg-type]

    def _name(self, name: str) -> str:
        return f"{self.site.name}.{name}"


def _turned(codes: np.ndarray, group: GroupWeights) -> np.ndarray:
    """Rows [a * b, ...] in the order (b, a) of a transformed activation; a of all blocks."""
    if group.p1 is None or group.p2 is None:
        return codes
    a, b = group.p1.shape[0], group.p2.shape[0]
    return np.ascontiguousarray(codes.reshape(a, b, -1).swapaxes(0, 1).reshape(codes.shape))


def _numpy(tensor: object) -> np.ndarray:
    return np.asarray(tensor.detach().cpu().numpy())  # type: ignore[attr-defined]
