"""Backends for CPUs: what of a sparse weight is not zero, multiplied by compiled kernels."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from sparsehooks import Backend, Steps, Support, read_grid
from sparsehooks_cpu.library import Packed, library, multiply, problem
from sparsehooks_cpu.packing import interleave, units

STEPS = Steps(8)
LEAST = 0.25
"""The share of blocks that are zero: with fewer, dense kernels were never slower."""
WIDEST = 1 << 16
"""Input features for which sums of products of 8 bits fit 32 bits."""


class _Sparse(Backend):
    """What the three share."""

    kernel: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]]
    block: ClassVar[int]
    feature: ClassVar[str] = ""

    def _refusal(self, layer: nn.Linear, device: torch.device) -> str | None:
        """Why not, as far as it is seen without looking at the weight's numbers."""
        if device.type != "cpu":
            return f"its kernels run on CPUs, not on {device.type}"
        if layer.weight.dtype not in self.dtypes:
            return f"its weight is {layer.weight.dtype}, not {' or '.join(map(str, self.dtypes))}"
        return problem(self.kernel, self.feature)

    def _answer(self, blocks: Tensor, *, exact: bool) -> Support:
        """Yes, unless the weight has too few zeros."""
        zeros = 1 - int(blocks.count_nonzero()) / max(1, blocks.numel())
        if zeros >= LEAST:
            return Support(ok=True, exact=exact, depends=f"{library().variant}, {round(zeros * 20) * 5} % zero blocks")
        what = "weights" if self.block == 1 else f"blocks of 1x{self.block} weights"
        return Support(ok=False, reason=f"only {zeros:.0%} of its {what} are zero, of which {LEAST:.0%} or more pay")

    def _pack(
        self, layer: nn.Linear, blocks: Tensor, scales: Tensor | None = None, sums: Tensor | None = None
    ) -> Packed:
        rows, columns = layer.weight.shape
        bias = torch.zeros(rows) if layer.bias is None else layer.bias.detach().to(torch.float32, copy=True)
        return Packed(*interleave(blocks), bias, scales, sums, rows, columns)

    def run(self, packed: Packed, input: Tensor) -> Tensor:  # noqa: A002
        """The products of what is not zero."""
        return multiply(self.kernel, packed, input)


class Unstructured(_Sparse):
    """Linear layers in float32, of which only the weights that are not zero are multiplied, wherever they are.

    Outputs are those of the dense layer but for the order of sums: for any number of tokens, on any CPU. What is not
    finite does not reach outputs that have no weight for it; with few tokens an infinity may come out as NaN.
    """

    kernel = "float32"
    dtypes = (torch.float32,)
    block = 1

    def supports(self, layer: nn.Linear, device: torch.device) -> Support:
        """Yes for float32 weights of which at least a quarter is zero."""
        if reason := self._refusal(layer, device):
            return Support(ok=False, reason=reason)
        return self._answer(layer.weight.detach(), exact=True)

    def pack(self, layer: nn.Linear) -> Packed:
        """The weights that are not zero, with their places."""
        return self._pack(layer, units(layer.weight.detach()))


class Pair(_Sparse):
    """Linear layers whose weights are zero in blocks of 1x2 (pattern ``block``, of height 1 and width 2), in bfloat16.

    Weights and inputs of float32 layers are rounded to bfloat16; products are added in float32 (AVX512-BF16).
    """

    kernel = "bfloat16"
    dtypes = (torch.bfloat16, torch.float32)
    block = 2
    feature = "avx512_bf16"

    def supports(self, layer: nn.Linear, device: torch.device) -> Support:
        """Yes if at least a quarter of the blocks is zero; exact where the layer is in bfloat16."""
        if reason := self._refusal(layer, device):
            return Support(ok=False, reason=reason)
        return self._answer(self._blocks(layer), exact=layer.weight.dtype == torch.bfloat16)

    def pack(self, layer: nn.Linear) -> Packed:
        """The blocks that are not zero, with their places."""
        return self._pack(layer, self._blocks(layer))

    def _blocks(self, layer: nn.Linear) -> Tensor:
        return units(layer.weight.detach().to(torch.bfloat16))


class Quad(_Sparse):
    """Linear layers whose weights lie on a symmetric int8 grid of rows and are zero in blocks of 1x4.

    Inputs are rounded to 8 bits, with a scale and a zero point for each token, as ``activation = {use = "int8",
    symmetric = false}`` does (``sparsehooks.Steps``); products are added as integers (AVX512-VNNI).
    """

    rounds_inputs = True
    kernel = "int8"
    dtypes = (torch.float32,)
    block = 4
    feature = "avx512_vnni"

    def supports(self, layer: nn.Linear, device: torch.device) -> Support:
        """Yes for float32 weights on such a grid, of whose blocks at least a quarter is zero."""
        reason = self._refusal(layer, device)
        if reason is None and layer.in_features > WIDEST:
            reason = f"its {layer.in_features} input features are more than {WIDEST}, so that sums might overflow"
        if reason is None and read_grid(layer.weight, STEPS) is None:
            reason = "its weight lies on no int8 grid of rows; quantize it by int8"
        if reason is not None:
            return Support(ok=False, reason=reason)
        return self._answer(units(self._codes(layer)[0]), exact=False)

    def pack(self, layer: nn.Linear) -> Packed:
        """The blocks of codes that are not zero, with their places, and the scales."""
        codes, scales = self._codes(layer)
        return self._pack(layer, units(codes), scales, codes.sum(dim=1, dtype=torch.int32))

    def _codes(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        weight = layer.weight.detach()
        grid = read_grid(weight, STEPS)
        assert grid is not None, "supports() has read the grid"
        return STEPS.codes(weight, grid["scales"], None).to(torch.int8), grid["scales"].flatten()
