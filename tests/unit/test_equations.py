"""The equations of the SplitQ paper, each against a small example worked by hand or by plain numpy loops."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import no_split, random_linears, random_plan, rng
from torch import nn

from splitq_edge.calibration.activations import ActivationStore
from splitq_edge.calibration.block_inputs import BlockInputs, PaddedBatch
from splitq_edge.calibration.observer import SiteStats
from splitq_edge.config import CorrectionConfig, LearningConfig, QuantConfig, SplitConfig
from splitq_edge.correction.low_rank import U_CLIP
from splitq_edge.learning.reconstruct import BlockTask, block_error, learn_block
from splitq_edge.learning.site import TrainableSite
from splitq_edge.modality import ModalityContext
from splitq_edge.parallel import Processes
from splitq_edge.quant.affine import dequantize_weight
from splitq_edge.splitting.outliers import percentile_ranks, vision_scores, within_cluster_variance
from splitq_edge.splitting.plan import plan_split

Array = np.ndarray[Any, Any]
WIDTHS = (32, 4, 4)
OUTPUTS = 12
MODALITY = torch.tensor([0, 1, 0, 1, 1], dtype=torch.int8)
ALONE = Processes(alone=True)


# Eq. 3: what a block is learned for


class Factor(nn.Module):
    """A block that multiplies its input, and the "site" that learns the factor."""

    def __init__(self, start: float, slope: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(start))
        self.slope = slope  # 1 is the true derivative; -1 makes every step climb

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * (self.factor.detach() + self.slope * (self.factor - self.factor.detach()))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"transform": [self.factor], "clip": [], "gate": []}

    def holding_weight(self) -> AbstractContextManager[None]:
        return nullcontext()


def factor_task(tmp_path: Path, block: Factor, weights: tuple[float, float] = (1.0, 1.0)) -> BlockTask:
    """One sample of five tokens, the first of them padding; the float block triples its input.

    hidden  | padding | (1, 1) text | (2, 0) vision | (0, 1) text | (20, 0) text
    target  |         | (3, 3)      | (6, 0)        | (0, 3)      | (60, 0)
    energy, the mean over channels of (target - hidden)^2: 4, 8, 2, 800; their lower median is 4.
    weight, 1 / max(energy / 4, 1):                        1, 1/2, 1, 1/200.
    """
    hidden = torch.tensor([[[7.0, 7.0], [1.0, 1.0], [2.0, 0.0], [0.0, 1.0], [20.0, 0.0]]])
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    inputs = BlockInputs(ActivationStore(tmp_path / "activations"), torch.device("cpu"))
    batch = PaddedBatch({"input_ids": mask, "attention_mask": mask}, torch.tensor([0]))
    inputs.add(batch, [hidden], [{}], torch.tensor([[0, 0, 1, 0, 0]], dtype=torch.int8))
    inputs.put("target", 0, hidden * 3)
    sites: Any = [block]
    return BlockTask(block, sites, inputs, "float", ModalityContext(), ALONE, weights)


def test_eq_3_objective_is_the_weighted_squared_error_of_the_block_output(tmp_path: Path) -> None:
    # A factor of 2.5 misses by half of each input: squares 1/4 * (2, 4, 1, 400), weighted by 1, 1/2, 1, 1/200.
    task = factor_task(tmp_path, Factor(2.5))
    assert task.squared_error(0).item() == pytest.approx(0.5 + 0.5 + 0.25 + 0.5)
    # The unit: the energy of the float block's update, twice each input: 4 * (2, 4, 1, 400), same weights.
    assert block_error(task) == pytest.approx(1.75 / (8 + 8 + 4 + 8))


def test_eq_3_modality_weights_multiply_the_token_weights(tmp_path: Path) -> None:
    # Text errors 0.5, 0.25, 0.5 count 1.5 times, the vision error 0.5 half.
    task = factor_task(tmp_path, Factor(2.5), (1.5, 0.5))
    assert task.squared_error(0).item() == pytest.approx(1.5 * 1.25 + 0.5 * 0.5)


def test_eq_3_learning_reports_the_objective_before_and_after(tmp_path: Path) -> None:
    block = Factor(2.5)
    task = factor_task(tmp_path, block)
    result = learn_block(task, LearningConfig(epochs=5, transform_lr=0.1), rng())
    assert result.before == pytest.approx(1.75 / 28)
    # The error is quadratic in the distance of the factor from 3: at 2.5 it is 1.75 / 28.
    assert result.after == pytest.approx(1.75 / 28 * ((3 - block.factor.item()) / 0.5) ** 2, rel=1e-4)
    assert result.after < result.before


def test_eq_3_values_that_end_up_worse_are_thrown_away(tmp_path: Path) -> None:
    block = Factor(2.5, slope=-1.0)
    result = learn_block(factor_task(tmp_path, block), LearningConfig(epochs=5, transform_lr=0.1), rng())
    assert block.factor.item() == 2.5
    assert result.after == result.before == pytest.approx(1.75 / 28)


# Eq. 7-12: which channels


def activations() -> tuple[Array, Array]:
    """64 channels: 12 text tokens and 9 vision tokens.

    16 channels are large in vision. 16 others take another magnitude in every text token while the rest keep theirs, so
    the scores of eq. 10 lie far apart: a value in the very middle of two centres may go either way.
    """
    generator = np.random.default_rng(7)
    text = 10 ** np.linspace(-1, 1, 64) * (1 + 0.01 * generator.standard_normal((12, 64)))
    text[:, 3::4] = 10 ** generator.uniform(-1, 1, (12, 16))
    vision = generator.standard_normal((9, 64))
    vision[:, 1::4] *= 20
    return text.astype(np.float32), vision.astype(np.float32)


def ranks_by_loops(rows: Array) -> Array:
    """r[i, c] = #{j : |x[i, j]| <= |x[i, c]|} / C."""
    ranks = np.empty(rows.shape)
    for i, row in enumerate(rows):
        for c, value in enumerate(row):
            ranks[i, c] = sum(abs(other) <= abs(value) for other in row) / len(row)
    return ranks


