"""What the ranks of a run have to agree on; on one process, nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from sparsehooks.errors import SessionError, SparseHooksError

T = TypeVar("T")


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def agree(value: Callable[[], str], disagreement: str) -> None:
    """Compare a value over the ranks; on one process it is not even made.

    Raises:
        SessionError: ``disagreement``, if they differ.
    """
    if world_size() > 1 and len(set(gathered(value()))) > 1:
        raise SessionError(disagreement)


def gathered(value: T) -> list[T]:
    """The values of all ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def once(make: Callable[[], T]) -> T:
    """The result of a call that rank 0 alone makes, on every rank.

    Raises:
        SessionError: on the other ranks, if the call raised anything; rank 0 raises that.
    """
    if world_size() == 1:
        return make()
    results: list[Any] = [None, None]
    try:
        if rank() == 0:
            results[0] = make()
    except BaseException as error:
        known = isinstance(error, SparseHooksError)
        results[1] = str(error) if known else f"rank 0 failed with {type(error).__name__}: {error}"
        raise
    finally:  # the other ranks wait for it in any case
        dist.broadcast_object_list(results)
    if results[1] is not None:
        raise SessionError(results[1])
    return results[0]  # type: ignore[no-any-return]


def average(tensor: Tensor) -> None:
    """Average a tensor over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= world_size()


def seed_of(*parts: int | str) -> int:
    """A seed fixed by its parts, equal on every rank and below 2**63."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
