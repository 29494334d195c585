"""With every quantizer off a quantized block is the float block; where quantization loses nothing, so is the op."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from builders import chat_batches, no_split, random_plan, rng, run_site, site_engines, tiny_loaded
from torch import nn

from splitq_edge.calibration.activations import ActivationStore
from splitq_edge.calibration.block_inputs import BlockBatch, block_output, first_block_inputs, padded_batches
from splitq_edge.calibration.runner import replace_linears
from splitq_edge.config import CorrectionConfig, QuantConfig
from splitq_edge.learning.site import TrainableGroup, TrainableSite
from splitq_edge.loading import LoadedModel
from splitq_edge.modality import ModalityContext
from splitq_edge.modules.split_linear import Correction, GroupWeights, SplitLinear
from splitq_edge.parallel import Processes
from splitq_edge.quant.transforms import orthogonal_start
from splitq_edge.splitting.plan import outlier_width

TOLERANCE = 1e-5  # of the largest output


@dataclass(frozen=True)
class Parts:
    """Which components a site has."""

    split: bool
    transform: str
    cws: bool
    mac: str  # text, all or off
    scale: bool

    def __str__(self) -> str:
        names = ["split" * self.split, self.transform, "cws" * self.cws, f"mac_{self.mac}", "scale" * self.scale]
        return "-".join(filter(None, names))

    def config(self) -> QuantConfig:
        ratios = (0.1 if self.cws else 0, 0 if self.mac == "off" else 0.2)
        correction = CorrectionConfig(*ratios, mac_rows="all" if self.mac == "all" else "text")
        return no_split(bits=3, activation_bits=3, transform=self.transform, correction=correction)


ALL_PARTS = [
    Parts(*values)
    for values in itertools.product(
        (True, False), ("hadamard", "identity"), (True, False), ("text", "all", "off"), (True, False)
    )
]
FULL = Parts(split=True, transform="hadamard", cws=True, mac="text", scale=True)
TRACED = [
    FULL,
    Parts(split=False, transform="identity", cws=False, mac="all", scale=True),
]


@cache
def float_block() -> tuple[LoadedModel, BlockBatch, torch.Tensor, torch.Tensor]:
    """The tiny LLaVA, two padded chats as its first decoder block receives them, hidden states in and out."""
    loaded = tiny_loaded()
    batches = padded_batches(chat_batches(2), 2, 0, Processes(alone=True))
    inputs = first_block_inputs(loaded, batches, ActivationStore(Path("unused")))
    batch, hidden = inputs.batch(0), inputs.get("float", 0)
    with torch.no_grad():
        return loaded, batch, hidden, block_output(loaded.block(0), hidden, batch, loaded.context)


def disturb(site: TrainableSite, *, scale: bool) -> None:
    """Moves the parameters as far as learning does; the channel scale only where the case has one."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(site.named_parameters()):
            amount = {"log_scale": 0.5 if scale else 0.0}.get(name, 0.2)
            parameter.add_(torch.randn(parameter.shape, generator=rng(number)), alpha=amount)


