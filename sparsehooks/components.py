"""The contract of each component kind: the abstract classes that plugins implement.

Config is a frozen dataclass (``Config``), state is a dict of tensors (``state_dict``), and the object itself is
final: a subclass implements the abstract methods, and overrides only those that are documented with a default. This
module imports neither torch nor transformers, so a plugin may import it at no cost.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sparsehooks.views import Batch, Layout, WeightView

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from sparsehooks.problems import BalanceProblem, Choose, LayerProblem, Quantize
    from sparsehooks.targets import Target


Level = Literal["fast", "balanced", "small"]
"""How much work saving may put into a smaller file."""
LEARNING_RATE = 1e-3
"""Of the AdamW that trains what components learn, unless they say otherwise."""
LEVELS: tuple[Level, ...] = ("fast", "balanced", "small")
"""From the least work to the most."""


class Need(enum.Enum):
    """Something that the session collects once for all components that declare it in ``needs``."""

    HIDDEN_STATES = "hidden_states"
    """``output["hidden_states"]``: of the embeddings and of each layer, (samples, tokens, width)."""
    ATTENTIONS = "attentions"
    """``output["attentions"]``: the probabilities of each layer, (samples, heads, queries, keys)."""
    PROJECTIONS = "projections"
    """``output["queries"]``, ``["keys"]`` and ``["values"]``: what the projections of each layer's self-attention give,
    before positions are rotated into them, (samples, tokens, width)."""
    GRADIENT = "gradient"
    """``view.gradient``: of the loss of an optimizer step, or of the calibration batches."""
    MOMENTUM = "momentum"
    """``view.momentum``: the optimizer's running mean of the gradient."""
    INPUT_NORM = "input_norm"
    """``view.input_norm``: how large each input feature is."""
    GRAM = "gram"
    """``view.gram``: how the input features vary together; without training only."""
    INPUT_RANGE = "input_range"
    """``input_mean`` and ``input_peak`` of a ``BalanceProblem``: how large the magnitudes of each input feature are."""
    INFLUENCE = "influence"
    """``view.influence``: how much the block that holds the weight changes its input."""


@dataclass(frozen=True)
class NoOptions:
    """The Config of a component that has no options."""


