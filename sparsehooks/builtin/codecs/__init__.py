"""The built-in codecs: how tensors lie in the file."""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer the codecs."""
    for name, target, summary in (
        ("bitmap", "bitmap:Bitmap", "positions: one bit an element"),
        ("gap-bytes", "gaps:GapBytes", "positions: the gaps between them, a byte each"),
        ("gaps", "gaps:Gaps", "positions: the gaps between them, Golomb-Rice coded"),
        ("n:m", "n_of_m:NOfM", "positions: N of each M neighbours, 0.65 bits an element for 2:4"),
        ("submatrix", "submatrix:Submatrix", "positions: within the rows and columns that are not all zero"),
        ("raw", "raw:Raw", "values: as they are"),
        ("int", "integer:Integer", "values on a symmetric integer grid: 2 to 8 bits each and a scale a row"),
        ("grid", "grid:Grid", "values on a grid: 2 to 8 bits each and a scale for each tensor, row, group or column"),
        ("codebook", "codebook:Codebook", "values of which at most 256 differ: a table and indices"),
        ("exponent", "exponent:Exponent", "values with short codes for the frequent exponents"),
        ("int-entropy", "integer:IntegerEntropy", "integer codes, entropy-coded"),
        ("grid-entropy", "grid:GridEntropy", "codes of a grid, entropy-coded"),
        ("codebook-entropy", "codebook:CodebookEntropy", "a table and indices, entropy-coded"),
        ("exponent-entropy", "exponent:ExponentEntropy", "values with entropy-coded exponents"),
        ("entropy", "entropy:Entropy", "values of one byte, entropy-coded"),
    ):
        registry.add(Component("codec", name, f"sparsehooks.builtin.codecs.{target}", summary))
