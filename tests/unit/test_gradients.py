"""The block's loss reaches every kind of parameter, and the check that says so notices each path that is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import chat_batches, no_split, random_plan, rng, tiny_loaded

from splitq_edge.calibration.activations import ActivationStore
from splitq_edge.calibration.block_inputs import block_output, first_block_inputs, padded_batches
from splitq_edge.calibration.runner import replace_linears
from splitq_edge.config import CorrectionConfig, LearningConfig
from splitq_edge.learning.invertible import InvertibleMatrix
from splitq_edge.learning.reconstruct import BlockTask
from splitq_edge.learning.site import TrainableGroup, TrainableSite
from splitq_edge.parallel import Processes
from splitq_edge.quant.fake import fake_quantize_rows, fake_quantize_weight
from splitq_edge.splitting.plan import outlier_width

ALONE = Processes(alone=True)


def block_task(folder: Path, processes: Processes = ALONE) -> BlockTask:
    """The first block of the tiny LLaVA with all components, its parameters moved as learning does."""
    loaded = tiny_loaded()
    inputs = first_block_inputs(loaded, padded_batches(chat_batches(2), 2, 0, processes), ActivationStore(folder))
    with torch.no_grad():
        target = block_output(loaded.block(0), inputs.get("float", 0), inputs.batch(0), loaded.context)
    inputs.put("target", 0, target)
    block, sites = loaded.block(0), []
    config = no_split(
        bits=3,
        activation_bits=3,
        transform="hadamard",
        correction=CorrectionConfig(cws_ratio=0.1, mac_ratio=0.2),
        learning=LearningConfig(epochs=1),
    )
    for number, spec in enumerate(loaded.adapter.language_block):
        linears: dict[str, Any] = {path: block.get_submodule(path) for path in spec.linears}
        channels = next(iter(linears.values())).in_features
        half = outlier_width(channels, 0.05) // 2
        plan = random_plan(channels, half, half, seed=number)
        site = TrainableSite(spec.name, list(linears.values()), plan, config, loaded.context)
        with torch.no_grad():
            for seed, parameter in enumerate(site.parameters()):
                parameter.add_(torch.randn(parameter.shape, generator=rng(seed)), alpha=0.05)
        sites.append(site)
        replace_linears(block, site, {path: linear.out_features for path, linear in linears.items()})
    return BlockTask(block, sites, inputs, "float", loaded.context, ALONE)


def unreached(task: BlockTask) -> set[str]:
    """Parameters, by name without site and group, that the block's loss does not depend on in some site."""
    task.squared_error(0).backward()
    lost = set()
    for site in task.sites:
        for name, parameter in site.named_parameters():
            gradient = parameter.grad
            assert gradient is None or torch.isfinite(gradient).all(), f"{site.name} {name}"
            if gradient is None or not gradient.any():
                lost.add(name.removeprefix("groups.").partition(".")[2] or name)
            elif name.endswith("rotations") and not gradient.flatten(1).any(1).all():
                lost.add(f"{name.rpartition('.')[0].rpartition('.')[2]}.rotations")  # one of the two is cut
    return lost


def test_gradients_of_the_block_loss_reach_every_parameter(tmp_path: Path) -> None:
    task = block_task(tmp_path)
    assert unreached(task) == set()
    names = {name.removeprefix("groups.").partition(".")[2] or name for name, _ in task.sites[0].named_parameters()}
    factors = {f"{p}.{part}" for p in ("p1", "p2") for part in ("rotations", "log_s")}
    assert names == {"log_scale", "gate_cws", "gate_mac", "weight_clip", "activation_clip", *factors}


