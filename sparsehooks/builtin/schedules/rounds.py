"""Schedules that act in rounds."""

from __future__ import annotations

from dataclasses import dataclass

from sparsehooks import Schedule, Window, check_moment


class Constant(Schedule):
    """Everything from ``start`` on, chosen anew at every update: for what grows, and for masks in the forward."""

    def sparsity(self, progress: float) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True)
class Rounds(Window):
    """The options of rounds, which say what ``every`` would.

    Attributes:
        rounds: how many, evenly over the window; the last falls on ``end``.
        rate: the share of what is left that each takes; the sparsity of the stage shall be ``1 - (1 - rate)^rounds``.
        rewind: the step to whose weights the survivors return after each round but the last; a float is a fraction of
            the run. They go on as they are if it is left out.
    """

    rounds: int = 5
    rate: float = 0.2
    rewind: float | int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every != 1:
            raise ValueError(f"'every' = {self.every} has no effect: 'rounds' decides; leave it out")
        if self.rounds < 1:
            raise ValueError(f"'rounds' must be at least 1, got {self.rounds}")
        if not 0.0 < self.rate < 1.0:
            raise ValueError(f"'rate' = {self.rate} is outside (0, 1); 0.2 takes a fifth of what is left")
        if self.rewind is not None:
            check_moment("rewind", self.rewind)


class Iterative(Schedule):
    """Rounds of pruning and training on (Han et al. 2015, arXiv:1506.02626).

    With ``rewind`` it is the lottery ticket procedure (Frankle and Carbin 2019, arXiv:1803.03635; Frankle et al. 2020,
    arXiv:1912.05671). The optimizer begins anew after each; the learning rate is the loop's and goes on.
    """

    Config = Rounds
    config: Rounds

    def sparsity(self, progress: float) -> float:
        """``(1 - (1 - rate)^k) / (1 - (1 - rate)^n)`` after ``k`` of ``n`` rounds."""
        done = int(progress * self.config.rounds + 1e-9)
        return (1 - (1 - self.config.rate) ** done) / (1 - (1 - self.config.rate) ** self.config.rounds)

    def due(self, step: int, total_steps: int) -> bool:
        """At the end of each round."""
        return step in self._ends(total_steps)

    def at(self, step: int, total_steps: int) -> float:
        """As many rounds as have ended."""
        done = sum(end <= step for end in self._ends(total_steps))
        return self.sparsity(done / self.config.rounds)

    def rewind(self, total_steps: int) -> int | None:
        """As the options say."""
        moment = self.config.rewind
        return round(moment * total_steps) if isinstance(moment, float) else moment

    def _ends(self, total_steps: int) -> list[int]:
        first, last = self.window(total_steps)
        return [first + round((last - first) * k / self.config.rounds) for k in range(1, self.config.rounds + 1)]
