"""What plugins see: read-only views of a weight, a batch, a tensor in a file, and a session."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from sparsehooks.plan import Plan
    from sparsehooks.recipe import Recipe
    from sparsehooks.session import Session


@dataclass(frozen=True, eq=False)
class WeightView:
    """One prunable weight, as a criterion sees it.

    What a criterion asks for in ``needs`` is there, on the weight's device; the rest is None.

    Attributes:
        name: the parameter's name in the model.
        weight: the detached values as a matrix, shape (out_features, everything else), in the parameter's dtype.
        seed: a number fixed by the recipe's seed, the stage, the step and the name: equal on every rank.
        gradient: the dense gradient of the loss, shape of the weight; averaged over accumulated batches and ranks.
        momentum: the optimizer's running mean of the gradient, shape of the weight.
        input_norm: for each column the root mean square over all tokens that the attention mask does not exclude,
            float32, shape (columns,).
        gram: ``X^T X / tokens`` of the layer's inputs, undamped, float32, shape (columns, columns).
        influence: 1 - the mean cosine between input and output of the transformer block that holds the weight; 0 for
            weights outside of one.
        learned: what ``prepare`` made of this weight, as it is now.
        training: whether the layer is in training mode.
    """

    name: str
    weight: Tensor
    seed: int
    gradient: Tensor | None = None
    momentum: Tensor | None = None
    input_norm: Tensor | None = None
    gram: Tensor | None = None
    influence: float | None = None
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    training: bool = False

    def generator(self) -> torch.Generator:
        """A CPU random generator seeded with ``seed``."""
        import torch

        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Batch:
    """What a distiller sees of a batch besides the outputs.

    Attributes:
        inputs: the keyword arguments of the student's forward.
        shifts_labels: whether the model's own loss compares position i with label i + 1 (causal language models).
    """

    inputs: Mapping[str, Any]
    shifts_labels: bool = False

    def count(self) -> Tensor | None:
        """How many items of this batch the Trainer counts: labels other than -100, shifted where the loss shifts.

        None where the labels are not here.
        """
        targets = self.targets()
        return None if targets is None else (targets != -100).sum()

    def targets(self) -> Tensor | None:
        """The labels beside the outputs that they are compared with: shifted where the model's loss shifts.

        Of the shape of the labels, with -100 where nothing is compared; None where the labels are not here.
        """
        shifted: Tensor | None = self.inputs.get("shift_labels")
        labels: Tensor | None = self.inputs.get("labels")
        if shifted is not None or labels is None or not self.shifts_labels:
            return labels if shifted is None else shifted
        from torch.nn.functional import pad

        return pad(labels[..., 1:], (0, 1), value=-100)

    def mask(self, shape: Sequence[int]) -> Tensor | None:
        """Which tokens are real: bool, of ``shape`` (samples, tokens); None without an attention mask of that shape."""
        mask: Tensor | None = self.inputs.get("attention_mask")
        return None if mask is None or mask.shape != tuple(shape) else mask.bool()

    def items(self, values: Tensor) -> Tensor:
        """One value for each item that the Trainer counts.

        Args:
            values: shape (samples,), returned as it is, or (samples, tokens).

        Returns:
            shape (items,). With token labels: the values at labels other than -100 (shifted where the model's loss
            shifts). Without: the mean over each sample's tokens that the attention mask does not exclude.
        """
        if values.dim() == 1:
            return values
        targets = self.targets()
        if targets is not None and targets.shape == values.shape:
            return values[targets != -100]
        mask = self.mask(values.shape)
        if mask is None:
            return values.mean(dim=1)
        weights: Tensor = mask.to(values.dtype)
        return (values * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


@dataclass(frozen=True, eq=False)
class Layout:
    """What a codec knows of a chunk, the piece of a tensor that is encoded at once, before it reads any bytes.

    Attributes:
        dtype: the safetensors name of the tensor's dtype ("F32", "BF16", "I8", ...).
        rows: rows of the chunk, by the tensor's first dimension; 1 if the chunk is shorter than a row of the tensor.
        columns: elements of a row, over all other dimensions.
        count: how many values are kept; ``rows * columns`` without a position codec.
        positions: where they lie in the chunk, flat and ascending (intp); None if every element has a value. Only
            codecs of values receive it.
    """

    dtype: str
    rows: int
    columns: int
    count: int
    positions: np.ndarray | None = None

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.rows * self.columns

    @property
    def bits(self) -> np.dtype[Any]:
        """The unsigned integers that hold the bits of a value: "<u2" for "BF16"."""
        import numpy as np

        width = 8 if self.dtype == "BOOL" else int(re.findall(r"\d+", self.dtype)[0])
        return np.dtype(f"<u{width // 8}")

    def row_counts(self) -> np.ndarray:
        """How many of the values lie in each row; int64, shape (rows,)."""
        import numpy as np

        if self.positions is None:
            return np.full(self.rows, self.columns, np.int64)
        starts = np.arange(self.rows + 1, dtype=np.int64) * self.columns
        return np.diff(np.searchsorted(self.positions, starts))


class SessionView:
    """What plugins see of a session; read-only."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self._session.plan.recipe

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self._session.plan

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self._session.step

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self._session.total_steps

    @property
    def rank(self) -> int:
        """The rank of this process: let only rank 0 write."""
        from sparsehooks.distributed import rank

        return rank()

    @property
    def sparsity(self) -> float:
        """The share of zeros among all weights that this run prunes."""
        return self._session.sparsity

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """The mask of each pruned parameter: bool, of its shape, True where a weight stays. Do not write to them."""
        return MappingProxyType(self._session.masks.masks)
