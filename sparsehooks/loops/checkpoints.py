"""The state of a session in a file beside a checkpoint, where the optimizer cannot carry it (sharded parameters)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparsehooks.artifact.atomic import atomic_file
from sparsehooks.distributed import once
from sparsehooks.errors import SessionError
from sparsehooks.session import Session

STATE = "sparsehooks.pt"


def write_state(session: Session, folder: str | Path) -> None:
    """Keep the state, which is the same on every rank, in the folder of a checkpoint; every rank has to call it.

    Raises:
        SessionError: if the folder cannot be written.
    """
    once(lambda: _write(session.state_dict(), Path(folder)))


def read_state(folder: str | Path) -> dict[str, Any]:
    """What ``write_state`` kept.

    Raises:
        SessionError: if it is not there, or damaged.
    """
    path = Path(folder) / STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SessionError(
            f"'{path}' is missing, which holds the masks of a run on sharded weights; resume from a checkpoint of this "
            "recipe in the output folder, or from any with sparsehooks.attach_trainer(trainer, recipe)"
        ) from None
    except Exception as error:
        raise SessionError(f"'{path}' is damaged ({error}); resume from another checkpoint") from error
    return state


def _write(state: dict[str, Any], folder: Path) -> None:
    try:
        with atomic_file(folder / STATE) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:
        raise SessionError(f"the state of the run cannot be kept in '{folder}': {error}") from error
