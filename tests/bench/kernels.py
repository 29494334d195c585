"""Time the quantized linear layers in ONNX Runtime, beside its own and llama.cpp's, in one interleaved run.

    bash tests/bench/peers/build.sh python build/peers
    python tests/bench/kernels.py --native build/peers/cmake/libbench_peers.so --json build/bench/kernels.json

A case is a model of several equal layers with their own copies of the weights, together larger than the caches, as a
decoder pass through a whole model finds them. Every round runs every case once in turn, so that all see the same
machine; the time of a case is the median over the rounds, activation quantization included: processor time with one
thread, elapsed time with more. ONNX Runtime's threads are kept on a processor each then, llama.cpp's run where the
system puts them.

Our cases of one channel group are compared with plain integer arithmetic before anything is timed, llama.cpp's with the
product of their rounded weights; the whole SplitQ layers are not (tests/parity does that), and their bytes count the
main weight as if it had all channels. Without --native llama.cpp's cases and the integer peak are left out.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime as ort
from ggml import GgmlLayer, NativeLibrary
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from splitq_edge import runtime_ops
from splitq_edge.commands.doctor import native_isa
from splitq_edge.config import preset
from splitq_edge.exporters.joined_constants import is_weight, join_constants
from splitq_edge.exporters.nodes import DOMAIN, SplitQLinearSpec, make_node, weight_initializer
from splitq_edge.quant.transforms import transform_shape
from splitq_edge.runtime_ops.page_cache import read_through
from splitq_edge.splitting.plan import outlier_width

WEIGHTS = "weights.bin"
TRANSFORM_WIDTH = preset("W4A8").transform_width  # of all presets
MICROSOFT = "com.microsoft"
COLD_BYTES = 160e6
LEAST_WEIGHTS = 1 << 16  # of a shape: as many copies of a smaller one as are cold would take minutes to build
SHAPES = "576x960,576x3072,1536x576,2048x2048,2048x8192,8192x2048,4096x4096,4096x14336"
TOLERANCE = 1e-5  # relative, of float sums in another order
GGML_TOLERANCE = 0.02  # relative, of activations quantized by blocks to 8 bits
COLD_ROWS = 16  # with more, a layer's weight is read once for so much work that two copies will do
SETTLE_S = 0.1  # several threads: two new ones that nobody keeps apart share a processor for tens of milliseconds
LINE = 64  # bytes of a cache line
LARGE = 2048  # input and output channels
OWN_PEERS = ("W4A8", "W3A8", "W3A3")  # layers of ours that the others are compared with as well


@dataclass(frozen=True)
class Case:
    """A kind of layer.

    Attributes:
        name: as it is printed.
        wbits: bits of the weight, 32 for float.
        abits: bits of the activation.
        group: input channels a scale, 0 for one scale an output channel.
        build: makes the nodes and initializers of one copy: (K, N, copy) -> nodes, initializers; None for llama.cpp's.
        peer: whether others made it.
        ggml: llama.cpp's name of the weight's type.
        repacked: whether llama.cpp is to store it in its order for this processor.
    """

    name: str
    wbits: int
    abits: int
    group: int
    build: Callable[[int, int, int], tuple[list[onnx.NodeProto], list[TensorProto]]] | None
    peer: bool = True
    ggml: str = ""
    repacked: bool = False

    def weight_bytes(self, k: int, n: int) -> float:
        """Bytes of one copy's weight and scales."""
        return k * n * self.wbits / 8 + (4 * n * (k / self.group) if self.group else 4 * n if self.wbits < 32 else 0)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@lru_cache(maxsize=4)
def codes(k: int, n: int, bits: int) -> np.ndarray:
    return rng(k, n, bits).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (k, n), dtype=np.int8)


@lru_cache(maxsize=1)
def packed_codes(k: int, n: int, bits: int, group: int) -> bytes:
    return bytes(weight_initializer("w", codes(k, n, bits), bits, True, group).SerializeToString())


def packed_weight(name: str, k: int, n: int, bits: int, group: int) -> TensorProto:
    tensor = TensorProto.FromString(packed_codes(k, n, bits, group))
    tensor.name = name
    return tensor


