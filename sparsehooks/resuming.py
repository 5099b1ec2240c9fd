"""What a resumed run needs: the state of a session, of which run it is, and the optimizer that carries it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakSet

import torch

from sparsehooks.activations import Activations
from sparsehooks.components import ComponentBase, Schedule
from sparsehooks.distillation import Distillation
from sparsehooks.errors import SessionError
from sparsehooks.learned import Learned
from sparsehooks.plan import Plan
from sparsehooks.pruning import Masks
from sparsehooks.quantizing import QuantizeRun
from sparsehooks.running import PruneRun

VERSION = 1
KEY = "sparsehooks"
"""Where the state travels: this key of the optimizer's first parameter group, which every loop saves and restores."""
ATTACHED: WeakSet[torch.optim.Optimizer] = WeakSet()
"""The optimizers of all runs that have not ended."""

Objects = Mapping[int, Mapping[str, ComponentBase]]
"""The components of each stage, by its index and their key."""


@dataclass(frozen=True)
class Origin:
    """Of which run a state is.

    Attributes:
        recipe: its digest.
        windows: the first and last step of each schedule; lists, as a checkpoint brings them back.
        total_steps: of the run.
    """

    recipe: str
    windows: list[list[int]]
    total_steps: int

    @classmethod
    def of(cls, plan: Plan, objects: Objects, total_steps: int) -> Origin:
        """From the schedules among the components of a plan."""
        schedules = [
            cast(Schedule, objects[stage.index]["schedule"]) for stage in plan.stages if "schedule" in stage.components
        ]
        windows = [list(schedule.window(total_steps)) for schedule in schedules]
        return cls(plan.recipe.digest(), windows, total_steps)

    def to_plain(self) -> dict[str, Any]:
        """The part of a state that ``check`` reads."""
        return {"version": VERSION, "recipe": self.recipe, "windows": self.windows}

    def check(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The state, if it is one of this run.

        Raises:
            SessionError: if it is of another version, recipe or length.
        """
        if state["version"] != VERSION:
            raise SessionError(f"the checkpoint has session state of version {state['version']}; upgrade sparsehooks")
        if state["recipe"] != self.recipe:
            raise SessionError("the checkpoint was made with another recipe; resume with that one, or start a new run")
        if state["windows"] != self.windows:
            raise SessionError(
                f"the checkpoint belongs to a run of another length than {self.total_steps} steps, in which the "
                "schedules fall on other steps; resume with that length, or give 'start' and 'end' in steps"
            )
        return state


@dataclass(frozen=True)
class Parts:
    """What has state in a session, but for its progress; stages by their index."""

    objects: Objects
    masks: Masks
    learned: Learned
    distillation: Distillation
    activations: Activations
    pruning: Mapping[int, PruneRun]
    quantizing: Mapping[int, QuantizeRun]

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        components = {
            f"{index}.{key}": state
            for index, objects in self.objects.items()
            for key, component in objects.items()
            if (state := component.state_dict())
        }
        return {
            "masks": self.masks.state_dict(),
            "components": components,
            "distillation": self.distillation.state_dict(),
            "learned": self.learned.state_dict(),
            "activations": self.activations.state_dict(),
            "pruning": {index: pruning.state_dict() for index, pruning in self.pruning.items()},
            "alive": sorted(self.masks.alive),
            "undo": self.masks.undo_state(),
            "quantizing": {index: quantizing.state_dict() for index, quantizing in self.quantizing.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.masks.load_state_dict(state["masks"])
        for index, objects in self.objects.items():
            for key, component in objects.items():
                component.load_state_dict(state["components"].get(f"{index}.{key}", {}))
        self.distillation.load_state_dict(state["distillation"])
        self._load_quantizing(state)
        self.activations.load_state_dict(state["activations"])
        self.learned.load_state_dict(state["learned"])
        for index, pruning in self.pruning.items():
            pruning.load_state_dict(state["pruning"][index])
        self.masks.alive = set(state["alive"])
        self.masks.load_undo_state(state["undo"])

    def load_learned(self, state: Mapping[str, Any]) -> None:
        """Take back only the masks, the grids and what was learned."""
        self.masks.load_state_dict(state["masks"])
        self._load_quantizing(state)
        self.learned.load_state_dict(state["learned"])

    def _load_quantizing(self, state: Mapping[str, Any]) -> None:
        for index, quantizing in self.quantizing.items():
            quantizing.load_state_dict(state["quantizing"][index])


class Carrier:
    """The optimizer of a run: its first parameter group carries the state, which every loop saves and restores.

    Args:
        optimizer: the user's; None without training.
        carries: whether it does; the state of a run on sharded weights is no part of an optimizer's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None, *, carries: bool = True) -> None:
        self._optimizer = optimizer
        self._carries = carries

    def check_free(self, *, new: bool) -> None:
        """Refuse an optimizer that another run has.

        Raises:
            SessionError: if one is attached to it, or, of a new run, if it carries the state of one.
        """
        optimizer = self._optimizer
        if optimizer is not None and (optimizer in ATTACHED or (new and KEY in optimizer.param_groups[0])):
            raise SessionError(
                "another run of sparsehooks is attached to this optimizer; put all stages into one recipe and one "
                "callback, or call detach() on the callback of a run that broke off"
            )

    def attach(self) -> None:
        """The run has begun."""
        if self._optimizer is not None:
            ATTACHED.add(self._optimizer)

    def detach(self) -> None:
        """The run has ended."""
        if self._optimizer is not None:
            self._optimizer.param_groups[0].pop(KEY, None)
            ATTACHED.discard(self._optimizer)

    def read(self, which: str = "that was loaded") -> dict[str, Any]:
        """The state that it carries.

        Args:
            which: checkpoint it comes from, for the message.

        Raises:
            SessionError: if it carries none.
        """
        return state_in({} if self._optimizer is None else vars(self._optimizer), which)

    def write(self, state: Callable[[], dict[str, Any]]) -> None:
        """Have it carry this state, if it does carry any."""
        if self._optimizer is not None and self._carries:
            self._optimizer.param_groups[0][KEY] = state()


def step_in(optimizer: torch.optim.Optimizer) -> int:
    """How many steps the run has finished whose state an optimizer carries; 0 if it carries none."""
    step: int = optimizer.param_groups[0].get(KEY, {}).get("step", 0)
    return step


def state_in(optimizer: Mapping[str, Any], which: str = "that was loaded") -> dict[str, Any]:
    """The state of a session that an optimizer's state dict carries.

    Raises:
        SessionError: if it carries none.
    """
    state = optimizer.get("param_groups", [{}])[0].get(KEY)
    if state is None:
        raise SessionError(
            f"the checkpoint {which} carries no state of sparsehooks (it has no optimizer state, or was made "
            "without the recipe); resume from one that does, or start a new run from its weights"
        )
    return state  # type: ignore[no-any-return]
