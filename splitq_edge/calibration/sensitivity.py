"""How much the loss depends on each site, by modality: gradients block by block, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from splitq_edge.calibration.block_inputs import BlockInputs, block_output
from splitq_edge.loading import LoadedModel
from splitq_edge.modality import TEXT, VISION
from splitq_edge.parallel import Processes

MAX_BATCHES = 16  # global batches whose gradients are taken

Sensitivity = dict[str, tuple[float, float]]


def collect_sensitivity(
    loaded: LoadedModel,
    inputs: BlockInputs,
    processes: Processes,
    *,
    tokens: bool = False,
    progress: Callable[[], None] | None = None,
) -> Sensitivity:
    """Mean absolute gradient of the answers' loss at every site's output and every block's output (MBQ).

    The loss is the mean negative log-likelihood of the answer tokens, of an even choice of at most 16 batches, or of
    all where `tokens` is True; it does not depend on processes. Forward through the float blocks with their inputs
    kept, then backward block after block.

    Args:
        loaded: the float model.
        inputs: the stream "float" holds what the first block receives; left as it was.
        processes: who shares the samples.
        tokens: also keep every token's importance at every block's output, see `token_importance`, in the stream
            "importance-<index>" of `inputs`; the gradients of all batches are taken then.
        progress: called after every block of either pass.

    Returns:
        (text, vision) by site name and by "block.<index>"; 1 for a modality that did not occur.
    """
    count = len(inputs)
    looked_at = range(count)[:: 1 if tokens else -(-count // MAX_BATCHES)]  # evenly: batches are sorted by length
    numbers = [number for number in inputs.own if number in looked_at]
    for number in numbers:
        inputs.put("pass-0", number, inputs.get("float", number))
    with torch.no_grad():
        for index in range(loaded.block_count):
            block = loaded.block(index)
            inputs.block = index
            for number in numbers:
                hidden = inputs.get(f"pass-{index}", number)
                if (added := inputs.added(number)) is not None:
                    hidden = hidden + added
                    inputs.put(f"pass-{index}", number, hidden)
                output = block_output(block, hidden, inputs.batch(number), loaded.context)
                inputs.put(f"pass-{index + 1}", number, output)
            del block
            if progress is not None:
                progress()
    gradients = _loss_gradients(loaded, inputs, numbers, processes)
    sums: dict[str, torch.Tensor] = {}
    for index in reversed(range(loaded.block_count)):
        block = loaded.block(index)
        inputs.block = index
        for number in numbers:
            if tokens:
                importance = token_importance(gradients[number], inputs.batch(number).keep)
                inputs.put(f"importance-{index}", number, importance)
            gradients[number] = _backward(loaded, inputs, block, index, number, gradients[number], sums)
            inputs.store.drop(f"pass-{index + 1}-{number}")
        del block
        if progress is not None:
            progress()
    for number in numbers:
        inputs.store.drop(f"pass-0-{number}")
    return _averages(loaded, sums, processes)


def token_importance(gradient: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """How much each token of a sample matters to its answer, relative to the sample's mean.

    Args:
        gradient: of the answers' loss at a block's output, [batch, sequence, hidden].
        keep: [batch, sequence] bool, False for padding.

    Returns:
        [batch, sequence] float32, mean 1 over the kept tokens of every sample, 0 for padding: half of it the norm of
        the token's gradient, half of it equal for all, because later blocks and other questions need the other tokens.
    """
    norm = gradient.norm(dim=-1) * keep
    count = keep.sum(-1, keepdim=True).clamp(min=1)
    relative = norm * count / norm.sum(-1, keepdim=True).clamp(min=1e-30)
    return (relative + 1) / 2 * keep


def _loss_gradients(
    loaded: LoadedModel, inputs: BlockInputs, numbers: list[int], processes: Processes
) -> dict[int, torch.Tensor]:
    """Gradient of the loss at the last block's output, by batch."""
    gradients = {}
    chosen_tokens = {number: _answer_tokens(inputs, number) for number in numbers}
    count = sum(int(wanted.sum()) for wanted in chosen_tokens.values())
    total = float(processes.sum(torch.tensor(float(count), device=loaded.device)))
    with loaded.outside_blocks():
        norm = loaded.model.get_submodule(loaded.final_norm_path)
        head = loaded.model.get_submodule(loaded.adapter.lm_head)
        for number in numbers:
            hidden = inputs.get(f"pass-{loaded.block_count}", number).requires_grad_()
            wanted = chosen_tokens[number]
            chosen = norm(hidden)[:, :-1][wanted]  # [answer tokens, hidden]
            target = inputs.tokens(number)["input_ids"][:, 1:][wanted]
            loss = nn.functional.cross_entropy(head(chosen), target, reduction="sum") / max(total, 1.0)
            (gradients[number],) = torch.autograd.grad(loss, hidden)
    return gradients


def _answer_tokens(inputs: BlockInputs, number: int) -> torch.Tensor:
    """[batch, sequence - 1] bool, the tokens after the first that the loss is about: the answer, without one all text.

    A sample's first token is none of them: before it there is at most padding.
    """
    tokens, batch = inputs.tokens(number), inputs.batch(number)
    wanted = tokens.get("answer", batch.modality == TEXT)
    return wanted[:, 1:] & batch.keep[:, :-1] & batch.keep[:, 1:]


def _backward(
    loaded: LoadedModel,
    inputs: BlockInputs,
    block: nn.Module,
    index: int,
    number: int,
    gradient: torch.Tensor,
    sums: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Gradient at the block's input; adds the sites' magnitudes to `sums`."""
    batch = inputs.batch(number)
    outputs: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        return lambda _module, _args, output: outputs.setdefault(name, []).append(output)

    handles = [
        block.get_submodule(path).register_forward_hook(keep(loaded.adapter.site_name(index, site)))
        for site in loaded.adapter.language_block
        for path in site.linears
    ]
    hidden = inputs.get(f"pass-{index}", number).requires_grad_()
    result = block_output(block, hidden, batch, loaded.context)
    for handle in handles:
        handle.remove()
    parts = [output for site_outputs in outputs.values() for output in site_outputs]
    first, *rest = torch.autograd.grad(result, [hidden, *parts], gradient, allow_unused=True)
    given = dict(zip(map(id, parts), rest, strict=True))
    magnitudes = {name: [given[id(output)] for output in site_outputs] for name, site_outputs in outputs.items()}
    magnitudes[f"block.{index}"] = [gradient]
    for name, tensors in magnitudes.items():
        for kind in (TEXT, VISION):
            chosen = batch.keep & (batch.modality == kind)
            values = [tensor[chosen] for tensor in tensors if tensor is not None]
            total = sums.setdefault(name, torch.zeros(2, 2, device=gradient.device))
            total[kind, 0] += sum(value.abs().sum() for value in values)
            total[kind, 1] += sum(value.numel() for value in values)
    return first


def _averages(loaded: LoadedModel, sums: dict[str, torch.Tensor], processes: Processes) -> Sensitivity:
    names = [
        *(f"block.{index}" for index in range(loaded.block_count)),
        *(
            loaded.adapter.site_name(index, site)
            for index in range(loaded.block_count)
            for site in loaded.adapter.language_block
        ),
    ]
    result = {}
    for name in names:
        total = processes.sum(sums.get(name, torch.zeros(2, 2, device=loaded.device)))
        mean = [float(total[kind, 0] / total[kind, 1]) if total[kind, 1] else 1.0 for kind in (TEXT, VISION)]
        result[name] = (mean[0], mean[1])
    return result