@lru_cache(maxsize=1)
def random_bytes(*shape: int) -> np.ndarray:
    return rng(*shape).integers(0, 256, shape, dtype=np.uint8)


def made_unique(weight: np.ndarray, copy: int) -> np.ndarray:
    """The weight with the copy's number in its first bytes: ONNX Runtime keeps equal prepacked weights once."""
    weight = weight.copy()
    weight.reshape(-1).view(np.uint8)[:2] = copy % 256, copy // 256
    return weight


def scales(*shape: int) -> np.ndarray:
    return rng(*shape).random(shape, dtype=np.float32) * 0.01 + 0.001


def channel_order(widths: tuple[int, ...]) -> np.ndarray:
    """Channels drawn for each group, ascending as the split plan keeps them; int32."""
    groups = np.split(rng(*widths).permutation(sum(widths)), np.cumsum(widths)[:-1])
    return np.concatenate([np.sort(group) for group in groups]).astype(np.int32)


def ours(name: str, wbits: int, abits: int, *, group: int = 0) -> Case:
    """One channel group, no transform, no correction."""

    def build(k: int, n: int, copy: int) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
        spec = SplitQLinearSpec(
            K=k, N=n, group_widths=(k, 0, 0), bits=wbits, activation_bits=abits, block_size=group, packed=True
        )
        scale = scales(-(-k // group), n) if group else scales(n)
        tensors = [
            packed_weight(f"w{copy}", k, n, wbits, group),
            numpy_helper.from_array(scale, f"s{copy}"),
        ]
        inputs = {"x": "x", "weight_main": f"w{copy}", "scale_main": f"s{copy}"}
        return [make_node(spec, inputs, f"y{copy}", f"n{copy}")], tensors

    return Case(name, wbits, abits, group, build, peer=False)


def whole_splitq(name: str, wbits: int, abits: int) -> Case:
    """Transform, three channel groups, CWS and MAC on all rows, with the presets' ratios and widths."""

    @lru_cache(maxsize=1)
    def parts(k: int, n: int) -> tuple[SplitQLinearSpec, dict[str, bytes]]:
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
            "channel_order": numpy_helper.from_array(channel_order(widths)),
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
            blocks, a, b = transform_shape(width, TRANSFORM_WIDTH)
            p1 = np.tile(np.linalg.qr(rng(a).random((a, a)))[0], (blocks, 1))
            tensors[f"p1_{group}"] = numpy_helper.from_array(p1.astype(np.float32))
            tensors[f"p2_{group}"] = numpy_helper.from_array(np.linalg.qr(rng(b).random((b, b)))[0].astype(np.float32))
            tensors[f"weight_{group}"] = weight_initializer("w", codes(width, n, bits), bits, True)
            tensors[f"scale_{group}"] = numpy_helper.from_array(scales(n))
        short = {part: numpy_helper.to_array(tensor) for part, tensor in tensors.items() if not is_weight(part)}
        spec, constants = join_constants(spec, short)
        tensors = {part: tensor for part, tensor in tensors.items() if is_weight(part)}
        tensors["constants"] = numpy_helper.from_array(constants)
        return spec, {part: bytes(tensor.SerializeToString()) for part, tensor in tensors.items()}

    def build(k: int, n: int, copy: int) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
        spec, stored = parts(k, n)
        tensors = {part: TensorProto.FromString(data) for part, data in stored.items()}
        for part, tensor in tensors.items():
            tensor.name = f"{part}{copy}"
        inputs = {"x": "x"} | {part: tensor.name for part, tensor in tensors.items()}
        return [make_node(spec, inputs, f"y{copy}", f"n{copy}")], list(tensors.values())

    return Case(name, wbits, abits, 0, build, peer=False)


def matmul_nbits(bits: int, block: int) -> Case:
    """ONNX Runtime's weight-only layer, with int8 activations where it has them (accuracy_level 4)."""

    def build(k: int, n: int, copy: int) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
        blocks = -(-k // block)
        packed = random_bytes(n, blocks, block * bits // 8)
        tensors = [
            numpy_helper.from_array(made_unique(packed, copy), f"w{copy}"),
            numpy_helper.from_array(scales(n * blocks), f"s{copy}"),
        ]
        attributes = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": 4}
        inputs = ["x", f"w{copy}", f"s{copy}"]
        return [helper.make_node("MatMulNBits", inputs, [f"y{copy}"], domain=MICROSOFT, **attributes)], tensors

    return Case(f"MatMulNBits {bits} bits b{block}", bits, 8, block, build)


def matmul_integer(k: int, n: int, copy: int) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Dynamic int8 quantization, the integer product, and its scale."""
    tensors = [
        numpy_helper.from_array(made_unique(codes(k, n, 8), copy), f"w{copy}"),
        numpy_helper.from_array(scales(n), f"s{copy}"),
    ]
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], [f"q{copy}", f"qs{copy}", f"qz{copy}"]),
        helper.make_node("MatMulInteger", [f"q{copy}", f"w{copy}", f"qz{copy}"], [f"i{copy}"]),
        helper.make_node("Cast", [f"i{copy}"], [f"f{copy}"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"s{copy}", f"qs{copy}"], [f"m{copy}"]),
        helper.make_node("Mul", [f"f{copy}", f"m{copy}"], [f"y{copy}"]),
    ]
    return nodes, tensors


@lru_cache(maxsize=1)
def float_weight(k: int, n: int) -> np.ndarray:
    return rng(k, n).random((k, n), dtype=np.float32)


def matmul_float(k: int, n: int, copy: int) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    weight = float_weight(k, n)
    return [helper.make_node("MatMul", ["x", f"w{copy}"], [f"y{copy}"])], [
        numpy_helper.from_array(made_unique(weight, copy), f"w{copy}")
    ]


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
    Case("ggml Q4_0 repacked", 4, 8, 32, None, ggml="q4_0", repacked=True),
    Case("ggml Q4_K repacked", 4, 8, 32, None, ggml="q4_K", repacked=True),
    Case("ggml Q4_K", 4, 8, 32, None, ggml="q4_K"),
    Case("ggml Q3_K", 3, 8, 16, None, ggml="q3_K"),
    Case("ggml Q2_K", 2, 8, 16, None, ggml="q2_K", repacked=True),
)


def shapes_of(_context: click.Context, _option: click.Parameter, text: str) -> list[tuple[int, int]]:
    """K and N of every shape of an option."""
    try:
        found = [(int(k), int(n)) for k, n in (shape.split("x") for shape in text.split(","))]
    except ValueError:
        found = []
    if not found or min(k * n for k, n in found) < LEAST_WEIGHTS or min(min(shape) for shape in found) < 1:
        raise click.BadParameter(
            f"expected KxN with commas between, as {SHAPES}, of {LEAST_WEIGHTS} weights and more, got '{text}'"
        )
    return found


def numbers_of(_context: click.Context, _option: click.Parameter, text: str) -> list[int]:
    """The numbers of an option, 1 and more."""
    found = [int(number) if number.strip().isdecimal() else 0 for number in text.split(",")]
    if min(found) < 1:
        raise click.BadParameter(f"expected numbers from 1 on with commas between, got '{text}'")
    return found


def native_library(path: Path) -> NativeLibrary:
    """peers/build.sh's.

    Raises:
        click.ClickException: it is not there, or an old one.
    """
    try:
        return NativeLibrary(path)
    except (OSError, AttributeError) as error:
        raise click.ClickException(f"--native {path}: {error}; run tests/bench/peers/build.sh first") from error


@dataclass(frozen=True)
class Setting:
    """Where layers are timed: [M, K] times [K, N] on so many threads."""

    k: int
    n: int
    m: int
    threads: int
    cold: float  # bytes that the weights of all copies take together, at least

    def copies(self, case: Case) -> int:
        """Layers of a case's model."""
        if self.m > COLD_ROWS:
            return 2
        return max(2, int(np.ceil(self.cold / case.weight_bytes(self.k, self.n))))

    def x(self) -> np.ndarray:
        """[M, K] float32, from a whole cache line on, where a graph's own activations lie."""
        spare = np.empty(self.m * self.k + LINE // 4, np.float32)
        first = -spare.ctypes.data % LINE // 4
        x = spare[first : first + self.m * self.k].reshape(self.m, self.k)
        return rng(self.m, self.k).standard_normal(dtype=np.float32, out=x)


class Timed(ABC):
    """A case in a setting, ready to run."""

    def __init__(self, case: Case, setting: Setting) -> None:
        self.case, self.setting = case, setting
        self.copies = setting.copies(case)
        self.seconds: list[float] = []

    def run(self) -> None:
        """One pass over all copies; keeps the time of one."""
        clock = time.thread_time if self.setting.threads == 1 else time.perf_counter
        start = clock()
        self._run()
        self.seconds.append((clock() - start) / self.copies)

    def warm_up(self) -> None:
        """Passes that are not kept; with several threads until each of a new session's has a processor of its own."""
        end = time.perf_counter() + (SETTLE_S if self.setting.threads > 1 else 0.0)
        self._run()
        while time.perf_counter() < end:
            self._run()
        self.seconds.clear()

    def microseconds(self) -> float:
        """Median over the passes."""
        return statistics.median(self.seconds) * 1e6

    @abstractmethod
    def _run(self) -> None:
        """One pass over all copies."""

    @abstractmethod
    def check(self) -> None:
        """Compare the first copy's result with what it must be.

        Raises:
            click.ClickException: they differ.
        """


def processors(threads: int) -> list[int]:
    """A processor for each thread of a session, the first ones; none where there are too few or the system hides them.

    On processors with two threads a core the first two may be one core.
    """
    if threads == 1 or not hasattr(os, "sched_setaffinity"):
        return []
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[:threads] if len(allowed) >= threads else []


@contextmanager
def kept_on(processor: list[int]) -> Iterator[None]:
    """Keep this thread on a processor meanwhile; empty: wherever it is."""
    if not processor:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processor)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Sessions:
    """Sessions of the cases of one shape and number of threads, which take any number of rows.

    The weights lie in a file, as an export's do. What ONNX Runtime packs anew for its own layers it keeps in the
    process's own memory all the same.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[tuple[str, int], ort.InferenceSession] = {}

    def of(self, case: Case, setting: Setting) -> ort.InferenceSession:
        """The case's session with so many copies of the weights."""
        key = case.name, setting.copies(case)
        if key not in self.made:
            self.made[key] = self._load(case, setting)
        return self.made[key]

    def _load(self, case: Case, setting: Setting) -> ort.InferenceSession:
        k, n, copies = setting.k, setting.n, setting.copies(case)
        assert case.build is not None
        built = [case.build(k, n, copy) for copy in range(copies)]
        graph = helper.make_graph(
            [node for nodes, _ in built for node in nodes],
            case.name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])],
            [helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, ["M", n]) for copy in range(copies)],
            [tensor for _, tensors in built for tensor in tensors],
        )
        opsets = [helper.make_opsetid(*pair) for pair in (("", 21), (MICROSOFT, 1), (DOMAIN, 1))]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = setting.threads
        options.inter_op_num_threads = 1
        if others := processors(setting.threads)[1:]:
            numbers = ";".join(str(processor + 1) for processor in others)
            options.add_session_config_entry("session.intra_op_thread_affinities", numbers)
        options.log_severity_level = 3
        # Threads that wait spinning after a run would take the next layer's processor.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        runtime_ops.register(options)
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            file = Path(name, "model.onnx")
            onnx.save(model, file, save_as_external_data=True, location=WEIGHTS)
            read_through(file.with_name(WEIGHTS))
            return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


