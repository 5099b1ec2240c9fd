"""The errors of the library: one sentence each, saying what, where, and what instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparseHooksError(Exception):
    """The base of every error that sparsehooks raises on purpose; the command line exits with 2 on it."""


class RecipeError(SparseHooksError):
    """A recipe that cannot be read; the message starts with the path inside the recipe."""


class PluginError(SparseHooksError):
    """A plugin that is missing, broken, or in conflict with another one, where the run needs it."""


class PlanError(SparseHooksError):
    """A recipe that does not fit the catalog or the model.

    Attributes:
        problems: every problem found, one sentence each.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class SessionError(SparseHooksError):
    """A run that cannot go on: scores that are not finite, a checkpoint without its state, a lost loss term."""


class ArtifactError(SparseHooksError):
    """A saved model that cannot be written, or that is missing, damaged or not what it says it is."""


def suggest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the nearest known name, else the known names, else nothing."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(sorted(known))}" if known else ""