def variance_by_loops(sequence: Array, clusters: int) -> float:
    """Lloyd's algorithm on numbers, from the quantiles (2i + 1) / 2k."""
    centres = [float(np.quantile(sequence, (2 * i + 1) / (2 * clusters))) for i in range(clusters)]
    for _ in range(100):
        members: list[list[float]] = [[] for _ in centres]
        for value in sequence:
            members[int(np.argmin([abs(value - centre) for centre in centres]))].append(float(value))
        centres = [sum(own) / len(own) if own else old for own, old in zip(members, centres, strict=True)]
    return sum(min((value - centre) ** 2 for centre in centres) for value in sequence) / len(sequence)


def test_eq_7_vision_score_is_the_largest_magnitude_over_vision_tokens() -> None:
    _, vision = activations()
    expected = [max(abs(float(vision[i, c])) for i in range(9)) for c in range(64)]
    assert vision_scores(torch.from_numpy(vision).abs().amax(0)).tolist() == expected


def test_eq_9_percentile_rank_counts_the_channels_that_are_not_larger() -> None:
    text, _ = activations()
    np.testing.assert_allclose(
        percentile_ranks(torch.from_numpy(np.abs(text))).numpy(), ranks_by_loops(text), rtol=1e-6
    )


def test_eq_10_score_is_the_mean_squared_distance_to_the_own_centre() -> None:
    # Ranks .1 .1 .2 | .5 .6 | 1: centres 2/15, .55, 1; squares 2 * (1/30)^2 + (2/30)^2 | 2 * .05^2 | 0.
    sequence = torch.tensor([[0.1], [0.5], [0.1], [1.0], [0.6], [0.2]])
    expected = (2 * (1 / 30) ** 2 + (2 / 30) ** 2 + 2 * 0.05**2) / 6
    assert within_cluster_variance(sequence, 3).item() == pytest.approx(expected, rel=1e-4)


