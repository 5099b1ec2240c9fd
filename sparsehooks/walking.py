"""A model's blocks, run one after the other on what those before them gave."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsehooks.batches import Batches
from sparsehooks.collecting import Collector
from sparsehooks.errors import SessionError
from sparsehooks.masks import check_finite
from sparsehooks.targets import Target


class IrregularBlocksError(SessionError):
    """Blocks that cannot run one after the other; they are measured by whole forwards then."""


class Blocks:
    """A list of transformer blocks, each run on what those before it gave.

    Args:
        batches: of the model.
        name: of the ``nn.ModuleList``.
    """

    def __init__(self, batches: Batches, name: str) -> None:
        self._batches = batches
        self.model = batches.model
        self.name = name
        self.blocks = list(cast(nn.ModuleList, batches.model.get_submodule(name)))
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._hidden: list[Any] = []
        for index in range(len(batches)):
            self._catch(index)

    def run(self, block: int, collector: Collector | None = None, limit: int | None = None) -> list[Any]:
        """The outputs of a block on all batches, or on the first ones."""
        outputs = []
        with collector.hooked() if collector else contextlib.nullcontext():
            for index, hidden in enumerate(self._hidden[:limit]):
                if collector:
                    collector.batch(self._batches.padding(index))
                args, kwargs = self._calls[index][block]
                output = self.blocks[block](
                    *(hidden if item is _HIDDEN else item for item in args),
                    **{key: hidden if item is _HIDDEN else item for key, item in kwargs.items()},
                )
                outputs.append(output[0] if isinstance(output, tuple) else output)
        return outputs

    def advance(self, outputs: list[Any]) -> None:
        """What goes into the next block."""
        self._hidden = outputs

    def influence(self, outputs: Sequence[Tensor]) -> float:
        """1 - the mean cosine between what goes into a block and what comes out."""
        total, tokens = 0.0, 0
        for index, (before, after) in enumerate(zip(self._hidden, outputs, strict=True)):
            cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            mask = self._batches.padding(index).of(self.name)
            if mask is not None and mask.shape == cosine.shape:
                cosine = cosine[mask]
            total, tokens = total + float(cosine.sum()), tokens + cosine.numel()
        check_finite(f"activations of the blocks in '{self.name}'", torch.tensor(total), "look at the calibration data")
        return 1 - total / tokens

    def _catch(self, index: int) -> None:
        """One whole forward: with what each block is called, and where the output of the one before it stands."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        last: list[Any] = []
        first: list[Any] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(calls) == len(self.blocks):
                raise IrregularBlocksError(f"the blocks in '{self.name}' run more than once in a forward")
            if not calls:
                first.append(args[0] if args else next(iter(kwargs.values())))
            hidden = last[0] if last else first[0]
            values = (*args, *kwargs.values())
            if not any(value is hidden for value in values):
                raise IrregularBlocksError(f"a block in '{self.name}' does not receive what the one before it gave")
            calls.append(
                (
                    tuple(_HIDDEN if item is hidden else item for item in args),
                    {key: _HIDDEN if item is hidden else item for key, item in kwargs.items()},
                )
            )

        def after(_: nn.Module, __: Any, output: Any) -> None:
            last[:] = [output[0] if isinstance(output, tuple) else output]

        handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in self.blocks]
        handles += [block.register_forward_hook(after) for block in self.blocks]
        try:
            self._batches.forward(index)
        finally:
            for handle in handles:
                handle.remove()
        if len(calls) != len(self.blocks):
            raise IrregularBlocksError(f"not every block in '{self.name}' runs in a forward")
        self._calls.append(calls)
        self._hidden.append(first[0])


_HIDDEN = object()


def block_lists(batches: Batches, targets: Iterable[Target]) -> list[str]:
    """The outermost module lists that hold targets, in the order in which they run: an encoder before its decoder."""
    names = [name for target in targets for name in target.modules]
    lists = [
        name
        for name, module in batches.model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and any(n.startswith(f"{name}.") for n in names)
    ]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    order = batches.order(f"{name}.0" for name in outer) if len(outer) > 1 else {}
    return sorted(outer, key=lambda name: order.get(f"{name}.0", len(order)))