def block_without_quantizers(parts: Parts) -> tuple[nn.Module, list[TrainableSite]]:
    """The first block with sites of these components in place of its linears."""
    loaded, *_ = float_block()
    block = loaded.block(0)
    sites = []
    for number, spec in enumerate(loaded.adapter.language_block):
        linears: dict[str, Any] = {path: block.get_submodule(path) for path in spec.linears}
        channels = next(iter(linears.values())).in_features
        total = outlier_width(channels, 0.05, balanced=parts.transform != "identity") if parts.split else 0
        plan = random_plan(channels, total // 2, total - total // 2, seed=number)
        site = TrainableSite(spec.name, list(linears.values()), plan, parts.config(), loaded.context)
        disturb(site, scale=parts.scale)
        site.quantize = False
        sites.append(site)
        replace_linears(block, site, {path: linear.out_features for path, linear in linears.items()})
    return block.requires_grad_(False), sites


def worst(got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def error(block: nn.Module) -> float:
    """Largest difference from the float block over its largest output; padding counts too."""
    loaded, batch, hidden, expected = float_block()
    with torch.no_grad():
        return worst(block_output(block, hidden, batch, loaded.context).numpy(), expected.numpy())


@pytest.mark.parametrize("parts", ALL_PARTS, ids=str)
def test_block_without_quantizers_is_the_float_block(parts: Parts) -> None:
    block, sites = block_without_quantizers(parts)
    assert {bool(site.cws_rank) for site in sites} == {parts.cws}
    assert {bool(site.mac_rank) for site in sites} == {parts.mac != "off"}
    assert {len(site.groups) for site in sites} == {3 if parts.split else 1}
    assert error(block) < TOLERANCE


def test_with_quantizers_the_same_block_is_another() -> None:
    # What the test above is worth: at 3 bits the difference is four orders of magnitude above its tolerance.
    block, sites = block_without_quantizers(FULL)
    for site in sites:
        site.quantize = True
    assert error(block) > 0.05


@pytest.mark.parametrize("damage", ["inverse", "scale", "order"])
def test_a_component_that_is_one_thousandth_off_is_noticed(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block, sites = block_without_quantizers(FULL)
    site = sites[0]
    if damage == "inverse":
        untransform = TrainableGroup.untransform
        monkeypatch.setattr(TrainableGroup, "untransform", lambda *given: untransform(*given) * 1.001)
    elif damage == "scale":
        scaled = TrainableSite._scaled_weight
        monkeypatch.setattr(TrainableSite, "_scaled_weight", lambda own: scaled(own) * 1.001)
    else:
        site._permuted = site._permuted.roll(1, 0)
    assert error(block) > 10 * TOLERANCE


# After export: the same block in ONNX Runtime


class FixedMatrix(nn.Module):
    """P and its inverse as constants: ONNX has no operator that solves equations, and exports need none."""

    def __init__(self, matrices: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self.p, self.inverse = (nn.Buffer(matrix.detach().clone()) for matrix in matrices)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.p, self.inverse


class BlockGraph(nn.Module):
    """The block on one batch: hidden states [batch, sequence, hidden] in and out, everything else constant."""

    def __init__(self, block: nn.Module, batch: BlockBatch, context: ModalityContext) -> None:
        super().__init__()
        self.block, self.batch, self.context = block, batch, context

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return block_output(self.block, hidden, self.batch, self.context)


@pytest.mark.slow
@pytest.mark.parametrize("parts", TRACED, ids=str)
def test_block_without_quantizers_traced_to_onnx_is_the_float_block(parts: Parts) -> None:
    from splitq_edge.exporters.onnx_export import trace

    loaded, batch, hidden, expected = float_block()
    block, sites = block_without_quantizers(parts)
    for site in sites:
        for group in site.groups.values():
            for name in ("p1", "p2"):
                if getattr(group, name) is not None:
                    setattr(group, name, FixedMatrix(getattr(group, name)()))
    graph = BlockGraph(block, batch, loaded.context)
    with torch.no_grad():
        model = trace(graph, {"hidden": hidden}, input_names=["hidden"], output_names=["y"], dynamic={"hidden": {}})
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"hidden": hidden.numpy()})
    keep = batch.keep.numpy()  # a padding token attends to nothing, and the engines differ in what that gives
    assert worst(y[keep], expected.numpy()[keep]) < TOLERANCE


# The op itself on numbers that quantization leaves alone. Activations are made behind P: whole numbers with a largest
# magnitude of 127 in every row and group, so the 8-bit step is 1. P has entries of +-2^-k, so the way back to x and the
# way through the op are exact, and so are all sums: they stay below 2^24 steps.

EXACT = {"main": (256, 16, 16), "text": (16, 4, 4), "vision": (16, 4, 4)}  # channels, factors
OUTPUTS, RANK, TOKENS = 20, 4, 6
ROWS = torch.tensor([[0, 1, 0], [1, 1, 0]], dtype=torch.int8)


@dataclass(frozen=True)
class Lossless:
    """A site, the activation [2, 3, K] that it reads, and the float weight [K, N] and bias [N] that it stands for."""

    site: SplitLinear
    x: torch.Tensor
    weight: np.ndarray[Any, Any]
    bias: np.ndarray[Any, Any]

    @property
    def expected(self) -> np.ndarray[Any, Any]:
        return self.x.double().numpy() @ self.weight + self.bias


def whole(*shape: int, top: int, seed: int) -> torch.Tensor:
    return torch.randint(-top, top + 1, shape, generator=rng(seed)).float()


def lossless(parts: Parts, *, low_bit: bool = False) -> Lossless:
    """Every component of `parts` with whole numbers in it.

    `low_bit` gives main activations of 4 bits with a step of 256: what they lose lies in four channels, on an 8-bit
    grid of step 1, and MAC's factors are the main weight of those channels, so MAC gives it back to the last bit.
    """
    context = ModalityContext()
    names = list(EXACT) if parts.split else ["main"]
    groups, rows, weights = {}, [], []
    correction = None
    for seed, name in enumerate(names):
        width, a, b = EXACT[name]
        activation = whole(TOKENS, width, top=126, seed=seed)
        activation[:, 7] = 127
        codes = whole(width, OUTPUTS, top=100, seed=10 + seed)
        target = codes.clone()  # the float weight behind P^-1
        low = low_bit and name == "main"
        if low:
            activation = 256 * whole(TOKENS, width, top=7, seed=seed)
            activation[:, 7] = 256 * 7
            residual = whole(TOKENS, RANK, top=127, seed=20)
            residual[:, 0] = 127
            activation[:, :RANK] = 256 * whole(TOKENS, RANK, top=6, seed=21) + residual
        if name == "main" and (parts.cws or parts.mac != "off"):
            v = whole(RANK, OUTPUTS, top=7, seed=30)
            gate = torch.tensor([1.0, 3.0, 1.0, 2.0])
            product = torch.zeros(width, OUTPUTS)
            product[:RANK] = gate[:, None] * v
            if parts.cws:  # the codes hold what is left
                target = codes + product
                # The vector between U and V is gate * activation of the first four channels: 127 at most, and reached.
                activation[:, :RANK] = (activation[:, :RANK] / gate.clamp(min=2)).round()
                activation[:, 0] = 127
            u = torch.zeros(width, RANK)
            u[:RANK] = torch.eye(RANK)
            correction = Correction(
                u.to(torch.int8),
                torch.ones(RANK),
                v.to(torch.int8),
                torch.ones(OUTPUTS),
                gate if parts.cws else gate[:0],
                gate[:0] if parts.mac == "off" else torch.tensor([1.0, 1.0, 1.0, 1.0]) if low else gate,
                bits=4,
                residual_bits=8,
                mac_rows="all" if parts.mac == "all" else "text",
            )
            if low:  # gates of one keep the vector between U and V within 127
                codes[:RANK] = target[:RANK] = v
        p1, p2 = (orthogonal_start(a), orthogonal_start(b)) if parts.transform == "hadamard" else (None, None)
        p = torch.eye(width) if p1 is None or p2 is None else torch.kron(p1, p2)
        groups[name] = GroupWeights(codes.to(torch.int8), torch.ones(OUTPUTS), p1, p2, 8, 4 if low else 8)
        rows.append(activation @ p.T)  # x_g = A P^-1
        weights.append(p.double() @ target.double())  # W_g = P B
    channels = sum(EXACT[name][0] for name in names)
    order = torch.randperm(channels, generator=rng(40))
    scale = 2.0 ** torch.randint(-2, 3, (channels,), generator=rng(41)).float() if parts.scale else torch.ones(channels)
    x, weight = torch.empty(TOKENS, channels), torch.empty(channels, OUTPUTS, dtype=torch.float64)
    x[:, order] = torch.cat(rows, -1) / scale
    weight[order] = torch.cat(weights) * scale[:, None]
    bias = whole(OUTPUTS, top=50, seed=42)
    site = SplitLinear(
        "site",
        order=order.to(torch.int32),
        groups=groups,
        context=context,
        correction=correction,
        bias=bias,
        channel_scale=scale if parts.scale else None,
    )
    return Lossless(site, x.reshape(2, 3, channels), weight.numpy(), bias.numpy())


@pytest.mark.parametrize("packed", [False, True], ids=["portable", "packed"])
@pytest.mark.parametrize("parts", ALL_PARTS, ids=str)
def test_op_that_loses_nothing_is_the_float_linear_to_the_last_bit(parts: Parts, packed: bool) -> None:
    case = lossless(parts)
    with case.site.context.using(ROWS):
        np.testing.assert_array_equal(case.site(case.x).numpy(), case.expected)
    for engine in site_engines():
        y = run_site(case.site, case.x, ROWS, packed=packed, native=engine == "native")
        np.testing.assert_array_equal(y, case.expected, err_msg=engine)


@pytest.mark.parametrize("transform", ["hadamard", "identity"])
@pytest.mark.parametrize("rows", ["text", "all"])
def test_mac_gives_back_what_low_bit_activations_lose_on_its_rows(rows: str, transform: str) -> None:
    parts = Parts(split=True, transform=transform, cws=False, mac=rows, scale=True)
    case = lossless(parts, low_bit=True)
    off = replace(case.site.correction, gate_mac=torch.zeros(RANK)) if case.site.correction else None
    compensated = (ROWS == 0).numpy() if rows == "text" else np.ones(ROWS.shape, bool)
    for engine in site_engines():
        y = run_site(case.site, case.x, ROWS, packed=False, native=engine == "native")
        np.testing.assert_array_equal(y[compensated], case.expected[compensated], err_msg=engine)
        assert (np.abs(y - case.expected).max(-1)[~compensated] > 1).all(), engine
    case.site.correction = off
    y = run_site(case.site, case.x, ROWS, packed=False, native=False)
    assert (np.abs(y - case.expected).max(-1) > 1).all()