class ComponentBase(ABC):
    """What all kinds share: a name for the kind, options, state and needs.

    Attributes:
        kind: the name of the kind, set by the kind's own class.
        Config: a frozen dataclass of the options; its fields are the keys that a recipe may give, its
            ``__post_init__`` may raise ``ValueError`` with one sentence.
        needs: what the session has to collect for this component.
        config: the options of this object.
    """

    kind: ClassVar[str]
    Config: ClassVar[type] = NoOptions
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config

    def state_dict(self) -> dict[str, Tensor]:
        """What must survive a checkpoint, as tensors. Default: nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 - most components have no state
        """Take back what ``state_dict`` gave. Default: nothing to take."""


# --------------------------------------------------------------------------------------------------- pruning


class Criterion(ComponentBase):
    """Which weights matter, and which of those that went are worth growing back?

    Attributes:
        acts: where the mask acts. ``"weight"``: masked weights are zero in the model, and stay zero. ``"forward"``:
            they are masked on the way into the layer's computation (``effective``) and stay alive behind the mask, so
            that each update chooses among all weights anew.
        samples: on how many optimizer steps (or calibration batches) before each update ``collect`` is called.
    """

    kind = "criterion"
    acts: ClassVar[Literal["weight", "forward"]] = "weight"
    samples: int = 0

    @abstractmethod
    def score(self, view: WeightView) -> Tensor:
        """The importance of each weight: shape of ``view.weight``, floating point, finite; the larger the safer.

        Scores of one stage are compared with each other, within a layer or over all layers as the allocation says.
        """

    def collect(self, view: WeightView) -> None:
        """See one gradient more: called ``samples`` times before each update. Default: nothing to collect."""

    def prepare(self, view: WeightView) -> dict[str, Tensor]:
        """Make the tensors to learn beside a weight, before the first step.

        Returns:
            float32 tensors. The session trains them with an AdamW of its own (no weight decay), saves them with its
            state, and passes them as ``view.learned``. Default: none.
        """
        return {}

    def learning_rate(self) -> float:
        """Of the tensors that ``prepare`` made."""
        return LEARNING_RATE

    def effective(self, view: WeightView, mask: Tensor) -> Tensor:
        """The weight that the layer computes with, where ``acts`` is ``"forward"``.

        Args:
            view: ``weight`` and ``learned`` carry gradients here; ``training`` tells training from evaluation.
            mask: bool, of the weight's shape.

        Returns:
            the weight's shape and dtype, differentiable. Default: zero where masked; the gradient reaches every weight.
        """
        from sparsehooks.masks import straight_through

        return straight_through(view.weight, mask)

    def penalty(self, learned: Mapping[str, Mapping[str, Tensor]], sparsity: float) -> Tensor | None:
        """What is added to the loss for the learned tensors, once an optimizer step; a scalar. Default: nothing.

        Args:
            learned: the tensors of each weight of the stage, by the weight's name.
            sparsity: the sparsity that the schedule asks for by now.
        """
        return None


class Pattern(ComponentBase):
    """In which shape may weights go?

    A *unit* is what goes or stays as a whole. Scores are matrices by parameter name, (rows, columns) = (output
    features, input features). Units are tensors by a key: the parameter's name, or the name of a group of parameters
    whose slices go together (the heads of an attention block, the channels between two layers).
    """

    kind = "pattern"

    def couple(self, model: nn.Module, targets: Sequence[Target]) -> list[str]:
        """Learn from the model which slices of which parameters go together, before anything else is asked.

        Returns:
            what cannot be pruned so, a sentence each, with the layer's name. Default: nothing to learn.
        """
        return []

    def arrange(self, model: nn.Module, targets: Sequence[Target], seed: int) -> None:
        """Put the units of a new run in an order that suits the pattern, once; the model must compute the same.

        Default: as they are.
        """

    @abstractmethod
    def check(self, shape: Sequence[int]) -> str | None:
        """Why a matrix of this shape cannot be pruned in this pattern, in a few words, or None if it can."""

    @abstractmethod
    def units(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """One score per removable unit, from the scores of its weights; the units of a matrix, in any shape."""

    def select(self, units: Mapping[str, Tensor], counts: Mapping[str, int]) -> Mapping[str, Tensor]:
        """Which units stay: a bool mask of each, with exactly ``counts`` of them True; -inf marks what has gone.

        Default: the largest of each matrix, of equal ones the first.
        """
        from sparsehooks.masks import select

        return select(units, counts)

    @abstractmethod
    def expand(self, keep: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The mask of each matrix (bool, shape of its scores, True = stays) from the bool mask of its units.

        A pattern that couples may add masks of other parameters that go along (biases, norms), of their shape.
        """

    def spread(self, values: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """For each weight the value of its unit; only patterns that cut matrices into disjoint groups can say.

        Raises:
            NotImplementedError: for patterns without such groups (N:M). The default.
        """
        raise NotImplementedError

    def share(self) -> float:
        """The part of a unit's weights that goes with it: 1 unless the pattern keeps some (N:M keeps n of m)."""
        return 1.0


class Allocation(ComponentBase):
    """How is the budget shared between the layers?

    Attributes:
        reads_scores: whether the counts depend on the scores, or on shapes alone.
    """

    kind = "allocation"
    reads_scores: ClassVar[bool] = True

    @abstractmethod
    def keep(
        self, units: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], sparsity: float
    ) -> Mapping[str, int]:
        """How many units of each matrix stay, so that the share ``sparsity`` of all units goes.

        Args:
            units: the score of each unit, one tensor a matrix or group.
            shapes: under the same keys (outputs, inputs, kernel dimensions...) of a matrix, or the shape of the units.
            sparsity: in [0, 1], a share of the units; 1 only where a unit that goes leaves some weights (N:M).
        """


@dataclass(frozen=True)
class Window:
    """The options that every gradual schedule has.

    Attributes:
        start: when it begins: a float in [0, 1] is a fraction of the run, an integer an optimizer step.
        end: when it has reached its target, likewise.
        every: optimizer steps between two updates; the last update always falls on ``end``.
    """

    start: float | int = 0.0
    end: float | int = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        check_moment("start", self.start)
        check_moment("end", self.end)
        if type(self.end) is int and self.end == 1:
            raise ValueError("'end' = 1 is the first optimizer step; write 1.0 for the whole run")
        if self.every < 1:
            raise ValueError(f"'every' must be at least 1, got {self.every}")
        if type(self.start) is type(self.end) and self.end <= self.start:
            raise ValueError(f"the schedule ends ('end' = {self.end}) before it starts ('start' = {self.start})")


