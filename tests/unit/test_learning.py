"""Learned transforms, clips and gates: gradients, invertibility, and the step from training to integers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import calibrated, chat_batches, no_split, random_linears, random_plan, rng, tiny_loaded

from splitq_edge.calibration.activations import ActivationStore
from splitq_edge.calibration.block_inputs import BlockBatch, padded_batches
from splitq_edge.calibration.runner import Calibration
from splitq_edge.calibration.state import CalibrationState
from splitq_edge.config import CorrectionConfig, LearningConfig, QuantConfig, preset
from splitq_edge.convert import assemble
from splitq_edge.learning import reconstruct
from splitq_edge.learning.invertible import InvertibleMatrix
from splitq_edge.learning.reconstruct import token_weights
from splitq_edge.learning.site import TrainableSite, merged_weight
from splitq_edge.loading import LoadedModel
from splitq_edge.methods.scales import ScaleInputs
from splitq_edge.modality import ModalityContext
from splitq_edge.parallel import Processes
from splitq_edge.quant import rounding
from splitq_edge.quant.affine import dequantize_weight, quantize_rows, quantize_weight
from splitq_edge.quant.fake import fake_quantize_rows, fake_quantize_weight
from splitq_edge.quant.transforms import orthogonal_start

WIDTHS = (64, 8, 8)


def trainable(config: QuantConfig, *, seed: int = 0, outputs: tuple[int, ...] = (24, 12)) -> TrainableSite:
    channels = sum(WIDTHS)
    linears = random_linears(channels, outputs, bias=True, seed=seed)
    rows = torch.randn(40, channels, generator=rng(seed)) * (torch.rand(channels, generator=rng(seed)) + 0.5)
    inputs = ScaleInputs(merged_weight(linears), rows.abs().amax(0), rows[:20], rows[20:])
    plan = random_plan(channels, *WIDTHS[1:], seed=seed)
    return TrainableSite("site", linears, plan, config, ModalityContext(), inputs)


def disturb(site: TrainableSite, amount: float = 0.05) -> None:
    """Moves every parameter, as training would."""
    with torch.no_grad():
        for number, parameter in enumerate(site.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=rng(number)), alpha=amount)


@pytest.mark.parametrize("n", [1, 4, 5, 16, 31, 64])
def test_learned_matrix_times_its_inverse_is_the_identity(n: int) -> None:
    matrix = InvertibleMatrix(orthogonal_start(n))
    with torch.no_grad():
        for number, parameter in enumerate(matrix.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=rng(number)))
        p, inverse = matrix()
    torch.testing.assert_close(p @ inverse, torch.eye(n), atol=1e-5, rtol=0)
    assert torch.linalg.cond(p) < 60


def test_learned_matrix_begins_at_its_start() -> None:
    start = orthogonal_start(16)
    torch.testing.assert_close(InvertibleMatrix(start)()[0], start)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fake_quantization_of_rows_is_quantize_then_dequantize(bits: int, symmetric: bool) -> None:
    x = torch.randn(7, 33, generator=rng(1))
    codes, scale = quantize_rows(x, bits, clip=0.9, symmetric=symmetric)
    torch.testing.assert_close(fake_quantize_rows(x, bits, clip=0.9, symmetric=symmetric), codes * scale)


@pytest.mark.parametrize("group_size", [0, 16])
def test_fake_quantization_of_weights_is_quantize_then_dequantize(group_size: int) -> None:
    weight = torch.randn(40, 9, generator=rng(2))
    qweight, scale = quantize_weight(weight, 3, group_size=group_size, clip=0.8)
    expected = dequantize_weight(qweight, scale, group_size)
    torch.testing.assert_close(fake_quantize_weight(weight, 3, group_size=group_size, clip=0.8), expected)


def test_gradient_passes_inside_the_range_and_not_outside() -> None:
    x = torch.tensor([[0.3, -0.2, 1.0]], requires_grad=True)
    fake_quantize_rows(x, 4, clip=torch.tensor(0.5)).sum().backward()
    assert x.grad is not None
    assert x.grad[0, 0] == 1
    assert x.grad[0, 1] == 1
    # The largest value is clipped: it only moves the scale, 0.5 / 7 per unit, times the sum of the codes.
    codes = torch.round(torch.tensor([0.3, -0.2]) * (7 / 0.5)).sum() + 7
    mantissa = codes - (torch.tensor([0.3, -0.2]) * (7 / 0.5)).sum()
    torch.testing.assert_close(x.grad[0, 2], mantissa * 0.5 / 7, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mac_rows", ["all", "text"])
def test_gradients_reach_transforms_scales_clips_and_gates(mac_rows: str) -> None:
    config = no_split(bits=3, activation_bits=3, correction=CorrectionConfig(0.2, 0.4, mac_rows=mac_rows))
    site = trainable(config)
    disturb(site)
    x = torch.randn(2, 5, sum(WIDTHS), generator=rng(3))
    modality = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.int8)
    with site.context.using(modality):
        (site(x) - torch.randn(2, 5, 36, generator=rng(4))).square().sum().backward()
    for name, parameter in site.named_parameters():
        if parameter.numel() == 1 and not name.endswith("clip"):
            continue  # the rotation of a 1 x 1 factor has nothing to learn
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    kinds = site.parameter_groups()
    assert all(kinds.values())
    assert sum(len(group) for group in kinds.values()) == len(list(site.parameters()))


@pytest.mark.parametrize("scheme", ["W4A8", "W4A4", "W3A3", "W3A2"])
def test_frozen_site_answers_as_the_trained_one(scheme: str) -> None:
    site = trainable(preset(scheme))
    disturb(site)
    x = torch.randn(2, 5, sum(WIDTHS), generator=rng(5))
    modality = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.int8)
    frozen = site.freeze()
    with torch.no_grad(), site.context.using(modality):
        learned, integers = site(x), frozen(x)
    # Training leaves the 8-bit latent vector of the correction in float; a code on a boundary may tip too.
    error = (learned - integers).norm(dim=-1) / learned.norm(dim=-1)
    assert error.median() < 5e-3
    assert frozen.channel_scale is not None
    assert 0 < frozen.groups["main"].clip < 1


def test_loss_caps_tokens_with_huge_updates_and_ignores_padding() -> None:
    hidden = torch.zeros(1, 5, 2)
    target = torch.tensor([[[9.0, 9.0], [100.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.5, 0.5]]])
    keep = torch.tensor([[False, True, True, True, True]])
    modality = torch.tensor([[0, 0, 1, 0, 0]], dtype=torch.int8)
    batch = BlockBatch({}, modality, keep, torch.tensor([0]))
    weights = token_weights(batch, hidden, target)
    # kept energies 5000, 1, 1, 0.25: the lower median is 1
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.0, 1 / 5000, 1.0, 1.0, 1.0]))
    balanced = token_weights(batch, hidden, target, (0.5, 1.5))
    torch.testing.assert_close(balanced.flatten(), torch.tensor([0.0, 0.5 / 5000, 1.5, 0.5, 0.5]))


class Gated:
    """A site of gates alone, whose forward sees what was held last."""

    def __init__(self, *gates: torch.Tensor) -> None:
        self.gates = [torch.nn.Parameter(gate) for gate in gates]
        self.held: list[torch.Tensor] = []

    def parameter_groups(self) -> dict[str, list[torch.nn.Parameter]]:
        return {"gate": self.gates}

    @contextmanager
    def holding_weight(self) -> Iterator[None]:
        self.hold_again()
        yield
        self.held = []

    def hold_again(self) -> None:
        self.held = [gate.detach().clone() for gate in self.gates]


@pytest.mark.parametrize(
    ("learned", "optimum", "expected"),
    [
        (1.4, 1.3, 1.4),  # better than the start: stays, whatever may be better still
        (1.4, 1.18, 1.2),
        (1.4, 0.82, 0.8),
        (1.4, 1.0, 1.0),
    ],
)
def test_gates_that_lose_to_their_start_are_moved(
    learned: float, optimum: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare, site = Gated(torch.ones(0)), Gated(torch.full((2,), learned), torch.full((3,), 1.5))

    def error_of(moving: torch.Tensor, good: torch.Tensor) -> float:
        return 0.5 * float((moving - optimum).square().sum() + (good - 1.5).square().sum())

    def held_error(_task: object, scale: float, _numbers: object = None) -> float:
        assert scale == 0.5
        return error_of(*site.held)

    monkeypatch.setattr(reconstruct, "_held_error", held_error)
    found = reconstruct.settle_gates(SimpleNamespace(sites=[bare, site], inputs=range(3)), 0.5)  # type: ignore[arg-type]
    moving, good = (gate.detach() for gate in site.gates)
    torch.testing.assert_close(moving, torch.full((2,), expected))
    torch.testing.assert_close(good, torch.full((3,), 1.5))
    assert found == pytest.approx(error_of(moving, good))
    assert site.held == []


def samples_of(*lengths: int) -> list[dict[str, torch.Tensor]]:
    return [
        {"input_ids": torch.arange(1, n + 1)[None], "attention_mask": torch.ones(1, n, dtype=torch.long)}
        for n in lengths
    ]


def test_padded_batches_hold_every_token_once() -> None:
    batches = padded_batches(samples_of(5, 3, 4), 2, 0, Processes(alone=True))
    assert [tuple(batch.inputs["input_ids"].shape) for batch in batches] == [(2, 4), (1, 5)]
    assert batches[0].inputs["input_ids"].tolist() == [[0, 1, 2, 3], [1, 2, 3, 4]]
    assert batches[0].inputs["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert [batch.samples.tolist() for batch in batches] == [[1, 2], [0]]


def test_processes_share_the_same_batches_without_overlap() -> None:
    whole = padded_batches(samples_of(5, 3, 4), 2, 0, Processes(alone=True))
    parts = []
    for rank in range(2):
        process = Processes(alone=True)
        process.rank, process.size = rank, 2
        parts.append(padded_batches(samples_of(5, 3, 4), 2, 0, process))
    for number, batch in enumerate(whole):
        shares = [part[number] for part in parts]
        assert sorted(i for share in shares for i in share.samples.tolist()) == sorted(batch.samples.tolist())
        widths = {share.inputs["input_ids"].shape[1] for share in shares if share.inputs}
        assert widths == {batch.inputs["input_ids"].shape[1]}
    assert parts[1][1].inputs == {}


@pytest.mark.parametrize("balance", ["none", "mbq", "answers"])
def test_balance_is_of_no_matter_where_nothing_is_learned(balance: str, tmp_path: Path) -> None:
    config = replace(preset("W3A3"), learning=LearningConfig(epochs=0, balance=balance))
    quantized = calibrated(tiny_loaded(), config, chat_batches(2), tmp_path / balance)
    plain = replace(config, learning=LearningConfig(epochs=0))
    same = calibrated(tiny_loaded(), plain, chat_batches(2), tmp_path / "plain")
    assert quantized.reports == same.reports


@pytest.mark.slow
@pytest.mark.parametrize("propagate", ["float", "quantized"])
def test_learning_lowers_the_error_of_every_block_and_repeats(propagate: str, tmp_path: Path) -> None:
    errors = []
    for run in range(2):
        learning = LearningConfig(epochs=3, batch=2, propagate=propagate)
        config = replace(preset("W3A3"), learning=learning)
        quantized = calibrated(tiny_loaded(), config, chat_batches(), tmp_path / str(run), seed=1)
        results = [report["relative_error"] for report in quantized.reports]
        errors.append(results)
        assert results[0]["learned"] < 0.95 * results[0]["before"]
        assert all(result["learned"] <= result["before"] for result in results)
    assert errors[0] == errors[1]


def hidden_states(loaded: LoadedModel, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """What the last block gives, by batch."""
    with torch.no_grad(), loaded.modality_from_inputs():
        return [loaded.model(**batch, output_hidden_states=True).hidden_states[-1] for batch in batches]


@pytest.mark.parametrize("scheme", ["W4A4", "W3A2"])
def test_rounding_towards_outputs_takes_back_what_earlier_blocks_did(scheme: str, tmp_path: Path) -> None:
    batches = chat_batches(8)
    exact = hidden_states(tiny_loaded(), batches)
    errors = {}
    for how in ("gptq", "gptaq"):
        config = replace(preset(scheme), rounding=how, learning=LearningConfig(epochs=0))
        quantized = calibrated(tiny_loaded(), config, batches, tmp_path / how)
        found = hidden_states(quantized.loaded, batches)
        errors[how] = sum(float((y - e).square().sum()) for y, e in zip(found, exact, strict=True))
    assert errors["gptaq"] < 0.7 * errors["gptq"]


class Twice(Processes):
    """As if another process had the same samples."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


