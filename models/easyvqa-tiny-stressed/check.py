"""Check that easyvqa-tiny-stressed is stressed: where its planted channels show, and what they do to quantization.

    python models/easyvqa-tiny-stressed/check.py

prints, for every site that reads the residual stream, the largest magnitudes of planted and other channels by modality,
then the accuracy under plain round-to-nearest of the language model's linears (weights per output channel, activations
per token, symmetric): without a split, and with channels split off at those sites into two groups that have a scale per
token of their own at the same bit width. Nothing is learned. Needs splitq-edge[quantize,tasks].
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from splitq_edge.commands.evaluate import pick
from splitq_edge.evaluate.backends import TorchBackend, answer_all
from splitq_edge.evaluate.tasks import Question, load_task, score
from splitq_edge.loading import LoadedModel
from splitq_edge.modality import TEXT, VISION
from splitq_edge.quant.fake import fake_quantize_rows, fake_quantize_weight

HERE = Path(__file__).resolve().parent
SCHEMA = 1
LOOKED_AT = 128  # training questions
RESIDUAL_SITES = ("attn_in", "mlp_in")
SCHEMES = {"W4A8": (4, 8), "W4A4": (4, 4), "W3A3": (3, 3), "W3A2": (3, 2)}
SPLITS = ("none", "random", "largest", "text", "vision", "planted")

Absmax = dict[str, torch.Tensor]  # by modality, [K] float32
Groups = tuple[list[int], ...]  # channels split off, the rest is one more group


class RoundedLinear(nn.Module):
    """A linear with round-to-nearest weights and activations; every channel group has its own scale per token."""

    def __init__(self, linear: nn.Linear, bits: int, activation_bits: int, groups: Groups) -> None:
        super().__init__()
        self.weight = fake_quantize_weight(linear.weight.detach().T, bits).T  # [N, K]
        self.bias = linear.bias
        self.activation_bits = activation_bits
        owner = torch.zeros(linear.in_features, dtype=torch.long)
        for number, channels in enumerate(groups, 1):
            owner[channels] = number
        self.members = functional.one_hot(owner).T.float()  # [groups, K]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] float32 to [..., N]."""
        parts = [fake_quantize_rows(x * member, self.activation_bits) for member in self.members]
        return functional.linear(torch.stack(parts).sum(0), self.weight, self.bias)


def groups_of(split: str, absmax: Absmax, planted: dict[str, list[int]]) -> Groups:
    """The channels that a split takes from a site, as many as are planted."""
    text, vision = planted["text"], planted["vision"]
    largest = torch.maximum(absmax["text"], absmax["vision"])
    shuffled = torch.randperm(len(largest), generator=torch.Generator().manual_seed(0)).tolist()
    half, both = len(text), len(text) + len(vision)
    return {
        "none": (),
        "random": (shuffled[:half], shuffled[half:both]),
        "largest": (largest.topk(both).indices.tolist(),),
        "text": (text,),
        "vision": (vision,),
        "planted": (text, vision),
    }[split]


def round_language_model(loaded: LoadedModel, bits: tuple[int, int], groups: Callable[[str], Groups]) -> None:
    """Replace every linear of the language blocks; `groups` tells the groups of a site by its name."""
    for index, block in enumerate(loaded.language_blocks()):
        for site in loaded.adapter.language_block:
            chosen = groups(loaded.adapter.site_name(index, site))
            for name in site.linears:
                block.set_submodule(name, RoundedLinear(block.get_submodule(name), *bits, chosen))


def look(backend: TorchBackend, questions: list[Question]) -> dict[str, Absmax]:
    """Largest magnitudes of the channels of every site that reads the residual stream, by site name."""
    loaded, found = backend.loaded, {}

    def hook(site: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def observe(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x, mask = args[0], loaded.context.mask
            for value, modality in ((TEXT, "text"), (VISION, "vision")):
                rows = x[mask == value]  # [tokens, K]
                if len(rows):
                    known = found.setdefault(site, {}).get(modality, torch.zeros(x.shape[-1]))
                    found[site][modality] = torch.maximum(known, rows.abs().amax(0))

        return observe

    handles = [
        block.get_submodule(site.linears[0]).register_forward_pre_hook(hook(loaded.adapter.site_name(index, site)))
        for index, block in enumerate(loaded.language_blocks())
        for site in loaded.adapter.language_block
        if site.name in RESIDUAL_SITES
    ]
    for question in questions:  # one by one: padding would count as text
        answer_all(backend, [question])
    for handle in handles:
        handle.remove()
    return found


def print_sites(sites: dict[str, Absmax], planted: dict[str, list[int]]) -> None:
    """One line a site: how far the planted channels stand out, and how many are the largest of their modality."""
    print("largest magnitudes: smallest planted / median of the others; planted ones among the largest 8")
    for site, by_modality in sites.items():
        cells = []
        for modality, absmax in sorted(by_modality.items()):
            channels = planted[modality]
            others = torch.ones_like(absmax, dtype=torch.bool)
            others[channels] = False
            found = len(set(absmax.topk(len(channels)).indices.tolist()) & set(channels))
            smallest, median = absmax[channels].min(), absmax[others].median()
            cells.append(f"{modality} {smallest:.2f} / {median:.2f}, {found} of {len(channels)}")
        print(f"{site:<18}{'   '.join(cells)}", flush=True)


def accuracy(backend: TorchBackend, questions: list[Question]) -> float:
    """Share of right answers in %."""
    return 100 * float(score(questions, answer_all(backend, questions))["accuracy"])


def main() -> None:
    """Print the table of sites and the table of accuracies."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    record = json.loads((options.model / "planted.json").read_text(encoding="utf-8"))
    if record["schema"] > SCHEMA:
        raise SystemExit(f"planted.json: expected schema {SCHEMA} or older, got {record['schema']}; update the script")
    planted = {name: record[name]["channels"] for name in ("text", "vision")}
    questions = pick(load_task("easyvqa", "test"), options.limit, 0)

    backend = TorchBackend(str(options.model))
    sites = look(backend, pick(load_task("easyvqa", "train"), LOOKED_AT, 0))
    print_sites(sites, planted)
    print(f"\naccuracy in % on {len(questions)} test questions\nfloat32 {accuracy(backend, questions):.1f}\n")
    print(f"{'split':<8}" + "".join(f"{split:>9}" for split in options.splits), flush=True)
    for scheme in options.schemes:
        print(f"{scheme:<8}", end="", flush=True)
        for split in options.splits:
            backend = TorchBackend(str(options.model))
            with torch.no_grad():
                round_language_model(
                    backend.loaded,
                    SCHEMES[scheme],
                    lambda site, split=split: groups_of(split, sites[site], planted) if site in sites else (),
                )
            print(f"{accuracy(backend, questions):9.1f}", end="", flush=True)
        print()


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure what the planted channels of a stressed model do.")
    parser.add_argument("--model", type=Path, default=HERE, help="folder of the stressed model (default: this one)")
    parser.add_argument("--limit", type=int, default=1000, help="test questions (default: 1,000)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