@dataclass(frozen=True)
class Moment:
    """The option of a schedule that acts once.

    Attributes:
        start: when: a float in [0, 1] is a fraction of the run, an integer an optimizer step.
    """

    start: float | int = 0.0

    def __post_init__(self) -> None:
        check_moment("start", self.start)


def check_moment(key: str, value: float) -> None:
    """Refuse a point in time that is outside the run, with a ``ValueError``."""
    if isinstance(value, float) and not 0.0 <= value <= 1.0:
        raise ValueError(f"'{key}' = {value} is not a fraction of the run in [0, 1]")
    if value < 0:
        raise ValueError(f"'{key}' = {value} is before the first step")


class Schedule(ComponentBase):
    """When does a stage act, and how much of its final sparsity holds by then?

    A pure function of the optimizer step; an adaptive one also of what ``observe`` has told it, which it keeps in its
    state. ``Config`` is ``Window`` or ``Moment`` or a subclass of them.

    Attributes:
        adaptive: whether it follows the metrics. The share may then fall again (what went last comes back, with its
            values), and nothing forces the target at the end of the window.
    """

    kind = "schedule"
    Config: ClassVar[type] = Window
    adaptive: ClassVar[bool] = False

    @abstractmethod
    def sparsity(self, progress: float) -> float:
        """The share of the final sparsity, in [0, 1], at ``progress`` in [0, 1] of the window; exactly 1 at 1."""

    def window(self, total_steps: int) -> tuple[int, int]:
        """The first and the last step of the window, in optimizer steps, for a run of ``total_steps``."""
        first = step_of(self.config.start, total_steps)
        return first, step_of(getattr(self.config, "end", self.config.start), total_steps)

    def due(self, step: int, total_steps: int) -> bool:
        """Whether the masks change after ``step`` finished optimizer steps."""
        first, last = self.window(total_steps)
        return step == last or (first <= step < last and (step - first) % self.config.every == 0)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """See the metrics of an evaluation. Default: nothing to see.

        Raises:
            SessionError: if what it follows is not among them.
        """

    def acted(self) -> None:
        """Hear that the masks have followed. Default: nothing to hear."""

    def rewind(self, total_steps: int) -> int | None:
        """The step to whose weights the survivors return after each update but the last; None: they go on. Default."""
        return None

    def at(self, step: int, total_steps: int) -> float:
        """The share of the final sparsity after ``step`` finished optimizer steps."""
        first, last = self.window(total_steps)
        if step >= last:
            return 1.0
        return 0.0 if step < first else self.sparsity((step - first) / (last - first))


def step_of(moment: float, total_steps: int) -> int:
    """The optimizer step of a point in time: a float is a fraction of the run, an integer a step."""
    return round(moment * total_steps) if isinstance(moment, float) else moment


class Regularizer(ComponentBase):
    """What pushes weights towards zero?

    Both methods see the weights of the stage as matrices by name, and the stage's pattern, whose units are the groups
    that shall vanish together: ``pattern.spread(pattern.units(x), x)`` is the mean of each weight's group.
    """

    kind = "regularizer"

    def gradient(self, weights: Mapping[str, Tensor], pattern: Pattern, strength: float) -> Mapping[str, Tensor] | None:
        """What is added to the gradients before the step. Default: nothing.

        Args:
            weights: detached.
            pattern: the groups.
            strength: the share that the schedule gives by now, in [0, 1]; a factor of everything.
        """
        return None

    def proximal(
        self, weights: Mapping[str, Tensor], pattern: Pattern, step_sizes: Mapping[str, Tensor | float]
    ) -> Mapping[str, Tensor] | None:
        """The weights after a proximal step that follows the optimizer's own. Default: None, as they are.

        Args:
            weights: detached, after the optimizer step.
            pattern: the groups.
            step_sizes: by how much each weight moves for a unit of gradient, times the schedule's share: the learning
                rate, or under Adam ``lr / (sqrt(v) + eps)``, a matrix (the diagonal metric).
        """
        return None