def test_rounding_towards_outputs_takes_the_samples_of_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Twice the matrices are the same regression, if both are summed and the rows do not count.
    monkeypatch.setattr(rounding, "FEW_ROWS", 1e9)
    config = replace(preset("W3A3"), rounding="gptaq", learning=LearningConfig(epochs=0))
    config = replace(config, correction=replace(config.correction, mac_rows="text"))
    found = []
    for processes in (Processes(alone=True), Twice(alone=True)):
        loaded, folder = tiny_loaded(), tmp_path / type(processes).__name__
        state = CalibrationState(folder, {})
        run = Calibration(loaded, config, state, ActivationStore(folder / "hidden"), 0, processes)
        run.run(chat_batches(6), finished=state.start(resume=False))
        found.append(assemble(loaded, config, state).sites)
    alone, twice = found
    for name, site in alone.items():
        for group, weights in site.groups.items():
            assert torch.equal(weights.qweight, twice[name].groups[group].qweight), (name, group)


def test_error_of_the_output_is_summed_over_weighted_rows() -> None:
    site = trainable(preset("W3A3"))
    disturb(site)
    site.quantize = False
    rows = torch.randn(2, 5, sum(WIDTHS), generator=rng(1))
    weights = torch.rand(2, 5, 1, generator=rng(3))
    # Nothing is rounded and twice the output is wanted: what is missing is A W, and so the sum A^T diag(w) A W.
    with torch.no_grad(), site.context.using(torch.zeros(2, 5, dtype=torch.int8)):
        with site.observing(weights, 2 * site.float_output(rows)):
            site(rows)
        exact = torch.cat([weight for _, weight in exact_groups(site)])
    hessian, cross = site.take_hessian(), site.take_cross()
    assert hessian is not None
    assert cross is not None
    torch.testing.assert_close(cross, hessian @ exact, atol=1e-3, rtol=1e-4)
    assert site.take_cross() is None


def exact_groups(site: TrainableSite) -> list[tuple[str, torch.Tensor]]:
    """P^-1 s W of every group, from the parts."""
    found = []
    for name, module in site.groups.items():
        group = site._group(name)
        assert group is module
        channels = site.order[group.place]
        scaled = site.weight[channels] * site.log_scale[channels].exp()[:, None]
        matrices = group.matrices()
        assert matrices is not None
        found.append((name, torch.kron(matrices[1], matrices[3]) @ scaled))
    return found
