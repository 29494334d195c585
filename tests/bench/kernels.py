"""Time the quantized linear layers in ONNX Runtime, beside what else runs there, in one interleaved run.

    python tests/bench/kernels.py --json build/bench/kernels.json

A case is a model of several equal layers with their own copies of the weights, together larger than the caches, as a
decoder pass through a whole model finds them. Every round runs every case once in turn, so that all see the same
machine; the time of a case is the median over the rounds, activation quantization included. Our
cases of one channel group are compared with plain integer arithmetic before anything is timed; the whole SplitQ layers
are not (tests/parity does that), and their bytes count the main weight as if it had all channels.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from splitq_edge import runtime_ops
from splitq_edge.exporters.nodes import DOMAIN, SplitQLinearSpec, make_node, weight_initializer
from splitq_edge.quant.transforms import factor_pair
from splitq_edge.splitting.plan import outlier_width

MICROSOFT = "com.microsoft"
COLD_BYTES = 160e6
SHAPES = "576x960,576x3072,1536x576,2048x2048,2048x8192,8192x2048,4096x4096,4096x14336"
TOLERANCE = 1e-5  # relative, of float sums in another order


@dataclass(frozen=True)
class Case:
    """A kind of layer.

    Attributes:
        name: as it is printed.
        wbits: bits of the weight, 32 for float.
        abits: bits of the activation.
        group: input channels a scale, 0 for one scale an output channel.
        build: makes the nodes and initializers of one copy: (K, N, copy) -> nodes, initializers, output name.
        peer: whether others made it.
    """

    name: str
    wbits: int
    abits: int
    group: int
    build: Callable[[int, int, int], tuple[list[onnx.NodeProto], list[TensorProto]]]
    peer: bool = True

    def weight_bytes(self, k: int, n: int) -> float:
        """Bytes of one copy's weight and scales."""
        return k * n * self.wbits / 8 + (4 * n * (k / self.group) if self.group else 4 * n if self.wbits < 32 else 0)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def codes(k: int, n: int, bits: int) -> np.ndarray:
    return rng(k, n, bits).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (k, n), dtype=np.int8)


def scales(*shape: int) -> np.ndarray:
    return rng(*shape).random(shape, dtype=np.float32) * 0.01 + 0.001