class Solver(ComponentBase):
    """How are the survivors of a layer repaired, without training?

    Attributes:
        serves: the stages in which it does something.
    """

    kind = "solver"
    serves: ClassVar[frozenset[Literal["prune", "quantize"]]] = frozenset({"prune", "quantize"})

    def balance(self, problem: BalanceProblem) -> Tensor | None:
        """Make layers that share their input easier to quantize: by what to divide each feature of the input.

        The layer or the norm that gives the input divides, and the columns of the weights are multiplied: the model
        computes the same. Asked only for quantize stages, where such a producer is found, before ``solve``.

        Returns:
            positive float32, shape (columns,); None, the default, leaves the layers as they are.
        """
        return None

    @abstractmethod
    def solve(self, layer: LayerProblem, choose: Choose, quantize: Quantize | None = None) -> tuple[Tensor, Tensor]:
        """Prune a layer, or put it on a grid, so that its outputs on the calibration inputs change little.

        Args:
            layer: its weight, and how its inputs vary together; both are to be left as they are.
            choose: ``choose(start, stop, weights, inverse_diagonal)`` says which weights of these columns stay (bool,
                shape (rows, stop - start)), by what they are now and by what the inverse of the Gram matrix has on its
                diagonal. To be called once for each column, from left to right; ``start`` and ``stop`` are multiples
                of ``layer.group`` or the end.
            quantize: ``quantize(weights, columns)`` puts these columns (a slice) on the grid that they will lie on;
                zero stays zero.

        Returns:
            the new weight, float32, zero where the mask is False, and the mask, both of shape (rows, columns).
        """


# ----------------------------------------------------------------------------------------------- activations


class Activation(ComponentBase):
    """What makes the values between the layers sparse, or coarse?

    Attributes:
        place: where it acts. ``"input"``: on what enters the target layers; ``"output"``: on what the activation
            functions beside target layers return; ``"function"``: in place of the smooth ones of these functions.
        calibrated: what its amount is fitted to, on the values that it sees: the stage's ``sparsity`` (a threshold of
            their magnitudes) or their range (``reach``); None: nothing.
        learned: whether the amount trains, once it is fitted.
        rounds: whether it puts values on a grid that is fitted while the model runs.
        hidden_act: how config.json calls what ``replacement`` gives.
    """

    kind = "activation"
    place: ClassVar[Literal["input", "output", "function"]]
    calibrated: ClassVar[Literal["sparsity", "range"] | None] = None
    learned: ClassVar[bool] = False
    rounds: ClassVar[bool] = False
    hidden_act: ClassVar[str | None] = None

    @abstractmethod
    def apply(self, values: Tensor, amount: float | Tensor, before: Tensor | None = None) -> Tensor:
        """The values that go on, of the same shape and dtype, differentiable.

        Args:
            values: what enters the layer, what the function returned, or what enters the function (``"function"``).
            amount: what was fitted (of ``|values|``; never negative), else the schedule's share; where it is learned a
                float32 scalar that takes a gradient.
            before: what the function would have returned, for ``"function"`` alone.
        """

    def batches(self) -> int:
        """On how many training batches the amount is fitted, where no calibration batches are given."""
        return 8

    def reach(self, magnitudes: Tensor, peaks: Tensor) -> float:
        """The amount, where it is fitted to the range; not negative.

        Args:
            magnitudes: in ascending order, 1-D; where there are very many a random part of them.
            peaks: the largest of each batch, in their order.
        """
        raise NotImplementedError

    def learning_rate(self) -> float:
        """Of a learned amount. Default: 1e-3."""
        return LEARNING_RATE

    def replacement(self) -> nn.Module | None:
        """The module that takes the function's place at the end, where the share is 1. Default: none, it stays."""
        return None


# ---------------------------------------------------------------------------------------------- quantization


