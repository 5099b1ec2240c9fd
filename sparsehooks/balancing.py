"""Layers that share an input which a norm or a layer before them gives: both can be scaled, and nothing changes.

Which they are is found by trying: the producer's features are divided by powers of two, the consumers' columns are
multiplied by them, both without rounding. Where all that follows is the same bit by bit, nothing else reads the input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsehooks.sequential import Rerun
from sparsehooks.targets import Target


@dataclass(frozen=True, eq=False)
class Balance:
    """A producer and the targets that read what it gives.

    Attributes:
        model: in which they are.
        producer: a norm, or a layer.
        targets: all that read its output.
    """

    model: nn.Module
    producer: nn.Module
    targets: Sequence[Target]

    def parameters(self) -> list[nn.Parameter]:
        """All that changes."""
        return [*self.producer.parameters(), *(self.model.get_parameter(target.parameter) for target in self.targets)]

    @torch.no_grad()
    def apply(self, factors: Tensor) -> None:
        """Divide what the producer gives by factors, and multiply the columns that read it."""
        for parameter in self.producer.parameters():
            shape = (-1,) + (1,) * (parameter.dim() - 1)
            parameter.div_(factors.to(parameter.dtype).reshape(shape))
        for target in self.targets:
            weight = self.model.get_parameter(target.parameter)
            matrix = target.matrix(weight) * factors.to(weight.dtype)
            weight.copy_(target.restore(matrix, weight.shape))


def balances(
    model: nn.Module,
    targets: Sequence[Target],
    evidence: Mapping[str, Mapping[str, Any]],
    rerun: Rerun,
    fixed: Collection[str] = (),
) -> Iterator[Balance]:
    """The producers inside a block whose output only targets read; each target occurs once.

    Args:
        model: in which they are.
        targets: of the block.
        evidence: of the targets; layers that share their input share its tensors.
        rerun: the block.
        fixed: the names of parameters that are to stay as they are.
    """
    groups: dict[int, list[Target]] = {}
    for target in targets:  # what shares its input shares what was collected of it
        groups.setdefault(evidence[target.parameter]["input_peak"].data_ptr(), []).append(target)
    block, before = model.get_submodule(rerun.name), rerun()
    stays = {id(model.get_parameter(name)) for name in fixed}
    for name, module in model.named_modules(remove_duplicate=False):  # other blocks may share what this one has
        if not f"{name}.".startswith(f"{rerun.name}."):
            stays |= {id(parameter) for parameter in module._parameters.values()}
    for group in groups.values():
        if any(len(target.modules) > 1 for target in group):
            continue
        width = group[0].matrix_shape[1]
        readers = {id(model.get_submodule(target.modules[0])) for target in group}
        for module in block.modules():
            shared = any(id(parameter) in stays for parameter in module._parameters.values() if parameter is not None)
            if id(module) not in readers and not shared and _gives(module, width):
                balance = Balance(model, module, group)
                if _harmless(balance, width, rerun, before):
                    yield balance
                    before = rerun()  # as it is with the new scales
                    break


def _gives(module: nn.Module, width: int) -> bool:
    """Whether a module may give so many features, each scaled by a row of its weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or list(module.children()):
        return False
    return weight.shape == (width,) or (isinstance(module, nn.Linear) and len(weight) == width)


def _harmless(balance: Balance, width: int, rerun: Rerun, before: Tensor) -> bool:
    """Whether the block gives the same bits with other scales in between; the weights are as before afterwards.

    In float16 the smallest numbers are not exact, and what differs by less than its precision counts as the same.
    """
    kept = [(parameter, parameter.detach().clone()) for parameter in balance.parameters()]
    draws = torch.randint(-2, 3, (width,), generator=torch.Generator().manual_seed(0))
    factors = torch.exp2(draws.float()).to(before.device)
    balance.apply(factors)
    try:
        after = rerun()
        if before.dtype == torch.float16:
            return bool((after - before).abs().max() <= torch.finfo(torch.float16).eps * before.abs().max())
        return torch.equal(after, before)
    finally:
        with torch.no_grad():
            for parameter, values in kept:
                parameter.copy_(values)
