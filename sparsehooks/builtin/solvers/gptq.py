"""GPTQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparsehooks import Choose, LayerProblem, Quantize, Solver
from sparsehooks.builtin.solvers.damping import Options as Damping
from sparsehooks.builtin.solvers.sparsegpt import eliminate


@dataclass(frozen=True)
class Options(Damping):
    """The options of GPTQ.

    Attributes:
        order: in which columns are fixed: as they lie ("given"), or the largest inputs first ("activation"), while the
            rest can still make up for them. The groups of a grid stay where they are.
    """

    order: Literal["given", "activation"] = "activation"


class GPTQ(Solver):
    """Column by column: what rounding leaves behind is moved into the columns that follow (arXiv:2210.17323).

    What stays of a sparse weight is asked for at once, before anything moves; of the inverse of the Gram matrix it is
    told what uncorrelated inputs would have.
    """

    Config = Options
    config: Options

    def solve(self, layer: LayerProblem, choose: Choose, quantize: Quantize | None = None) -> tuple[Tensor, Tensor]:
        """The same elimination as SparseGPT's, with a mask that is fixed."""
        gram, columns = layer.gram, layer.weight.shape[1]
        mask = choose(0, columns, layer.weight, 1 / gram.diagonal().clamp(min=1e-12))
        if self.config.order == "given":
            solved, _ = eliminate(layer, lambda start, stop, *_: mask[:, start:stop], quantize, self.config.damping)
            return solved, mask
        order = gram.diagonal().argsort(descending=True, stable=True)
        permuted = LayerProblem(layer.name, layer.weight[:, order], gram[order][:, order])
        sorted_mask, places = mask[:, order], order.tolist()
        solved, _ = eliminate(
            permuted, lambda start, stop, *_: sorted_mask[:, start:stop], quantize, self.config.damping, places
        )
        return solved[:, order.argsort()], mask