class Quantizer(ComponentBase):
    """On which grid do the values lie?

    Matrices are (rows, columns) = (output features, input features), or (tokens, features) of activations. A *grid* is
    what is found of a matrix and holds for all its values: scales, zero points, a codebook; plain tensors by name. With
    a grid given, quantizing is a projection: a second application changes nothing, and zero stays zero.

    Attributes:
        learned: the names of the tensors of a grid that train.
        trains_weights: whether weights go on training once they are on the grid, or only what the grid learns.
    """

    kind = "quantizer"
    learned: ClassVar[tuple[str, ...]] = ()
    trains_weights: ClassVar[bool] = True

    @property
    def follows(self) -> bool:
        """Whether training fits the grid anew in each forward until it freezes; default: once, at the start."""
        return False

    def check(self, shape: Sequence[int]) -> str | None:
        """Why a matrix of this shape cannot be quantized, in a few words, or None. Default: all can."""
        return None

    @abstractmethod
    def grid(self, weight: Tensor) -> dict[str, Tensor]:
        """The grid that suits a matrix; without gradients."""

    @abstractmethod
    def quantize(self, weight: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        """The code of each value: integers, of the shape of the matrix."""

    @abstractmethod
    def dequantize(self, codes: Tensor, grid: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """What the codes stand for; a zero is +0.0."""

    def fake_quantize(self, weight: Tensor, grid: Mapping[str, Tensor] | None = None) -> Tensor:
        """The matrix on its grid, in its own dtype, with a gradient for it and for what the grid learns.

        Args:
            weight: any matrix.
            grid: of the matrix itself if it is left out.

        Default: ``dequantize(quantize(...))``, and the gradient passes as it is.
        """
        grid = self.grid(weight.detach()) if grid is None else grid
        found = self.dequantize(self.quantize(weight.detach(), grid), grid, weight.dtype)
        return found + (weight - weight.detach())

    def columns(self, grid: Mapping[str, Tensor], start: int, stop: int) -> Mapping[str, Tensor]:
        """The grid of some columns: whole groups, or a part of one. Default: all columns share the grid."""
        return grid

    def learning_rate(self) -> float:
        """Of what the grid learns. Default: 1e-3."""
        return LEARNING_RATE


# ---------------------------------------------------------------------------------------------- distillation


class Distiller(ComponentBase):
    """What does the teacher teach?

    Attributes:
        contrasts: whether an item is measured against the other samples of its micro-batch, so that its loss depends
            on them; the loss of any other distiller does not.
    """

    kind = "distiller"
    contrasts: ClassVar[bool] = False

    def prepare(self, student: nn.Module, teacher: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """Make the tensors to learn beside the student (projections between widths), before the first step.

        Returns:
            float32 tensors on the CPU, drawn from ``generator``. The session moves them to the student's device,
            trains them with an AdamW of its own, saves them with its state and passes them to ``loss``.
        """
        return {}

    @abstractmethod
    def loss(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: Batch, learned: Mapping[str, Tensor]
    ) -> Tensor:
        """One value for each item, shape (items,), unreduced: the session alone divides.

        Args:
            student: the model output of the student, with gradients, and what ``needs`` asks for: a tuple with one
                tensor a layer.
            teacher: the model output of the teacher, without gradients, likewise; its tuples may be sequences from a
                cache, which keeps and reads only what is taken out of them.
            batch: the inputs, ``batch.items`` to pick the items, ``batch.targets`` and ``batch.mask``.
            learned: the tensors that ``prepare`` made, as they are now.
        """


# ---------------------------------------------------------------------------------------------------- storage


class Codec(ComponentBase):
    """How does a tensor lie in the file?

    A tensor is cut into chunks of about 2^18 elements, and each chunk is written by two codecs: one for the
    *positions* that carry a value, one for those *values*. The writer takes for each chunk the codecs that give the
    fewest bytes. Arrays are numpy; ``decode`` reads bytes that anybody may have written, so it checks every length
    and range before it allocates, and raises ``ArtifactError``; the reader has verified the checksum and adds the
    tensor's name.

    Positions are the flat indices of the kept elements of the chunk: intp, shape (count,), strictly ascending.
    Values are the bits of the kept elements in that order: unsigned integers of the dtype's width, shape (count,).

    Attributes:
        role: which of the two it is.
        level: the first level of compression at which the writer tries it: "fast" (simple to decode), "balanced" (the
            default of saving) or "small" (a few percent less for a slower save). Readers know all levels.
    """

    kind = "codec"
    role: ClassVar[Literal["positions", "values"]]
    level: ClassVar[Level] = "fast"

    @abstractmethod
    def bound(self, data: np.ndarray, layout: Layout) -> int | None:
        """The fewest bytes that ``encode`` may need, exact where that is cheap to say; None if it cannot hold the data.

        The writer tries codecs in the order of their bounds, and stops where no bound is below what it has.

        Args:
            data: positions that are not zero, or values.
            layout: shape, dtype and counts of the chunk.
        """

    def cover(self, data: np.ndarray, layout: Layout) -> np.ndarray:
        """The positions that will carry a value, of which some may be zero; asked only of position codecs.

        Args:
            data: positions of which ``bound`` is not None.
            layout: shape, dtype and counts of the chunk.

        Returns:
            positions, a superset of the data: what ``encode`` receives. Default: the data itself.
        """
        return data

    @abstractmethod
    def encode(self, data: np.ndarray, layout: Layout) -> bytes:
        """The bytes for data of which ``bound`` is not None."""

    @abstractmethod
    def decode(self, part: memoryview, layout: Layout) -> np.ndarray:
        """The data again, bit for bit: same dtype and shape as ``encode`` received."""


class Kernels(ComponentBase):
    """What computes the inner loops of files and masks?

    Recipes do not choose, nor do the ``plugins`` of a call. Of the kernels that installed plugins offer, the first by
    name compute in the whole process that can run here and give the same bits as the built-in ``numpy``, the reference,
    in some calls of each method. Such a check is no proof: in your tests, let ``check_component`` make many more calls.
    ``sparsehooks components kernels`` says which kernels run, the function ``sparsehooks.kernels()`` returns them.

    Arrays have one dimension, are contiguous and may be read-only; nothing is written to them. Positions are intp and
    ascend. Several threads may call at once.
    """

    kind = "kernels"

    def problem(self) -> str | None:
        """Why they cannot run here, in a few words, or None. Default: they can."""
        return None

    @abstractmethod
    def nonzero(self, values: np.ndarray, shift: int) -> np.ndarray:
        """The positions of unsigned integers that are not zero once they are shifted left by 0 or 1 bit."""

    @abstractmethod
    def pack_bits(self, positions: np.ndarray, size: int) -> bytes:
        """A bit for each of ``size`` elements, the first in the lowest bit of a byte, 1 at the positions."""

    @abstractmethod
    def unpack_bits(self, part: memoryview) -> np.ndarray:
        """The positions of the bits that are 1."""

    @abstractmethod
    def pack_planes(self, numbers: np.ndarray, width: int) -> bytes:
        """Each bit of all numbers as one bitmap, the lowest bits first; unused last bits of a bitmap are 0.

        Args:
            numbers: uint8 or uint16, less than ``2 ** width``.
            width: bits a number, at most 16.
        """

    @abstractmethod
    def unpack_planes(self, part: memoryview, width: int, count: int) -> np.ndarray:
        """The numbers again: uint8 where the width allows it, else uint16; shape (count,).

        Raises:
            ValueError: if the part has not ``width * ceil(count / 8)`` bytes.
        """

    @abstractmethod
    def split_gaps(self, positions: np.ndarray, low: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of zeros before each position, as Golomb-Rice codes split them.

        Args:
            positions: of what is not zero.
            low: low bits of a number, at most 15.

        Returns:
            the low bits (uint8 where their number allows it, else uint16), and the positions of the ones in the unary
            parts: a one for each number, after as many zeros as the rest of its bits say.
        """

    @abstractmethod
    def join_gaps(self, gaps: np.ndarray, ones: np.ndarray | None = None, low: int = 0) -> np.ndarray:
        """The positions again.

        Args:
            gaps: the numbers of zeros (uint8, uint16 or int64), or their low bits.
            ones: of the unary parts; None: there are none.
            low: low bits of a number.

        Raises:
            ValueError: if there are not as many gaps as ones.
        """

    @abstractmethod
    def split_exponents(
        self, values: np.ndarray, shift: int, frequent: np.ndarray, size: int
    ) -> tuple[bytes, np.ndarray, bytes]:
        """Floating-point numbers as digits for their exponents, and the rest of their upper 16 bits.

        These bits are rotated left by one, so that the sign comes last; the exponent is what lies above ``shift``.

        Args:
            values: the bits of the numbers, uint16 or uint32.
            shift: 8 to 15.
            frequent: the exponents that have a digit: its place among them; uint8, at most 16, which differ.
            size: digits that make a byte, the first the lowest, to the base of as many as there are; 2 to 5.

        Returns:
            the digits, the positions of the numbers whose exponent has none (their digit is 0), and the lowest byte of
            what was rotated.
        """

    @abstractmethod
    def checksum(self, data: bytes | memoryview, start: int = 0) -> int:
        """The CRC-32 of contiguous bytes, as zlib has it; ``start`` is that of the bytes before them."""

    @abstractmethod
    def between(self, scores: Tensor, low: float, high: float) -> tuple[int, Tensor]:
        """How many scores lie above ``high``, and those from ``low`` to ``high``, in their order.

        Args:
            scores: contiguous, on the CPU, of float16, bfloat16, float32 or float64; a NaN lies nowhere.
            low: a number of that dtype.
            high: likewise, not less.
        """

    @abstractmethod
    def largest(self, scores: Tensor, cut: float, ties: int) -> Tensor:
        """The bool mask of the scores above ``cut`` and of the first ``ties`` that are equal to it."""


# ---------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Support:
    """Whether a backend can run a layer.

    Attributes:
        ok: whether it can.
        reason: why not.
        exact: whether the outputs differ from those of torch's layer by the order of sums only.
        depends: what its speed depends on beside shape, dtype, share of zeros, machine and plugin, in a few words.
    """

    ok: bool
    reason: str = ""
    exact: bool = True
    depends: str = ""


class Backend(ComponentBase):
    """What runs a layer?

    The layer keeps its dense weight; a backend makes of it what its kernel reads, once, and computes with that. It is
    asked about plain ``nn.Linear`` layers with a weight that is not empty.

    Attributes:
        rounds_inputs: whether it puts what enters a layer on an int8 grid, fitted while the layer runs; it then takes
            the place of a grid that the model has there.
        trains: whether it may run layers while they train: it computes what torch does but for the order of sums, and
            packs fast enough to do so in each forward, and in each backward with the transposed weight.
    """

    kind = "backend"
    rounds_inputs: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    @abstractmethod
    def supports(self, layer: nn.Linear, device: torch.device) -> Support:
        """Yes, or no with a reason: its device, dtype or shape, the CPU, or weights that are off a pattern or a grid.

        Args:
            layer: ``weight`` has the shape (out_features, in_features), ``bias`` may be None.
            device: where the layer is.
        """

    @abstractmethod
    def pack(self, layer: nn.Linear) -> Any:
        """What ``run`` needs, bias included: a tuple of tensors, or of torch's own objects where a kernel takes those.

        Called only where ``supports`` says yes, without gradients; the layer stays as it is.
        """

    @abstractmethod
    def run(self, packed: Any, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch's layers use
        """The layer's outputs; called without gradients.

        Args:
            packed: what ``pack`` gave.
            input: shape (..., in_features); it may be empty, and need not be contiguous.

        Returns:
            shape (..., out_features), in the input's dtype, no view of the input.
        """


# ----------------------------------------------------------------------------------------------- other programs


class Exporter(ComponentBase):
    """Who else shall read a saved model?

    Attributes:
        files: what ``export`` writes, as globs such as ``"*.safetensors"``: at least one file for each of them.
    """

    kind = "exporter"
    files: ClassVar[tuple[str, ...]]

    @abstractmethod
    def export(self, folder: Path, out: Path) -> str:
        """Write the model in the format of another program.

        Args:
            folder: one that sparsehooks saved, which stays as it is.
            out: an empty folder, which becomes the user's when this returns and vanishes when it raises.

        Returns:
            one line for the user: what was written, and how close it is to the model.

        Raises:
            ArtifactError: if the format cannot carry the model, naming what it cannot and what to do instead.
        """


KINDS: Mapping[str, type[ComponentBase]] = {
    contract.kind: contract
    for contract in (
        Criterion,
        Pattern,
        Allocation,
        Schedule,
        Regularizer,
        Activation,
        Solver,
        Quantizer,
        Distiller,
        Codec,
        Kernels,
        Backend,
        Exporter,
    )
}