def ours(name: str, wbits: int, abits: int, *, group: int = 0) -> Case:
    """One channel group, no transform, no correction."""

    def build(k: int, n: int, copy: int) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
        spec = SplitQLinearSpec(
            K=k, N=n, group_widths=(k, 0, 0), bits=wbits, activation_bits=abits, block_size=group, packed=True
        )
        scale = scales(-(-k // group), n) if group else scales(n)
        tensors = [
            weight_initializer(f"w{copy}", codes(k, n, wbits), wbits, True, group),
            numpy_helper.from_array(scale, f"s{copy}"),
        ]
        inputs = {"x": "x", "weight_main": f"w{copy}", "scale_main": f"s{copy}"}
        return [make_node(spec, inputs, f"y{copy}", f"n{copy}")], tensors

    return Case(name, wbits, abits, group, build, peer=False)


def whole_splitq(name: str, wbits: int, abits: int) -> Case:
    """Transform, three channel groups, CWS and MAC on all rows, with the presets' ratios."""

    def build(k: int, n: int, copy: int) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
        outliers = outlier_width(k, 0.02)
        widths = (k - outliers, outliers // 2, outliers - outliers // 2)
        full = min(widths[0], n)
        cws, mac = (max(4, round(share * full / 4) * 4) for share in (0.02, 0.03))
        spec = SplitQLinearSpec(
            K=k,
            N=n,
            group_widths=widths,
            bits=wbits,
            activation_bits=abits,
            outlier_activation_bits=max(abits, 4),
            residual_bits=8 if abits == 8 else 4,
            cws_rank=cws,
            mac_rank=mac,
            mac_rows="all",
            channel_order=True,
            channel_scale=True,
            transforms=(True, True, True),
            activation_clip=True,
            packed=True,
        )
        tensors = {
            "channel_order": numpy_helper.from_array(rng(k).permutation(k).astype(np.int32)),
            "channel_scale": numpy_helper.from_array(np.ones(k, np.float32)),
            "activation_clip": numpy_helper.from_array(np.ones(3, np.float32)),
            "u": weight_initializer("u", codes(widths[0], mac, 4), 4, True),
            "u_scale": numpy_helper.from_array(scales(mac)),
            "v": weight_initializer("v", codes(mac, n, 4), 4, True),
            "v_scale": numpy_helper.from_array(scales(n)),
            "gate_cws": numpy_helper.from_array(np.ones(cws, np.float32)),
            "gate_mac": numpy_helper.from_array(np.ones(mac, np.float32)),
        }
        for group, width, bits in zip(("main", "text", "vision"), widths, (wbits, 4, 4), strict=True):
            a, b = factor_pair(width)
            tensors[f"p1_{group}"] = numpy_helper.from_array(np.linalg.qr(rng(a).random((a, a)))[0].astype(np.float32))
            tensors[f"p2_{group}"] = numpy_helper.from_array(np.linalg.qr(rng(b).random((b, b)))[0].astype(np.float32))
            tensors[f"weight_{group}"] = weight_initializer("w", codes(width, n, bits), bits, True)
            tensors[f"scale_{group}"] = numpy_helper.from_array(scales(n))
        for part, tensor in tensors.items():
            tensor.name = f"{part}{copy}"
        inputs = {"x": "x"} | {part: tensor.name for part, tensor in tensors.items()}
        return [make_node(spec, inputs, f"y{copy}", f"n{copy}")], list(tensors.values())

    return Case(name, wbits, abits, 0, build, peer=False)


def matmul_nbits(bits: int, block: int) -> Case:
    """ONNX Runtime's weight-only layer, with int8 activations where it has them (accuracy_level 4)."""

    def build(k: int, n: int, copy: int) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
        blocks = -(-k // block)
        packed = rng(k, n).integers(0, 256, (n, blocks, block * bits // 8), dtype=np.uint8)
        tensors = [
            numpy_helper.from_array(packed, f"w{copy}"),
            numpy_helper.from_array(scales(n * blocks), f"s{copy}"),
        ]
        attributes = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": 4}
        inputs = ["x", f"w{copy}", f"s{copy}"]
        return [helper.make_node("MatMulNBits", inputs, [f"y{copy}"], domain=MICROSOFT, **attributes)], tensors

    return Case(f"MatMulNBits {bits} bits b{block}", bits, 8, block, build)


def matmul_integer(k: int, n: int, copy: int) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Dynamic int8 quantization, the integer product, and its scale."""
    tensors = [numpy_helper.from_array(codes(k, n, 8), f"w{copy}"), numpy_helper.from_array(scales(n), f"s{copy}")]
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], [f"q{copy}", f"qs{copy}", f"qz{copy}"]),
        helper.make_node("MatMulInteger", [f"q{copy}", f"w{copy}", f"qz{copy}"], [f"i{copy}"]),
        helper.make_node("Cast", [f"i{copy}"], [f"f{copy}"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"s{copy}", f"qs{copy}"], [f"m{copy}"]),
        helper.make_node("Mul", [f"f{copy}", f"m{copy}"], [f"y{copy}"]),
    ]
    return nodes, tensors


def matmul_float(k: int, n: int, copy: int) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    weight = rng(k, n).random((k, n), dtype=np.float32)
    return [helper.make_node("MatMul", ["x", f"w{copy}"], [f"y{copy}"])], [numpy_helper.from_array(weight, f"w{copy}")]


CASES = (
    *(ours(f"W{w}A{a}", w, a) for w, a in ((8, 8), (4, 8), (3, 8), (2, 8), (4, 4), (3, 3))),
    *(ours(f"W4A8 g{group}", 4, 8, group=group) for group in (128, 32)),
    whole_splitq("SplitQ W4A8", 4, 8),
    whole_splitq("SplitQ W3A3", 3, 3),
    matmul_nbits(4, 128),
    matmul_nbits(4, 32),
    matmul_nbits(2, 64),
    Case("MatMulInteger", 8, 8, 0, matmul_integer),
    Case("MatMul fp32", 32, 32, 0, matmul_float),
)


class Timed:
    """A case at one shape, ready to run.

    Args:
        case: the kind of layer.
        k: input channels.
        n: output channels.
        m: rows.
        threads: intra-op threads.
        cold: bytes that the weights of all copies take together, at least.
    """

    def __init__(self, case: Case, k: int, n: int, m: int, threads: int, cold: float) -> None:
        self.case = case
        self.copies = max(2, int(np.ceil(cold / case.weight_bytes(k, n)))) if m <= 16 else 2
        built = [case.build(k, n, copy) for copy in range(self.copies)]
        outputs = [f"y{copy}" for copy in range(self.copies)]
        graph = helper.make_graph(
            [node for nodes, _ in built for node in nodes],
            case.name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", n]) for name in outputs],
            [tensor for _, tensors in built for tensor in tensors],
        )
        opsets = [helper.make_opsetid(*pair) for pair in (("", 21), (MICROSOFT, 1), (DOMAIN, 1))]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        runtime_ops.register(options)
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        self.x = rng(m, k).standard_normal((m, k), dtype=np.float32)
        self.binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(self.x))
        for name in outputs:
            self.binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_shape_and_type([m, n], np.float32))
        self.seconds: list[float] = []

    def run(self) -> None:
        """One pass over all copies; keeps the time of one."""
        start = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        self.seconds.append((time.perf_counter() - start) / self.copies)

    def microseconds(self) -> float:
        """Median over the passes."""
        return statistics.median(self.seconds) * 1e6

    def output(self) -> np.ndarray:
        """[M, N] of the first copy."""
        return self.binding.copy_outputs_to_cpu()[0]


def expected(case: Case, x: np.ndarray, n: int) -> np.ndarray:
    """What a plain layer of ours must give, by integers (docs/ops.md)."""
    k = x.shape[1]
    top = 2 ** (case.abits - 1) - 1
    scale = np.abs(x).max(1, keepdims=True) * np.float32(1 / top)
    q = np.clip(np.rint(x * (np.float32(1) / scale)), -top - 1, top).astype(np.float64)
    weight = codes(k, n, case.wbits).astype(np.float64)
    if case.group:
        weight = weight * np.repeat(scales(-(-k // case.group), n), case.group, axis=0)[:k]
    else:
        weight = weight * scales(n)
    return q @ weight * scale


def bandwidth(threads: int) -> float:
    """Bytes a second that so many threads read from memory."""
    parts = [np.ones(2**25, np.int64) for _ in range(threads)]  # 256 MB each
    with ThreadPoolExecutor(threads) as pool:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            times.append(time.perf_counter() - start)
    return sum(part.nbytes for part in parts) / min(times)


def rows_of(timed: list[Timed], k: int, n: int, m: int, threads: int, rate: float) -> Iterator[dict[str, object]]:
    """One row for each of our cases and each peer."""
    peers = [other for other in timed if other.case.peer]
    for own in (each for each in timed if not each.case.peer):
        us = own.microseconds()
        size = own.case.weight_bytes(k, n)
        row: dict[str, object] = {
            "case": own.case.name,
            "wbits": own.case.wbits,
            "abits": own.case.abits,
            "group": own.case.group,
            "K": k,
            "N": n,
            "M": m,
            "threads": threads,
            "us": round(us, 2),
            "gbps": round(size / us / 1e3, 2),
            "gops": round(2 * m * k * n / us / 1e3, 1),
            "roofline": round(size / rate * 1e6 / us, 3) if m == 1 else None,
        }
        for peer in peers:
            peer_us = peer.microseconds()
            yield row | {"peer": peer.case.name, "peer_us": round(peer_us, 2), "ratio": round(peer_us / us, 3)}


def check(timed: Timed, n: int) -> None:
    """Compare a plain case of ours with integer arithmetic.

    Raises:
        click.ClickException: they differ.
    """
    wanted = expected(timed.case, timed.x, n)
    error = float(np.abs(timed.output() - wanted).max() / np.abs(wanted).max())
    if not error < TOLERANCE:
        raise click.ClickException(f"{timed.case.name}: expected the oracle's result, got an error of {error:.2g}")


@click.command(help=__doc__)
@click.option("--shapes", default=SHAPES, show_default=True, help="KxN, with commas between.")
@click.option("--rows", default="1,16,128,512", show_default=True, help="M.")
@click.option("--threads", default="1,2", show_default=True)
@click.option("--cases", default="", help="Only cases with one of these texts in their name.")
@click.option("--rounds", default=15, show_default=True)
@click.option("--cold-mb", default=COLD_BYTES / 1e6, show_default=True, help="Weights of all copies together.")
@click.option("--json", "path", type=click.Path(path_type=Path), default=Path("build/bench/kernels.json"))
def main(shapes: str, rows: str, threads: str, cases: str, rounds: int, cold_mb: float, path: Path) -> None:
    console = Console()
    wanted = [case for case in CASES if not cases or any(part in case.name for part in cases.split(","))]
    found: list[dict[str, object]] = []
    for count in map(int, threads.split(",")):
        rate = bandwidth(count)
        console.print(f"{count} threads: {rate / 1e9:.1f} GB/s from memory")
        for shape in shapes.split(","):
            k, n = map(int, shape.split("x"))
            for m in map(int, rows.split(",")):
                timed = [Timed(case, k, n, m, count, cold_mb * 1e6) for case in wanted]
                for each in timed:
                    each.run()
                    if not each.case.peer and not each.case.name.startswith("SplitQ"):
                        check(each, n)
                    each.run()
                    each.seconds.clear()
                for _ in range(rounds):
                    for each in timed:
                        each.run()
                console.print(show(timed, k, n, m, count))
                found += rows_of(timed, k, n, m, count, rate)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"schema": 1, "rows": found}, indent=1) + "\n", encoding="utf-8")


def show(timed: list[Timed], k: int, n: int, m: int, threads: int) -> Table:
    """Times of all cases, and how much longer each peer takes than W4A8."""
    base = next((each.microseconds() for each in timed if each.case.name == "W4A8"), None)
    table = Table(title=f"{k} x {n}, {m} rows, {threads} threads", title_justify="left", box=None)
    for name in ("layer", "us", "GOPS", "of W4A8's time"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for each in timed:
        us = each.microseconds()
        ratio = f"{us / base:.2f}" if base else ""
        table.add_row(each.case.name, f"{us:.1f}", f"{2 * m * k * n / us / 1e3:.0f}", ratio)
    return table


if __name__ == "__main__":
    main()