class OrtTimed(Timed):
    """A case that ONNX Runtime runs."""

    def __init__(self, case: Case, setting: Setting, sessions: Sessions) -> None:
        super().__init__(case, setting)
        self.session = sessions.of(case, setting)
        self.binding = self.session.io_binding()
        self.x = setting.x()
        self.binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(self.x))
        for copy in range(self.copies):
            y = ort.OrtValue.ortvalue_from_shape_and_type([setting.m, setting.n], np.float32)
            self.binding.bind_ortvalue_output(f"y{copy}", y)

    def run(self) -> None:
        """See `Timed`; each thread on a processor of its own: the system may leave two on one for a whole case."""
        with kept_on(processors(self.setting.threads)[:1]):
            super().run()

    def warm_up(self) -> None:
        """See `Timed`."""
        with kept_on(processors(self.setting.threads)[:1]):
            super().warm_up()

    def _run(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def check(self) -> None:
        """See `Timed`; only plain layers of ours are compared."""
        if self.case.peer or self.case.name.startswith("SplitQ"):
            return
        wanted = expected(self.case, self.x, self.setting.n)
        error = float(np.abs(self.binding.copy_outputs_to_cpu()[0] - wanted).max() / np.abs(wanted).max())
        if not error < TOLERANCE:
            raise click.ClickException(f"{self.case.name}: expected the oracle's result, got an error of {error:.2g}")


class GgmlTimed(Timed):
    """A case that llama.cpp runs."""

    def __init__(self, case: Case, setting: Setting, library: NativeLibrary) -> None:
        super().__init__(case, setting)
        self.layer = GgmlLayer(library, case.ggml, case.repacked, setting.x(), setting.n, self.copies, setting.threads)

    def _run(self) -> None:
        self.layer.run()

    def check(self) -> None:
        """See `Timed`."""
        error = self.layer.error()
        if not error < GGML_TOLERANCE:
            raise click.ClickException(f"{self.case.name}: expected its weights' product, got an error of {error:.2g}")


def start(case: Case, setting: Setting, sessions: Sessions, library: NativeLibrary | None) -> Timed | None:
    """The case, ready; None if it does not run here."""
    if not case.ggml:
        return OrtTimed(case, setting, sessions)
    if library is None:
        return None
    try:
        return GgmlTimed(case, setting, library)
    except ValueError:  # a shape or a processor that llama.cpp has no such form for
        return None


def expected(case: Case, x: np.ndarray, n: int) -> np.ndarray:
    """What a plain layer of ours must give, by integers (docs/ops.md)."""
    k = x.shape[1]
    top = 2 ** (case.abits - 1) - 1
    scale = np.abs(x).max(1, keepdims=True) / np.float32(top)
    q = np.clip(np.rint(x * (np.float32(1) / scale)), -top - 1, top).astype(np.float64)
    weight = codes(k, n, case.wbits).astype(np.float64)
    if case.group:
        weight = weight * np.repeat(scales(-(-k // case.group), n), case.group, axis=0)[:k]
    else:
        weight = weight * scales(n)
    return q @ weight * scale


@dataclass(frozen=True)
class Limits:
    """What the machine can do at best, measured.

    Attributes:
        gbps: 10^9 bytes a second from memory.
        gops: 10^9 int8 operations a second; 0 if either is unknown.
    """

    gbps: float
    gops: float

    def roofline(self, size: float, operations: float) -> float | None:
        """Seconds that a layer takes at least; None if that is unknown."""
        return max(size / self.gbps, operations / self.gops) / 1e9 if self.gops else None


def rows_of(timed: list[Timed], limits: Limits) -> Iterator[dict[str, object]]:
    """One row for each of our cases and each peer."""
    peers = [other for other in timed if other.case.peer or other.case.name in OWN_PEERS]
    for own in (each for each in timed if not each.case.peer):
        setting, us = own.setting, own.microseconds()
        size = own.case.weight_bytes(setting.k, setting.n)
        operations = 2.0 * setting.m * setting.k * setting.n
        best = limits.roofline(size, operations)
        row: dict[str, object] = {
            "case": own.case.name,
            "wbits": own.case.wbits,
            "abits": own.case.abits,
            "group": own.case.group,
            "K": setting.k,
            "N": setting.n,
            "M": setting.m,
            "threads": setting.threads,
            "us": round(us, 2),
            "gbps": round(size / us / 1e3, 2),
            "gops": round(operations / us / 1e3, 1),
            "roofline": None if best is None else round(best * 1e6 / us, 3),
        }
        for peer in peers:
            if peer is own:
                continue
            peer_us = peer.microseconds()
            yield row | {"peer": peer.case.name, "peer_us": round(peer_us, 2), "ratio": round(peer_us / us, 3)}


def geometric_means(rows: list[dict[str, object]], large: int) -> Table:
    """Ratios of the peers' times to ours over the shapes with K and N of `large` and more."""
    table = Table(title=f"geometric means over shapes of {large} x {large} and larger", title_justify="left", box=None)
    for name in ("layer", "peer", "M", "threads", "shapes", "peer's time / ours"):
        table.add_column(name, justify="left" if name in ("layer", "peer") else "right")
    ratios: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if min(int(str(row["K"])), int(str(row["N"]))) >= large:
            key = tuple(str(row[name]) for name in ("case", "peer", "M", "threads"))
            ratios.setdefault(key, []).append(float(str(row["ratio"])))
    for key, values in ratios.items():
        table.add_row(*key, str(len(values)), f"{statistics.geometric_mean(values):.2f}")
    return table


@click.command(help=__doc__)
@click.option("--shapes", default=SHAPES, show_default=True, callback=shapes_of, help="KxN, with commas between.")
@click.option("--rows", default="1,16,128,512", show_default=True, callback=numbers_of, help="M.")
@click.option("--threads", default="1,2", show_default=True, callback=numbers_of)
@click.option("--cases", default="", help="Only cases with one of these texts in their name.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1))
@click.option("--cold-mb", default=COLD_BYTES / 1e6, show_default=True, help="Weights of all copies together.")
@click.option("--native", type=click.Path(path_type=Path), help="libbench_peers.so of peers/build.sh.")
@click.option("--json", "path", type=click.Path(path_type=Path), default=Path("build/bench/kernels.json"))
def main(
    shapes: list[tuple[int, int]],
    rows: list[int],
    threads: list[int],
    cases: str,
    rounds: int,
    cold_mb: float,
    native: Path | None,
    path: Path,
) -> None:
    console = Console()
    wanted = [case for case in CASES if not cases or any(part in case.name for part in cases.split(","))]
    library = native_library(native) if native else None
    found: list[dict[str, object]] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    machine: dict[str, object] = {
        "onnxruntime": ort.__version__,
        "kernels": native_isa(runtime_ops.library_path()),
        "transform_width": TRANSFORM_WIDTH,
    }
    for count in threads:
        limits = Limits(library.read_gbps(count), library.peak_gops(count)) if library else Limits(0.0, 0.0)
        machine[f"limits_{count}"] = {"gbps": round(limits.gbps, 1), "gops": round(limits.gops)}
        console.print(f"{count} threads: {limits.gbps:.1f} GB/s from memory, {limits.gops:.0f} GOPS of int8")
        for k, n in shapes:
            sessions = Sessions(path.parent)
            for m in rows:
                setting = Setting(k, n, m, count, cold_mb * 1e6)
                timed = [each for case in wanted if (each := start(case, setting, sessions, library)) is not None]
                for each in timed:
                    each.run()
                    each.check()
                    each.warm_up()
                for _ in range(rounds):
                    for each in timed:
                        each.run()
                console.print(show(timed, setting))
                found += rows_of(timed, limits)
                lines = ",\n".join(json.dumps(row) for row in found)
                text = f'{{"schema": 1, "machine": {json.dumps(machine)}, "rows": [\n{lines}\n]}}\n'
                path.write_text(text, encoding="utf-8")
    console.print(geometric_means(found, LARGE))


def show(timed: list[Timed], setting: Setting) -> Table:
    """Times of all cases, and how much longer each takes than W4A8."""
    base = next((each.microseconds() for each in timed if each.case.name == "W4A8"), None)
    title = f"{setting.k} x {setting.n}, {setting.m} rows, {setting.threads} threads"
    table = Table(title=title, title_justify="left", box=None)
    for name in ("layer", "us", "GOPS", "of W4A8's time"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for each in timed:
        us = each.microseconds()
        ratio = f"{us / base:.2f}" if base else ""
        gops = 2 * setting.m * setting.k * setting.n / us / 1e3
        table.add_row(each.case.name, f"{us:.1f}", f"{gops:.0f}", ratio)
    return table


if __name__ == "__main__":
    main()
