"""Layers visited in the order in which they run, each with what enters it once all before it have changed.

A transformer is walked block by block: the inputs of the first block are caught; then each block is measured on what
the changed blocks before it give, changed, and run again. So only one block's statistics are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from sparsehooks.batches import Batches
from sparsehooks.collecting import Collector
from sparsehooks.components import Need
from sparsehooks.targets import Target
from sparsehooks.walking import Blocks, IrregularBlocksError, block_lists

Evidence = Mapping[str, Mapping[str, Any]]
"""What is known of each weight, by its name: fields of ``WeightView``."""
Visit = Callable[[Sequence[Target], Evidence, "Rerun | None"], None]
"""What is done with layers that are measured together."""


class Rerun:
    """A block, to be run again on the first calibration batch.

    Attributes:
        name: of the block's module.
    """

    def __init__(self, walk: Blocks, block: int) -> None:
        self._walk, self._block = walk, block
        self.name = f"{walk.name}.{block}"

    def __call__(self) -> Tensor:
        """What comes out."""
        output: Tensor = self._walk.run(self._block, limit=1)[0]
        return output


def collect(batches: Batches, targets: Sequence[Target], needs: Collection[Need] = ()) -> Evidence:
    """What enters all targets at once, by forwards of the whole model."""
    collector = Collector(batches.model, targets, needs)
    with collector.hooked():
        for index in range(len(batches)):
            collector.batch(batches.padding(index))
            batches.forward(index)
    return {target.parameter: collector.evidence(target) for target in targets}


def in_order(batches: Batches, targets: Sequence[Target], visit: Visit, needs: Collection[Need]) -> None:
    """Visit all targets: those of a block together, others one by one.

    Args:
        batches: of the model.
        targets: of a stage.
        visit: may change the weights of its targets.
        needs: what it wants to know of the inputs and the blocks.

    Raises:
        IrregularBlocksError: if the influence is wanted of blocks that cannot run one after the other.
    """
    left = list(targets)
    for name in block_lists(batches, targets):
        mine = [target for target in left if inside(target, name)]
        try:
            walk = Blocks(batches, name)
        except IrregularBlocksError:
            if Need.INFLUENCE in needs:
                raise
            continue
        left = [target for target in left if target not in mine]
        _blocks(walk, mine, visit, needs)
    order = batches.order(name for target in left for name in target.modules) if left else {}
    for target in sorted(left, key=lambda t: min(order.get(name, len(order)) for name in t.modules)):
        evidence = collect(batches, [target], needs)
        visit([target], {name: {"influence": 0.0, **found} for name, found in evidence.items()}, None)


def inside(target: Target, name: str) -> bool:
    """Whether a target lies in the module of this name, or is it."""
    return any(module.startswith(f"{name}.") or module == name for module in target.modules)


def _blocks(walk: Blocks, targets: Sequence[Target], visit: Visit, needs: Collection[Need]) -> None:
    if not targets:
        return
    name = walk.name
    last = max(i for i in range(len(walk.blocks)) if any(inside(t, f"{name}.{i}") for t in targets))
    for block in range(last + 1):
        mine = [target for target in targets if inside(target, f"{name}.{block}")]
        if mine:
            collector = Collector(walk.model, mine, needs)
            outputs = walk.run(block, collector)
            more = {"influence": walk.influence(outputs)} if Need.INFLUENCE in needs else {}
            evidence = {target.parameter: {**collector.evidence(target), **more} for target in mine}
            del collector
            visit(mine, evidence, Rerun(walk, block))
        if block < last:
            walk.advance(walk.run(block))