def test_eq_8_11_12_groups_are_the_top_vision_scores_the_top_text_scores_of_the_rest_and_what_remains() -> None:
    text, vision = activations()
    stats = SiteStats(
        "site",
        vision_absmax=torch.from_numpy(vision).abs().amax(0),
        text_absmax=torch.from_numpy(text).abs().amax(0),
        text_rows=torch.from_numpy(text),
        vision_rows=torch.from_numpy(vision),
        vision_tokens=9,
        text_tokens=12,
    )
    plan = plan_split(stats, SplitConfig(ratio=0.25, clusters=3))
    assert plan.widths == (32, 16, 16)
    by_vision = sorted(range(64), key=lambda c: -np.abs(vision[:, c]).max())
    expected_vision = set(by_vision[:16])  # eq. 8
    rest = [c for c in range(64) if c not in expected_vision]
    ranks = ranks_by_loops(text[:, rest])
    scores = {c: variance_by_loops(ranks[:, place], 3) for place, c in enumerate(rest)}
    by_score = sorted(rest, key=lambda c: -scores[c])
    assert scores[by_score[15]] > 2 * scores[by_score[16]]
    expected_text = set(by_score[:16])  # eq. 11
    assert set(plan.vision.tolist()) == expected_vision
    assert set(plan.text.tolist()) == expected_text
    assert plan.main.tolist() == [c for c in rest if c not in expected_text]  # eq. 12


# Eq. 13-21: the site. Loops over tokens, channels and outputs in float64.


def site_of(**settings: Any) -> tuple[TrainableSite, torch.Tensor]:
    """A site with disturbed (as if learned) parameters, and five tokens."""
    config: QuantConfig = no_split(**({"bits": 3, "activation_bits": 3, "transform": "hadamard"} | settings))
    plan = random_plan(sum(WIDTHS), *WIDTHS[1:])
    site = TrainableSite("site", random_linears(sum(WIDTHS), [OUTPUTS]), plan, config, ModalityContext())
    with torch.no_grad():
        for number, parameter in enumerate(site.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=rng(number)), alpha=0.1)
    x = torch.randn(5, sum(WIDTHS), generator=rng(99)) * torch.logspace(-1, 1, sum(WIDTHS))
    return site, x


def run(site: nn.Module, x: torch.Tensor) -> Array:
    with torch.no_grad(), site.context.using(MODALITY):  # type: ignore[union-attr]
        return site(x).double().numpy()


def quantized_row(row: Array, bits: int, clip: float = 1.0) -> Array:
    """Eq. 1 with a scale of its own for the row."""
    top = 2 ** (bits - 1) - 1
    scale = max(np.abs(row).max() * clip / top, 1e-12)
    return np.array([min(max(round(value / scale), -top - 1), top) * scale for value in row])


def quantized_columns(weight: Array, bits: int, clips: Array | float = 1.0) -> Array:
    """Eq. 1 with a scale an output channel."""
    clips = np.broadcast_to(clips, weight.shape[1:])
    return np.stack([quantized_row(column, bits, clip) for column, clip in zip(weight.T, clips, strict=True)], 1)


def searched_columns(weight: Array, bits: int) -> Array:
    """Eq. 1 with the clip of every column that leaves the smallest squared error, 1.0 to 0.35 in steps of 0.05."""
    grid = [1 - 0.05 * step for step in range(14)]
    tries = [[quantized_row(column, bits, clip) for clip in grid] for column in weight.T]
    columns = zip(weight.T, tries, strict=True)
    return np.stack([min(found, key=lambda row: ((row - column) ** 2).sum()) for column, found in columns], 1)