def detached(owner: Any, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The method's results without their history."""
    original = getattr(owner, name)

    def without_history(value: Any) -> Any:
        return tuple(map(without_history, value)) if isinstance(value, tuple) else value.detach()

    def cut(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(owner, name, lambda *args, **kwargs: without_history(original(*args, **kwargs)))

    return cut


def without(attribute: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Forward passes that see a parameter of the site as a constant."""

    def cut(patch: pytest.MonkeyPatch) -> None:
        forward = TrainableSite.forward

        def run(site: TrainableSite, x: torch.Tensor) -> torch.Tensor:
            parameter = site._parameters.pop(attribute)
            object.__setattr__(site, attribute, parameter.detach())
            try:
                return forward(site, x)
            finally:
                object.__delattr__(site, attribute)
                site._parameters[attribute] = parameter

        patch.setattr(TrainableSite, "forward", run)

    return cut


def constant_clip(quantizer: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A quantizer that takes its clip factor as a constant."""

    def cut(patch: pytest.MonkeyPatch) -> None:
        rows = quantizer == "quantize_rows"

        def quantize(group: TrainableGroup, value: torch.Tensor) -> torch.Tensor:
            s = group.setting
            clip = torch.sigmoid((group.activation_clip if rows else group.weight_clip).detach())
            if rows:
                return fake_quantize_rows(value, s.activation_bits, clip=clip, symmetric=s.symmetric)
            return fake_quantize_weight(value, s.bits, group_size=s.group_size, clip=clip)

        patch.setattr(TrainableGroup, quantizer, quantize)

    return cut


def constant_s(patch: pytest.MonkeyPatch) -> None:
    forward = InvertibleMatrix.forward

    def run(matrix: InvertibleMatrix) -> tuple[torch.Tensor, torch.Tensor]:
        parameter = matrix._parameters.pop("log_s")
        object.__setattr__(matrix, "log_s", parameter.detach())
        try:
            return forward(matrix)
        finally:
            object.__delattr__(matrix, "log_s")
            matrix._parameters["log_s"] = parameter

    patch.setattr(InvertibleMatrix, "forward", run)


def constant_rotations(patch: pytest.MonkeyPatch) -> None:
    from splitq_edge.learning import invertible

    cayley = invertible.cayley
    patch.setattr(invertible, "cayley", lambda source: cayley(source.detach()))


ROTATIONS, SINGULAR = {"p1.rotations", "p2.rotations"}, {"p1.log_s", "p2.log_s"}
CUTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "matrices": (detached(InvertibleMatrix, "forward"), ROTATIONS | SINGULAR),
    "rotations": (constant_rotations, ROTATIONS),
    "singular_values": (constant_s, SINGULAR),
    "channel_scale": (without("log_scale"), {"log_scale"}),
    "activation_clip": (constant_clip("quantize_rows"), {"activation_clip"}),
    "weight_clip": (constant_clip("quantize_weight"), {"weight_clip"}),
    "gate_cws": (without("gate_cws"), {"gate_cws"}),
    "gate_mac": (without("gate_mac"), {"gate_mac"}),
    "cws_branch": (detached(TrainableSite, "_smooth"), {"gate_cws"}),
    "mac_branch": (detached(TrainableSite, "_compensate"), {"gate_mac"}),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_path_that_is_cut_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut, lost = CUTS[name]
    task = block_task(tmp_path)
    cut(monkeypatch)
    assert unreached(task) == lost


def test_activation_side_and_weight_side_of_the_transform_both_pass_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # P sits on both sides; with one cut the parameters still get a gradient, another one. The last site, because
    # a cut in a later one hides the loss from an earlier one.
    def gradient(cut: str | None) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            if cut:
                detached(TrainableGroup, cut)(patch)
            task = block_task(tmp_path / str(cut))
            task.squared_error(0).backward()
            found = task.sites[-1].groups["main"].p1.rotations.grad
        assert found is not None
        return found

    both, activation_cut, weight_cut = gradient(None), gradient("transform"), gradient("untransform")
    for one in (activation_cut, weight_cut):
        assert one.any()
        assert (one - both).abs().max() > 1e-3 * both.abs().max()


def test_gradients_of_the_shares_of_a_batch_add_up_to_those_of_the_batch(tmp_path: Path) -> None:
    def gradients(rank: int, size: int) -> dict[tuple[int, str], torch.Tensor]:
        processes = Processes(alone=True)
        processes.rank, processes.size = rank, size
        task = block_task(tmp_path / f"{rank}-{size}", processes)
        task.squared_error(0).backward()
        named = [(number, *item) for number, site in enumerate(task.sites) for item in site.named_parameters()]
        return {(number, name): parameter.grad for number, name, parameter in named if parameter.grad is not None}

    whole, shares = gradients(0, 1), [gradients(rank, 2) for rank in range(2)]
    for key, gradient in whole.items():
        added = shares[0][key] + shares[1][key]
        assert (added - gradient).abs().max() <= 1e-4 * gradient.abs().max(), key
