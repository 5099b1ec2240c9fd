"""Every hook, in the order in which a run calls them: the plugin author's contract.

Hooks say what exists and what happened; components do the work. Observers get a read-only view of the session and
change nothing: a run with and without them ends with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pluggy

if TYPE_CHECKING:
    from sparsehooks.catalog import Registry
    from sparsehooks.masks import MaskChange
    from sparsehooks.plan import Plan
    from sparsehooks.views import SessionView

PROJECT = "sparsehooks"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

StageStatus = Literal["started", "finished", "skipped"]


@hookspec
def register_components(registry: Registry) -> None:
    """Offer components by name.

    Called once a catalog, before torch is imported. Each plugin is called on its own, so that every component knows
    its owner; wrappers are refused.

    :param registry: call ``registry.add(Component(...))`` once for each component.
    """


@hookspec(firstresult=True)
def load_recipe(path: Path) -> Mapping[str, Any] | None:
    """Read a recipe file that is not TOML.

    Called by ``Recipe.load``. Stops at the first result that is not None; the built-in TOML reader is tried last.

    :param path: the file.
    :return: the recipe as a mapping of plain values, or None if this plugin does not know the file.
    """


@hookspec
def check_plan(plan: Plan) -> Iterable[str] | None:
    """Object to a plan.

    Called once a run, before the model is touched. The problems of all plugins are shown together.

    :param plan: the stages with the modules and components that they resolved to.
    :return: one sentence for each problem, or None.
    """


@hookspec
def session_started(session: SessionView) -> None:
    """A run begins, new or resumed.

    Called once a run, on every rank. The set of plugins is frozen from here.

    :param session: a read-only view.
    """


@hookspec
def stage_changed(session: SessionView, stage: str, status: StageStatus) -> None:
    """A stage of the recipe started, finished or was skipped.

    :param session: a read-only view.
    :param stage: the stage's label, such as ``"stage[0] prune magnitude"``.
    :param status: ``"skipped"`` for a stage that the run ended without reaching.
    """


@hookspec
def masks_updated(session: SessionView, stage: str, step: int, changes: Mapping[str, MaskChange]) -> None:
    """The masks of a stage changed.

    Called only on steps that change masks.

    :param session: a read-only view; ``session.masks`` are the new masks.
    :param stage: the stage's label.
    :param step: finished optimizer steps.
    :param changes: for each parameter, how many weights went and came.
    """


@hookspec
def step_finished(session: SessionView, step: int) -> None:
    """An optimizer step is done, and was not skipped.

    The one hook on the path of every step: resolved to a fixed tuple of functions when the session starts.

    :param session: a read-only view.
    :param step: finished optimizer steps.
    """


@hookspec
def metrics_reported(session: SessionView, metrics: Mapping[str, float]) -> None:
    """The loop evaluated the model.

    :param session: a read-only view.
    :param metrics: what the loop measured, under the loop's own names.
    """


@hookspec
def artifact_metadata(session: SessionView) -> Mapping[str, str] | None:
    """Add to what the saved model says about itself.

    Called once a session, when the compressed model is ready to be saved.

    :param session: a read-only view of the finished session.
    :return: strings, stored under the plugin's own name, or None.
    """


@hookspec
def session_finished(session: SessionView, error: BaseException | None) -> None:
    """A run ended.

    Called always, also after a failure; all plugins are called, and their own errors are raised together. One
    exception: the Trainer tells its callbacks nothing of an error in the user's own code, so with
    ``CompressionCallback`` this hook then waits for ``callback.detach()`` or the next ``train()``;
    ``attach_trainer`` calls it at once.

    :param session: a read-only view.
    :param error: what ended the run, or None.
    """


HOOKS: Mapping[str, Callable[..., Any]] = {
    name: value for name, value in list(globals().items()) if hasattr(value, f"{PROJECT}_spec")
}
"""Every hook by name, in the order in which a run calls them."""
