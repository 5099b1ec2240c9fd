"""Watch a run of sparsehooks in TensorBoard: sparsity, masks, stages and metrics.

An observer: it reads the session and writes event files, and the weights of a run are the same with and without it.
Importing this module imports neither torch nor TensorBoard.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from sparsehooks import hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from torch import Tensor

    from sparsehooks import MaskChange, SessionView

__version__ = "0.1.0"

FOLDER = "SPARSEHOOKS_TENSORBOARD_DIR"
"""The environment variable that says where the event files go."""

DEFAULT_FOLDER = "runs/sparsehooks"

SIDE = 256
"""Pixels of a mask's image, at most, in either direction."""


class TensorBoard:
    """Writes what a session reports to event files, on rank 0.

    Scalars ``sparsity`` (of all pruned weights), ``sparsity/PARAMETER`` and ``metrics/NAME``; images
    ``masks/PARAMETER``, in which white stays and black is gone; texts ``stages``. The step is the number of finished
    optimizer steps.

    Args:
        folder: where to write; without it the environment variable ``SPARSEHOOKS_TENSORBOARD_DIR`` decides, when a
            session starts, and without that ``runs/sparsehooks``.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = folder
        self._writers: WeakKeyDictionary[SessionView, Any] = WeakKeyDictionary()

    @hookimpl
    def session_started(self, session: SessionView) -> None:
        """Open the writer."""
        if session.rank != 0:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = self._folder or os.environ.get(FOLDER) or DEFAULT_FOLDER
        # what an interrupted run wrote after the checkpoint that this one resumes from did not happen
        purge = session.step + 1 if session.step else None
        self._writers[session] = SummaryWriter(os.fspath(folder), purge_step=purge)

    @hookimpl
    def stage_changed(
        self, session: SessionView, stage: str, status: Literal["started", "finished", "skipped"]
    ) -> None:
        """Say which stage did what."""
        writer = self._writers.get(session)
        if writer is not None:
            writer.add_text("stages", f"{stage}: {status}", session.step)
            writer.flush()  # a process that dies closes nothing

    @hookimpl
    def masks_updated(self, session: SessionView, step: int, changes: Mapping[str, MaskChange]) -> None:
        """Write the sparsity of everything and of each parameter, and the masks that changed."""
        writer = self._writers.get(session)
        if writer is None:
            return
        writer.add_scalar("sparsity", session.sparsity, step)
        for name, change in changes.items():
            writer.add_scalar(f"sparsity/{name}", 1 - change.kept / max(1, change.total), step)
            if change.pruned or change.grown:
                writer.add_image(f"masks/{name}", picture(session.masks[name]), step, dataformats="HW")
        writer.flush()

    @hookimpl
    def metrics_reported(self, session: SessionView, metrics: Mapping[str, float]) -> None:
        """Write the numbers of an evaluation."""
        writer = self._writers.get(session)
        if writer is None:
            return
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(f"metrics/{name}", value, session.step)
        writer.flush()

    @hookimpl
    def session_finished(self, session: SessionView, error: BaseException | None) -> None:
        """Close the writer, also after a failure."""
        writer = self._writers.pop(session, None)
        if writer is None:
            return
        if error is not None:
            writer.add_text("stages", f"failed: {type(error).__name__}: {error}", session.step)
        writer.close()


def picture(mask: Tensor) -> np.ndarray:
    """A mask as a grey image: 255 where every weight stays, 0 where none does, the share that stays in between.

    Args:
        mask: bool, any shape; all dimensions after the first become the columns.

    Returns:
        uint8, at most 256 x 256. A larger mask is cut into blocks of nearly equal size, one a pixel.
    """
    import numpy as np

    matrix = mask.cpu().numpy().reshape(mask.shape[0], -1) if mask.dim() else mask.cpu().numpy().reshape(1, 1)
    kept: np.ndarray = matrix
    area = np.ones((1, 1), dtype=np.int64)
    for axis, size in enumerate(matrix.shape):
        pixels = min(size, SIDE)
        edges = np.arange(pixels) * size // pixels
        kept = np.add.reduceat(kept, edges, axis=axis, dtype=np.int64)
        area = area * np.expand_dims(np.diff(edges, append=size), 1 - axis)
    return np.round(kept / area * 255).astype(np.uint8)


plugin = TensorBoard()
"""What the entry point names."""