class Pieces:
    """A, B and the clips of one group, from the site's parameters alone."""

    def __init__(self, site: TrainableSite, x: torch.Tensor, group: str) -> None:
        channels = {"main": site.plan.main, "text": site.plan.text, "vision": site.plan.vision}[group]
        part: Any = site.groups[group]
        with torch.no_grad():
            scale = site.log_scale.exp()[channels].double().numpy()
            p1, p2 = part.p1()[0].double().numpy(), part.p2()[0].double().numpy()
        self.scale = scale
        self.p = np.zeros((len(channels), len(channels)))
        width = p1.shape[1] * len(p2)
        for first in range(0, len(channels), width):
            rows = slice(first // len(p2), first // len(p2) + p1.shape[1])
            self.p[first : first + width, first : first + width] = np.kron(p1[rows], p2)
        self.weight = site.weight[channels].double().numpy() * scale[:, None]  # diag(s) W_g
        self.a = x[:, channels].double().numpy() / scale @ self.p  # X_g diag(1/s) P_g
        self.b = np.linalg.inv(self.p) @ self.weight  # P_g^-1 diag(s) W_g
        self.clip = float(torch.sigmoid(part.activation_clip.detach()))
        self.weight_clip = torch.sigmoid(part.weight_clip).detach().numpy()
        self.setting = part.setting
        self.a_hat = np.stack([quantized_row(row, self.setting.activation_bits, self.clip) for row in self.a])

    def quantized(self, weight: Array) -> Array:
        return quantized_columns(weight, self.setting.bits, self.weight_clip)


def close(got: Array, expected: Array) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("transform_width", [0, 16])
def test_eq_13_14_output_is_the_sum_of_three_groups_each_with_its_own_transform_and_scales(
    transform_width: int,
) -> None:
    site, x = site_of(split=SplitConfig(bits=4, activation_bits=8), transform_width=transform_width)
    mixed = Pieces(site, x, "main").p.reshape(2, 16, 2, 16)
    assert mixed[0, :, 0].all()
    assert mixed[1, :, 1].all()
    assert not np.array_equal(mixed[0, :, 0], mixed[1, :, 1])
    assert mixed[0, :, 1].any() == mixed[1, :, 0].any() == (transform_width == 0)
    expected = np.zeros((5, OUTPUTS))
    transforms, row_scales = [], []
    for group in ("main", "text", "vision"):
        pieces = Pieces(site, x, group)
        expected += pieces.a_hat @ pieces.quantized(pieces.b)
        transforms.append(pieces.p)
        row_scales.append(np.abs(pieces.a).max(1))
    close(run(site, x), expected)
    close(run(site.freeze(), x), expected)
    assert not np.allclose(transforms[1], transforms[2])
    assert not np.allclose(row_scales[0], row_scales[1])
    assert not np.allclose(row_scales[1], row_scales[2])


def test_eq_13_14_every_token_uses_all_three_groups_whatever_its_modality() -> None:
    site, x = site_of()
    with torch.no_grad():
        outputs = []
        for kind in (0, 1):
            with site.context.using(torch.full((5,), kind, dtype=torch.int8)):
                outputs.append(site(x))
    assert torch.equal(*outputs)


def factors(site: TrainableSite, main: Pieces) -> tuple[Array, Array, Array]:
    """Eq. 20 from numpy's SVD: Q(P^-1 U_r), the singular values, Q(V_r^T).

    The anchor is the SVD at the start (channel scale one); a learned scale goes to U as it goes to W. Signs are the
    anchor's, which no equation fixes.
    """
    u, s, v = np.linalg.svd(main.weight / main.scale[:, None], full_matrices=False)
    u, s, v = u[:, : site.rank], s[: site.rank], v[: site.rank]
    signs = np.sign((v * site.anchor.v.double().numpy()).sum(1))
    u, v = u * signs, v * signs[:, None]
    np.testing.assert_allclose((u * s) @ v, (site.anchor.u * site.anchor.singular) @ site.anchor.v, atol=1e-5)
    carried = np.linalg.inv(main.p) @ (u * main.scale[:, None])
    bits = site.config.correction.bits
    return quantized_columns(carried, bits, U_CLIP), s, searched_columns(v, bits)


def test_eq_16_17_cws_subtracts_the_product_before_quantization_and_adds_it_back() -> None:
    site, x = site_of(correction=CorrectionConfig(cws_ratio=0.5, mac_ratio=0))
    main, rest = Pieces(site, x, "main"), [Pieces(site, x, group) for group in ("text", "vision")]
    u, s, v = factors(site, main)
    product = (u * (s * site.gate_cws.detach().numpy())) @ v
    smoothed = main.quantized(main.b - product)  # subtract first
    expected = main.a_hat @ smoothed + main.a_hat @ product  # add back
    expected += sum(pieces.a_hat @ pieces.quantized(pieces.b) for pieces in rest)
    close(run(site, x), expected)
    frozen = site.freeze()
    codes = dequantize_weight(frozen.groups["main"].qweight, frozen.groups["main"].scale).double().numpy()
    close(codes, smoothed)
    # The frozen site quantizes the vector between U and V to 8 bits: half a step of it through |V| is its whole error.
    latent = np.abs(main.a_hat @ (u * (s * site.gate_cws.detach().numpy()))).max(1)
    assert (np.abs(run(frozen, x) - expected) <= (latent / 254)[:, None] * np.abs(v).sum(0) * 1.01 + 1e-4).all()


def test_eq_18_19_mac_adds_the_compressed_residual_on_text_rows_alone() -> None:
    site, x = site_of(correction=CorrectionConfig(cws_ratio=0, mac_ratio=0.5, residual_bits=4))
    main = Pieces(site, x, "main")
    u, s, v = factors(site, main)
    residual = np.stack([quantized_row(row, 4) for row in main.a - main.a_hat])  # Q(A - A^)
    term = residual @ (u * (s * site.gate_mac.detach().numpy())) @ v
    with_mac = run(site, x)
    site.without = frozenset({"mac"})
    added = with_mac - run(site, x)
    text = MODALITY.numpy() == 0
    close(added[text], term[text])
    assert not added[~text].any()


def test_eq_18_19_mac_on_all_rows_is_the_option_without_a_mask() -> None:
    site, x = site_of(correction=CorrectionConfig(cws_ratio=0, mac_ratio=0.5, mac_rows="all"))
    with_mac = run(site, x)
    site.without = frozenset({"mac"})
    assert (np.abs(with_mac - run(site, x)).max(1) > 0).all()


def test_eq_20_factors_are_the_svd_of_the_main_weight_behind_the_inverse_transform() -> None:
    site, x = site_of(correction=CorrectionConfig(cws_ratio=0.5, mac_ratio=0.5))
    u, s, v = factors(site, Pieces(site, x, "main"))
    correction = site.freeze().correction
    assert correction is not None
    close(dequantize_weight(correction.u, correction.u_scale).double().numpy(), u)
    close(dequantize_weight(correction.v, correction.v_scale).double().numpy(), v)
    close(correction.gate_cws.double().numpy(), s * site.gate_cws.detach().double().numpy())
    close(correction.gate_mac.double().numpy(), s * site.gate_mac.detach().double().numpy())


def test_eq_21_diagonal_gates_are_all_that_the_branches_learn() -> None:
    plain, _ = site_of()
    site, _ = site_of(correction=CorrectionConfig(cws_ratio=0.5, mac_ratio=0.35))
    added = {name: tuple(p.shape) for name, p in site.named_parameters()}
    for name, _ in plain.named_parameters():
        del added[name]
    rank = {"gate_cws": 8, "gate_mac": 4}  # shares of min(32, 12), rounded to multiples of 4: 6 -> 8, 4.2 -> 4
    assert added == {name: (size,) for name, size in rank.items()}
    assert math.prod(site.anchor.u.shape) == WIDTHS[0] * 8


def test_eq_21_gates_scale_the_singular_directions_one_by_one() -> None:
    site, _ = site_of(correction=CorrectionConfig(cws_ratio=0.5, mac_ratio=0))
    before = site.freeze().correction
    with torch.no_grad():
        site.gate_cws[2] *= 3
    after = site.freeze().correction
    assert before is not None
    assert after is not None
    ratio = after.gate_cws / before.gate_cws
    torch.testing.assert_close(ratio, torch.tensor([1.0, 1.0, 3.0, *[1.0] * (len(ratio) - 3)]))
    assert torch.equal(before.u, after.u)
    assert torch.equal(before.v, after.v)
