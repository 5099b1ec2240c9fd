"""Codecs, bits and tensors that the tests of encoded tensors share."""

from __future__ import annotations

import numpy as np
import reader
import torch

from sparsehooks import Layout, from_codes, row_scales, to_codes
from sparsehooks.artifact.header import DTYPES
from sparsehooks.plugins import PluginManager

RECORDS = [record for record in PluginManager(autoload=False).catalog.records() if record.component.kind == "codec"]
CODECS = {record.component.name: record.load()() for record in RECORDS}
FLOATS = ["F32", "BF16", "F16"]
"""The dtypes that pruned weights have."""
WIDTHS = [2, 3, 4, 5, 6, 7, 8]
"""The bits of a code on an integer grid."""
SIGNED_ZEROS = ["F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2"]
"""The dtypes that have -0.0."""


def dtype_name(dtype):
    return next(name for name, (other, _) in DTYPES.items() if other == dtype)


def bits(tensor):
    """The bits of a tensor as unsigned integers."""
    return tensor.contiguous().view(DTYPES[dtype_name(tensor.dtype)][1])


def same_bits(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(bits(left), bits(right))


def from_bits(array, name, shape):
    return torch.from_numpy(array).view(DTYPES[name][0]).view(shape)


def random_bits(name, count, seed=0):
    """Any bits that the dtype has, as the unsigned integers that codecs get."""
    rng = np.random.default_rng(seed)
    if name == "BOOL":
        return rng.integers(0, 2, count, dtype=np.uint8)
    unsigned = Layout(name, 1, 1, 1).bits
    return rng.integers(0, 256, count * unsigned.itemsize, dtype=np.uint8).view(unsigned)


def without_signed_zeros(tensor):
    """What comes back of a tensor: -0.0 is a zero like any other."""
    if dtype_name(tensor.dtype) not in SIGNED_ZEROS:
        return tensor
    array = bits(tensor).numpy()
    return from_bits(np.where(array << 1 == 0, 0, array), dtype_name(tensor.dtype), tensor.shape)


def read_plainly(name, part, layout):
    """What the reader that follows docs/format.md alone makes of a part."""
    stream, count = reader.Part(part), layout.count
    if CODECS[name].role == "positions":
        found = reader.positions_of(name, stream, count, layout.size, layout.columns)
    else:
        places = range(count) if layout.positions is None else layout.positions.tolist()
        found = reader.values_of(name, stream, count, layout.dtype, places, layout.size, layout.columns)
    assert not stream.read()
    return list(found)


def code_max(width):
    return 2 ** (width - 1) - 1


def quantized(weight, width=8):
    """The nearest values on an integer grid."""
    scales = row_scales(weight, code_max(width))
    return from_codes(to_codes(weight, scales, code_max(width)), scales, weight.dtype)


def pruned(shape, sparsity, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < sparsity, 0.0, weight).to(dtype)


def n_of_m(shape, n, m, dtype=torch.float32, seed=0, missing=0.0):
    """N:M sparsity; a share of the survivors is zero as well."""
    weight = pruned(shape, 0, seed=seed)
    groups = weight.view(-1, m)
    mask = torch.zeros_like(groups).scatter_(1, groups.abs().topk(n, 1).indices, 1.0).view(shape)
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= missing
    return torch.where(mask.bool() & keep, weight, 0.0).to(dtype)
