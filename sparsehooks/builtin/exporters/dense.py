"""The ordinary dense model."""

from __future__ import annotations

from pathlib import Path

from sparsehooks import Exporter, decompress


class Dense(Exporter):
    """The model that ``decompress`` writes, for programs that read safetensors."""

    files = ("*.safetensors",)

    def export(self, folder: Path, out: Path) -> str:
        """Bit for bit; a model that has shrunk, or whose activations are sparse, still needs sparsehooks to open."""
        made = decompress(folder, out / ".dense")
        for path in list(made.iterdir()):
            path.rename(out / path.name)
        made.rmdir()
        return "every weight dense, bit for bit"
