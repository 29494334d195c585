"""The quantized site against a plain computation of the paper's algorithm 1, its parts and its weight."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from builders import closed_form_site, no_split, random_linears, random_plan, random_site, rng

from splitq_edge.config import CorrectionConfig, QuantConfig, SplitConfig, preset
from splitq_edge.errors import SplitQError
from splitq_edge.modality import ModalityContext
from splitq_edge.modules.split_linear import GROUPS, SplitLinear, site_parts
from splitq_edge.quant.transforms import orthogonal_start

F32 = np.float32
EPS = float(np.finfo(F32).eps)

# Widths whose Hadamard factors are exact (16 = 4 x 4, 256 = 16 x 16): with whole numbers as activations the plain
# computation sees the same transformed values to the last bit, so codes must agree and only float sums may differ.
EXACT = (256, 16, 16)
CWS_AND_MAC = CorrectionConfig(cws_ratio=0.2, mac_ratio=0.4)
CONFIGS: dict[str, tuple[QuantConfig, tuple[int, int, int]]] = {
    "W4A8": (preset("W4A8"), EXACT),
    "W4A4": (preset("W4A4"), EXACT),
    "W3A3": (preset("W3A3"), EXACT),
    "W3A2": (preset("W3A2"), EXACT),
    "groups": (dataclasses.replace(preset("W4A8"), group_size=64), EXACT),
    "short_last_group": (no_split(group_size=32), (80, 0, 0)),
    "asymmetric": (dataclasses.replace(preset("W3A2"), activation_symmetric=False), EXACT),
    "mac_on_all_rows": (no_split(activation_bits=3, correction=CorrectionConfig(0.2, 0.4, mac_rows="all")), (64, 8, 8)),
    "cws_longer_than_mac": (no_split(activation_bits=3, correction=CorrectionConfig(0.4, 0.2)), (64, 8, 8)),
    "cws_alone": (no_split(bits=2, correction=CorrectionConfig(0.3, 0)), (64, 8, 8)),
    "mac_alone": (no_split(activation_bits=2, correction=CorrectionConfig(0, 0.3)), (64, 8, 8)),
    "text_group_alone": (no_split(), (64, 8, 0)),
    "vision_group_alone": (no_split(), (64, 0, 7)),
    "main_alone": (no_split(bits=8), (65, 0, 0)),
}


def plain_quantize(row: np.ndarray, bits: int, symmetric: bool, clip: float = 1) -> tuple[np.ndarray, np.float32]:
    """docs/ops.md, one token: row [K] float32 -> int64 codes [K] and scale."""
    if symmetric:
        high = 2 ** (bits - 1) - 1
        scale = max(F32(np.abs(row).max(initial=0)) * F32(clip) / F32(high), F32(1e-12))
        return np.clip(np.rint(row * (F32(1) / scale)), -high - 1, high).astype(np.int64), scale
    levels = 2**bits - 1
    high, low = max(row.max(), F32(0)) * F32(clip), min(row.min(), F32(0)) * F32(clip)
    scale = max((high - low) / F32(levels), F32(1e-12))
    inverse = F32(1) / scale
    zero = np.clip(np.rint(-low * inverse), 0, levels)
    return (np.clip(np.rint(row * inverse) + zero, 0, levels) - zero).astype(np.int64), scale


def algorithm_1(site: SplitLinear, row: np.ndarray, *, text: bool) -> tuple[np.ndarray, np.ndarray]:
    """One token x [K] through a site, in float64 over exact integers: y [N] and the sum of the terms' magnitudes."""
    y = np.zeros(site.out_features)
    magnitude = np.zeros(site.out_features)
    start = 0
    for name, width in zip(GROUPS, site.widths, strict=True):
        if not width:
            continue
        group = site.groups[name]
        values = row[site.order.numpy()[start : start + width]]
        start += width
        if group.p1 is not None and group.p2 is not None:
            product = np.kron(group.p1.numpy().astype(np.float64), group.p2.numpy().astype(np.float64))
            values = (values.astype(np.float64) @ product).astype(F32)
        symmetric = name != "main" or site.activation_symmetric
        codes, scale = plain_quantize(values, group.activation_bits, symmetric, group.clip)
        if name == "main":
            main_values, main_codes, main_scale = values, codes, scale
        for k in range(width):
            weight_scale = group.scale.numpy().astype(np.float64)
            if weight_scale.ndim == 2:
                weight_scale = weight_scale[k // site.group_size]
            term = codes[k] * float(scale) * group.qweight[k].numpy().astype(np.float64) * weight_scale
            y += term
            magnitude += np.abs(term)
    if site.correction is not None:
        term = plain_correction(site, main_values, main_codes, main_scale, text=text)
        y += term
        magnitude += np.abs(term)
    if site.bias is not None:
        y += site.bias.numpy()
    return y, magnitude


def plain_correction(
    site: SplitLinear, values: np.ndarray, codes: np.ndarray, scale: np.float32, *, text: bool
) -> np.ndarray:
    """CWS + MAC of one token (eq. 16-19)."""
    c = site.correction
    assert c is not None
    u, v = c.u.numpy().astype(np.int64), c.v.numpy().astype(np.int64)
    u_scale = c.u_scale.numpy().astype(np.float64)
    z = np.zeros(u.shape[1])
    for r in range(c.gate_cws.numel()):
        z[r] += float(c.gate_cws[r]) * int(codes @ u[:, r]) * float(scale) * u_scale[r]
    if text or c.mac_rows == "all":
        residual, residual_scale = plain_quantize(values - codes.astype(F32) * scale, c.residual_bits, True)
        for r in range(c.gate_mac.numel()):
            z[r] += float(c.gate_mac[r]) * int(residual @ u[:, r]) * float(residual_scale) * u_scale[r]
    latent, latent_scale = plain_quantize(z.astype(F32), 8, True)
    return (latent @ v) * float(latent_scale) * c.v_scale.numpy()


def whole_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Activations that transform exactly, one of the tokens all zero."""
    x = torch.randint(-60, 61, shape, generator=rng(seed)).float()
    x.reshape(-1, shape[-1])[1] = 0
    return x


def mixed_mask(*shape: int) -> torch.Tensor:
    return (torch.arange(int(np.prod(shape))) % 3 == 1).to(torch.int8).reshape(shape)


def sqnr(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (got - expected).square().sum()))


def run(site: SplitLinear, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    with site.context.using(mask):
        return site(x)


@pytest.mark.parametrize("name", CONFIGS)
def test_site_equals_a_plain_computation_of_algorithm_1(name: str) -> None:
    config, widths = CONFIGS[name]
    site, _ = random_site(config, widths=widths, outputs=(9, 5), bias=True)
    assert site.widths == widths
    x, mask = whole_numbers(2, 4, sum(widths)), mixed_mask(2, 4)
    got = run(site, x, mask).double().numpy()
    for batch in range(2):
        for token in range(4):
            text = int(mask[batch, token]) == 0
            expected, magnitude = algorithm_1(site, x[batch, token].numpy(), text=text)
            bound = 40 * EPS * (magnitude + np.abs(expected)) + 1e-7
            assert (np.abs(got[batch, token] - expected) <= bound).all(), (batch, token)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipped_site_equals_the_plain_computation_too(symmetric: bool) -> None:
    config = dataclasses.replace(preset("W3A2"), activation_symmetric=symmetric)
    site, _ = random_site(config, widths=EXACT)
    clips = {"main": 0.75, "text": 0.5, "vision": 0.625}
    site.groups = {name: dataclasses.replace(group, clip=clips[name]) for name, group in site.groups.items()}
    x, mask = whole_numbers(1, 6, 288), mixed_mask(1, 6)
    got = run(site, x, mask).double().numpy()
    for token in range(6):
        expected, magnitude = algorithm_1(site, x[0, token].numpy(), text=int(mask[0, token]) == 0)
        assert (np.abs(got[0, token] - expected) <= 40 * EPS * (magnitude + np.abs(expected)) + 1e-7).all(), token


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_of_this_file_are_what_their_names_say(name: str) -> None:
    config, widths = CONFIGS[name]
    site, _ = random_site(config, widths=widths)
    branches = (0, 0)
    if site.correction is not None:
        branches = (site.correction.gate_cws.numel(), site.correction.gate_mac.numel())
    wanted = {"cws_longer_than_mac": (8, 4), "cws_alone": (8, 0), "mac_alone": (0, 8), "mac_on_all_rows": (4, 8)}
    assert branches == wanted.get(name, branches)
    if name in ("W4A8", "W4A4", "W3A3", "W3A2", "groups", "asymmetric"):
        assert min(branches) > 0
        assert all(site.groups[group].p1 is not None for group in GROUPS)


@pytest.mark.parametrize("mask", [torch.zeros(1, 3), torch.ones(1, 3)], ids=["text", "vision"])
def test_a_pass_of_one_modality_alone_works(mask: torch.Tensor) -> None:
    site, _ = random_site(preset("W3A2"), widths=EXACT)
    x = whole_numbers(1, 3, 288)
    got = run(site, x, mask.to(torch.int8))
    for token in range(3):
        expected, magnitude = algorithm_1(site, x[0, token].numpy(), text=not mask.any())
        assert (np.abs(got[0, token].numpy() - expected) <= 40 * EPS * magnitude + 1e-7).all()


def test_no_token_at_all_gives_no_row() -> None:
    site, _ = random_site(preset("W3A2"), widths=EXACT)
    assert run(site, torch.zeros(2, 0, 288), torch.zeros(2, 0, dtype=torch.int8)).shape == (2, 0, 24)


def test_tokens_do_not_influence_each_other() -> None:
    site, _ = random_site(preset("W3A2"), widths=EXACT)
    x, mask = whole_numbers(3, 5, 288), mixed_mask(3, 5)
    together = run(site, x, mask)
    alone = torch.cat([run(site, x[i : i + 1], mask[i : i + 1]) for i in range(3)])  # batch 1
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)
    flat = run(site, x.reshape(15, 288), mask)
    torch.testing.assert_close(flat, together.reshape(15, 24), atol=1e-5, rtol=1e-5)


def test_zero_token_gives_the_bias() -> None:
    site, _ = random_site(preset("W3A2"), widths=EXACT, bias=True)
    y = run(site, torch.zeros(1, 1, 288), torch.zeros(1, 1, dtype=torch.int8))
    assert site.bias is not None
    torch.testing.assert_close(y[0, 0], site.bias, atol=1e-9, rtol=1e-6)


def mac_sites(**correction: Any) -> tuple[SplitLinear, torch.Tensor]:
    settings = {"cws_ratio": 0.2, "mac_ratio": 0.4, **correction}
    return random_site(no_split(activation_bits=2, correction=CorrectionConfig(**settings)), widths=(64, 0, 0))


def test_mac_serves_text_rows_only() -> None:
    text_rows, all_rows = mac_sites()[0], mac_sites(mac_rows="all")[0]
    without = mac_sites()[0]
    assert without.correction is not None
    without.correction = dataclasses.replace(without.correction, gate_mac=torch.zeros_like(without.correction.gate_mac))
    x, mask = torch.randn(2, 6, 64, generator=rng(3)), mixed_mask(2, 6)
    y = run(text_rows, x, mask)
    assert torch.equal(y[mask == 0], run(all_rows, x, None)[mask == 0])
    assert torch.equal(y[mask == 1], run(without, x, mask)[mask == 1])
    assert not torch.equal(run(all_rows, x, None), run(without, x, mask))


def low_rank_site(config: QuantConfig) -> tuple[SplitLinear, torch.Tensor]:
    """A site whose weight has rank 4, so that branches of rank 8 hold all of it."""
    generator = rng(11)
    weight = torch.randn(64, 4, generator=generator) @ torch.randn(4, 24, generator=generator)
    (linear,) = random_linears(64, (24,))
    with torch.no_grad():
        linear.weight.copy_(weight.T)
        site = closed_form_site("site", [linear], random_plan(64, 0, 0), config, ModalityContext())
    return site, weight


def test_mac_that_holds_the_whole_weight_undoes_the_activation_error() -> None:
    correction = CorrectionConfig(cws_ratio=0, mac_ratio=0.4, bits=8, residual_bits=8)
    site, weight = low_rank_site(no_split(bits=8, activation_bits=2, correction=correction))
    x, mask = torch.randn(1, 60, 64, generator=rng(4)), mixed_mask(1, 60)
    y, expected = run(site, x, mask), x @ weight
    assert sqnr(y[mask == 0], expected[mask == 0]) > 30
    assert sqnr(y[mask == 1], expected[mask == 1]) < 10


def test_cws_that_holds_the_whole_weight_undoes_the_weight_error() -> None:
    x = torch.randn(1, 60, 64, generator=rng(4))
    with_cws, weight = low_rank_site(no_split(bits=2, correction=CorrectionConfig(cws_ratio=0.4, mac_ratio=0, bits=8)))
    without, _ = low_rank_site(no_split(bits=2))
    assert sqnr(run(with_cws, x, None), x @ weight) > 30
    assert sqnr(run(without, x, None), x @ weight) < 10


@pytest.mark.parametrize("transform", ["identity", "hadamard"])
@pytest.mark.parametrize("group_size", [0, 32])
def test_eight_bits_everywhere_approach_the_float_linear(transform: str, group_size: int) -> None:
    config = QuantConfig(
        "test",
        8,
        8,
        group_size=group_size,
        transform=transform,
        split=SplitConfig(bits=8, activation_bits=8),
        correction=CorrectionConfig(bits=8),
    )
    site, weight = random_site(config, widths=(192, 16, 16), outputs=(32,), bias=True)
    x = torch.randn(4, 16, 224, generator=rng(1))
    assert site.bias is not None
    y = run(site, x, mixed_mask(4, 16))
    # 8-bit Gaussians keep about 43 dB, weight and activation errors together 40.
    assert sqnr(y - site.bias, x @ weight) > 38


def test_fewer_bits_cost_accuracy_in_order() -> None:
    x = torch.randn(4, 16, 288, generator=rng(1))
    quality = []
    for scheme in ("W4A8", "W4A4", "W3A3", "W3A2"):
        site, weight = random_site(preset(scheme), widths=EXACT)
        quality.append(sqnr(run(site, x, mixed_mask(4, 16)), x @ weight))
    assert quality == sorted(quality, reverse=True)
    assert quality[0] > 18
    assert quality[-1] > 0


def test_missing_modality_mask_is_an_error_that_names_the_site() -> None:
    site, _ = random_site(preset("W4A8"), widths=EXACT)
    with pytest.raises(SplitQError, match="site: expected a modality mask for MAC on text rows, got none"):
        site(torch.zeros(1, 2, 288))


def test_mask_is_not_needed_without_mac_on_text_rows() -> None:
    for correction in (CorrectionConfig(0.2, 0), CorrectionConfig(0.2, 0.2, mac_rows="all")):
        site, _ = random_site(no_split(correction=correction), widths=(64, 0, 0))
        assert torch.isfinite(site(torch.randn(2, 64, generator=rng()))).all()


def test_groups_must_cover_all_channels() -> None:
    site, _ = random_site(preset("W4A8"), widths=EXACT)
    groups = {name: group for name, group in site.groups.items() if name != "text"}
    with pytest.raises(SplitQError, match=r"short: expected groups covering 288 channels, got \(256, 0, 16\)"):
        SplitLinear("short", order=site.order, groups=groups, context=ModalityContext())


def test_channel_scale_multiplies_the_permuted_channels() -> None:
    plain, _ = random_site(no_split(bits=8), widths=(64, 8, 8))
    scale = 2.0 ** torch.randint(-2, 3, (80,), generator=rng(6)).float()
    scaled = SplitLinear("site", order=plain.order, groups=plain.groups, context=plain.context, channel_scale=scale)
    x = torch.randn(3, 80, generator=rng(7))
    multiplied = x.clone()
    multiplied[:, plain.order.long()] *= scale
    assert torch.equal(scaled(x), plain(multiplied))
    torch.testing.assert_close(
        x @ scaled.dequantized_weight(), multiplied @ plain.dequantized_weight(), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("scheme", ["W4A8", "W4A4", "W3A3", "W3A2"])
@pytest.mark.parametrize("group_size", [0, 64])
def test_dequantized_weight_is_within_half_a_step_through_the_transform(scheme: str, group_size: int) -> None:
    config = dataclasses.replace(preset(scheme), group_size=group_size)
    site, weight = random_site(config, widths=EXACT)
    restored = site.dequantized_weight()
    start = 0
    for name, width in zip(GROUPS, site.widths, strict=True):
        group = site.groups[name]
        step = group.scale
        if step.dim() == 2:
            step = step.repeat_interleave(group_size, 0)
        assert group.p1 is not None
        assert group.p2 is not None
        spread = torch.kron(group.p1, group.p2).abs()  # W^ - W = P (B^ - B)
        bound = spread @ (step / 2).expand(width, -1)
        channels = site.order[start : start + width].long()
        assert ((restored - weight)[channels].abs() <= bound * 1.001).all(), name
        start += width


def test_dequantized_weight_is_what_the_site_multiplies_with() -> None:
    config = dataclasses.replace(preset("W4A8"), correction=CorrectionConfig(cws_ratio=0.2, mac_ratio=0))
    site, _ = random_site(config, widths=EXACT)
    x = torch.randn(4, 16, 288, generator=rng(1))
    assert sqnr(site(x), x @ site.dequantized_weight()) > 38  # what is left is the 8-bit activation error


# Parts of a site


def parts_of(site: SplitLinear, **widths: int) -> tuple[dict[str, Any], list[int]]:
    """The parts and a list that grows with every run of the site."""
    runs: list[int] = []
    site.register_forward_hook(lambda *_: runs.append(1))
    return site_parts(site, widths), runs


def test_parts_are_slices_of_the_site_which_runs_once() -> None:
    site, _ = random_site(no_split(), widths=(64, 0, 0), outputs=(16, 8, 4))
    parts, runs = parts_of(site, q=16, k=8, v=4)
    x = torch.randn(2, 64, generator=rng())
    outputs = [part(x) for part in parts.values()]
    assert len(runs) == 1
    assert torch.equal(torch.cat(outputs, -1), site(x))
    assert [output.shape[-1] for output in outputs] == [16, 8, 4]


def test_parts_give_the_outputs_of_the_linears_that_they_replace() -> None:
    linears = random_linears(64, (16, 8), bias=True)
    linears[1].bias = None
    with torch.no_grad():
        site = closed_form_site("site", linears, random_plan(64, 0, 0), no_split(bits=8), ModalityContext())
    parts = site_parts(site, {"q": 16, "k": 8})
    x = torch.randn(20, 64, generator=rng())
    for linear, part in zip(linears, parts.values(), strict=True):
        assert sqnr(part(x), linear(x).detach()) > 38


def test_changed_weights_are_never_answered_from_memory() -> None:
    site, _ = random_site(no_split(), widths=(64, 0, 0), outputs=(16, 8))
    parts, runs = parts_of(site, gate=16, up=8)
    x = torch.randn(2, 64, generator=rng())
    before = [part(x) for part in parts.values()]
    site.groups["main"].scale.mul_(2)
    after = [part(x) for part in parts.values()]
    assert len(runs) == 2
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old * 2)


def test_a_part_that_is_called_twice_computes_again() -> None:
    site, _ = random_site(no_split(), widths=(64, 0, 0), outputs=(16, 8))
    parts, runs = parts_of(site, gate=16, up=8)
    x = torch.randn(2, 64, generator=rng())
    parts["gate"](x)
    site.groups["main"].scale.mul_(2)
    torch.testing.assert_close(parts["gate"](x), site(x)[..., :16])
    assert len(runs) == 3


def test_activation_and_result_are_released_after_the_last_part() -> None:
    site, _ = random_site(no_split(), widths=(64, 0, 0), outputs=(16, 8))
    parts, _ = parts_of(site, gate=16, up=8)
    x = torch.randn(2, 64, generator=rng())
    held = weakref.ref(x)
    for part in parts.values():
        part(x)
    del x
    assert held() is None


def test_another_activation_is_never_answered_with_the_last_one() -> None:
    site, _ = random_site(no_split(), widths=(64, 0, 0), outputs=(16, 8))
    parts, _ = parts_of(site, gate=16, up=8)
    first, second = torch.randn(2, 3, 64, generator=rng()).unbind(0)
    parts["gate"](first)
    assert torch.equal(parts["up"](second), site(second)[..., 16:])
    assert torch.equal(parts["up"](first.clone()), site(first)[..., 16:])


def test_widths_of_the_parts_must_add_up() -> None:
    site, _ = random_site(no_split(), widths=(64, 0, 0), outputs=(16, 8))
    with pytest.raises(SplitQError, match="site: expected linears of 24 outputs in all, got 16"):
        site_parts(site, {"gate": 16})


def test_exact_hadamards_of_this_file_are_exact() -> None:
    # The premise of the plain computation: 4 x 4 and 16 x 16 Hadamard entries are powers of two.
    for n in (4, 16):
        assert set(orthogonal_start(n).abs().flatten().tolist()) == {n**-0.5}
