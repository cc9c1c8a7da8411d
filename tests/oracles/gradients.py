"""The gradient of a language model's loss, by autograd through the whole of a plain transformers model, one sequence at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.data import Samples
from compress.layout import Layout


def loss(model: Any, samples: Samples) -> Tensor:
    """Mean negative log-likelihood, in nats, of every scored token but the first of each sequence."""
    losses = []
    for item in samples.items:
        logits = model(input_ids=item.ids[None], **item.extra, use_cache=False).logits[0]
        for position in range(1, len(item.ids)):
            if item.scored[position]:
                losses.append(-torch.log_softmax(logits[position - 1].double(), -1)[item.ids[position]])
    return torch.stack(losses).mean()


def weights(model: Any, layout: Layout) -> dict[str, Tensor]:
    """Every linear in a block by its name on disk; a view of what the model holds."""
    found = {}
    for name in layout.linears:
        local = name.replace(layout.arch.blocks, layout.arch.module_blocks, 1)
        table = layout.arch.experts
        if table is None or f".{table.prefix}." not in local:
            found[name] = model.get_submodule(local).weight
            continue
        block, _, rest = local.partition(f".{table.prefix}.")
        number, _, part = rest.partition(".")
        experts = model.get_submodule(f"{block}.{table.module}")
        both, down = experts.gate_up_proj[int(number)], experts.down_proj[int(number)]
        if experts.is_transposed:
            both, down = both.T, down.T
        gate, up = both.chunk(2) if experts.is_concatenated else (both[::2], both[1::2])
        found[name] = {table.gate: gate, table.up: up, table.down: down}[part]
    return found


def of_weights(model: Any, layout: Layout, samples: Samples) -> dict[str, Tensor]:
    """Gradient in the weight of every linear, by its name on disk."""
    model.requires_grad_(True)
    loss(model, samples).backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    return {name: gradient.detach() for name, gradient in weights(model, layout).items()}


def of_output(model: Any, module: str, samples: Samples) -> list[Tensor]:
    """Gradient in what a module gives, [tokens, out] by sequence."""
    given: list[Tensor] = []

    def keep(_: Any, arguments: Any, output: Tensor) -> None:
        output.requires_grad_().retain_grad()
        given.append(output)

    handle = model.get_submodule(module).register_forward_hook(keep)
    loss(model, samples).backward()
    handle.remove()
    return [output.grad[0] for output in given if output.grad is not None]
