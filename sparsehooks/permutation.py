"""Channel permutation: an order of the channels in which N:M masks keep more (Pool and Yu 2021, NeurIPS 34).

Channels between two layers may be put in any order, if the layers that make them, their biases and the layers that
read them all follow; the model computes the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsehooks.coupling import Coupling, find_couplings, matrix
from sparsehooks.errors import SessionError
from sparsehooks.sharding import is_sharded

if TYPE_CHECKING:
    from sparsehooks.targets import Target

SWEEPS = 40
"""How often all stripes are paired anew."""
TOGETHER = 1 << 22
"""Elements that are compared at once."""


@torch.no_grad()
def permute_channels(model: nn.Module, targets: Iterable[Target], n: int, m: int, seed: int) -> dict[str, float]:
    """Reorder the channels that the targets read, so that N of each M neighbours keep as much magnitude as possible.

    Channels whose readers are convolutions with a kernel, the residual stream and the channels of attention heads keep
    their order.

    Args:
        model: changed in place; its outputs stay the same but for rounding.
        targets: the weights that shall be N:M.
        n: how many of each group stay.
        m: neighbours of a group; must divide the channels.
        seed: of the pairing of the stripes.

    Returns:
        for each coupling that was reordered the kept magnitude after, as a multiple of that before.

    Raises:
        SessionError: if the weights are sharded.
    """
    if is_sharded(model):
        raise SessionError("the channels of sharded weights (FSDP2) cannot be reordered; leave 'permute' out")
    names = {target.parameter for target in targets}
    gains = {}
    for coupling in find_couplings(model, "channel")[0]:
        readers = [w for w in coupling.weights if w.dim == 1 and w.parameter in names and w.size == 1]
        alone = all(w.size == 1 for w in coupling.members if w.dim == 1) and coupling.units % m == 0
        if not readers or not alone:
            continue
        read = [matrix(model, w.parameter).narrow(1, w.offset, coupling.units) for w in readers]
        magnitude = torch.cat([part.abs().float().to(read[0].device) for part in read])
        order = best_order(magnitude, n, m, seed)
        before = float(_kept(magnitude.T.reshape(-1, m, len(magnitude)), n).sum())
        after = float(_kept(magnitude[:, order].T.reshape(-1, m, len(magnitude)), n).sum())
        if after > before:
            reorder(model, coupling, order)
            gains[coupling.name] = after / before
    return gains


def best_order(magnitude: Tensor, n: int, m: int, seed: int) -> Tensor:
    """An order of the columns; what it keeps is never less than the order as it is.

    Stripes of M columns are paired at random, and the two of a pair share their 2 M columns out in the best of all
    ways; again and again.

    Args:
        magnitude: shape (rows, columns).
        n: how many of each group stay.
        m: columns of a stripe.
        seed: of the pairing.

    Returns:
        indices of columns, int64, shape (columns,).
    """
    generator = torch.Generator().manual_seed(seed)
    columns, rows = magnitude.T.contiguous(), magnitude.shape[0]
    stripes = torch.arange(len(columns)).reshape(-1, m)
    ways = torch.tensor(list(_ways(m)))
    chunk = max(1, TOGETHER // (len(ways) * 2 * m * rows))
    for _ in range(SWEEPS):
        shuffled = torch.randperm(len(stripes), generator=generator)[: len(stripes) // 2 * 2].reshape(-1, 2)
        for pairs in shuffled.split(chunk):
            both = stripes[pairs].flatten(1)
            shared_out = both[:, ways]
            kept = _kept(columns[shared_out].unflatten(2, (2, m)).flatten(0, 2), n)
            totals = kept.sum(dim=1).reshape(len(pairs), len(ways), 2).sum(dim=2)
            best = torch.where(totals.max(dim=1).values > totals[:, 0] * (1 + 1e-6), totals.argmax(dim=1), 0)
            stripes[pairs] = shared_out[torch.arange(len(pairs)), best.cpu()].unflatten(1, (2, m))
    return stripes.flatten()


def reorder(model: nn.Module, coupling: Coupling, order: Tensor) -> None:
    """Put the units of a coupling in another order, in everything that makes or reads them."""
    for member in coupling.members:
        part = member.part(matrix(model, member.parameter), coupling.units)
        index = (order[:, None] * member.size + torch.arange(member.size)).flatten().to(part.device)
        part.copy_(part.index_select(member.dim, index))


def _kept(groups: Tensor, n: int) -> Tensor:
    """What the N largest of each group add up to; groups of shape (groups, M, rows)."""
    return groups.topk(n, dim=1).values.sum(dim=1)


def _ways(m: int) -> Iterable[tuple[int, ...]]:
    """All ways to share 2 M columns out between two stripes, the one as it is first."""
    everything = range(2 * m)
    for first in itertools.combinations(everything, m):
        if first[0] == 0:  # the two stripes may be exchanged
            yield (*first, *(column for column in everything if column not in first))
