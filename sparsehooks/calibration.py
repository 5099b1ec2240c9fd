"""Calibration: what criteria and solvers want to know of a model's inputs, collected over batches without training.

A transformer is walked block by block: the inputs of the first block are caught; then each block is measured on what
the pruned blocks before it give, pruned, and run again. So only one block's statistics are in memory at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsehooks.components import Criterion, Need, Solver
from sparsehooks.errors import PlanError, SessionError
from sparsehooks.masks import MaskChange, check_finite
from sparsehooks.plan import PlannedStage
from sparsehooks.plugins import attributed
from sparsehooks.pruning import Masks, Pruner
from sparsehooks.recipe import PruneStage
from sparsehooks.targets import Target
from sparsehooks.views import WeightView

Choose = Callable[[int, int, Tensor, Tensor], Tensor]
"""Which weights of some columns stay; see ``Solver.solve``."""
Quantize = Callable[[Tensor, slice], Tensor]
"""Some columns of a layer on the grid that they will lie on."""

INPUTS = frozenset({Need.INPUT_NORM, Need.GRAM})
"""What the inputs of a layer tell."""
COLLECTED = INPUTS | {Need.GRADIENT, Need.INFLUENCE}
"""What calibration batches give."""
STRIP = 256
"""Inputs that are squared at once: in the cache, 20 times faster on a CPU than through memory."""


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """What a solver gets to solve.

    Attributes:
        name: of the weight, for messages.
        weight: (rows, columns), float32.
        gram: ``X^T X / tokens`` of the layer's inputs, undamped, float32, shape (columns, columns).
        group: where the pattern chooses within groups of so many columns (the m of N:M), how many; else None.
    """

    name: str
    weight: Tensor
    gram: Tensor
    group: int | None = None


# ------------------------------------------------------------------------------------------------- statistics


class Moments:
    """The running second moments of what goes into one layer, or into several that share their input."""

    def __init__(self, *, gram: bool) -> None:
        self._wants_gram = gram
        self._sum: Tensor | None = None
        self.tokens = 0

    def add(self, rows: Tensor) -> None:
        """See inputs, shape (tokens, columns)."""
        rows = rows.float()
        self.tokens += len(rows)
        if self._wants_gram:
            if self._sum is None:
                self._sum = rows.t() @ rows
            else:
                self._sum.addmm_(rows.t(), rows)
        else:
            if self._sum is None:
                self._sum = rows.new_zeros(rows.shape[1])
            for strip in rows.split(STRIP):
                self._sum += strip.square().sum(dim=0)

    def evidence(self, name: str) -> dict[str, Tensor]:
        """The fields of a ``WeightView``.

        Raises:
            SessionError: nothing was seen, or values that are not finite.
        """
        if self._sum is None or not self.tokens:
            raise SessionError(f"no calibration batch reaches '{name}'; exclude it")
        check_finite(f"activations that enter '{name}', squared and summed,", self._sum, "look at the calibration data")
        mean = self._sum / self.tokens
        if self._wants_gram:
            return {"gram": mean, "input_norm": mean.diagonal().clamp(min=0).sqrt()}
        return {"input_norm": mean.sqrt()}


def tokens_of(module: nn.Module, inputs: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """The inputs of a layer as (tokens, columns), without padding."""
    if isinstance(module, nn.Conv2d):
        unfolded = nn.functional.unfold(
            _padded(module, inputs), module.kernel_size, module.dilation, 0, cast(Any, module.stride)
        )
        return unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])
    for mask in masks:
        if inputs.dim() > 2 and mask.shape == inputs.shape[: mask.dim()]:
            return inputs[mask].reshape(-1, inputs.shape[-1])
        if inputs.dim() == 2 and mask.dim() == 2 and mask.numel() == len(inputs) and mask.shape[1] > 1:
            return inputs[mask.flatten()]
    return inputs.reshape(-1, inputs.shape[-1])


def _padded(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    edges = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return nn.functional.pad(inputs, edges, mode=mode)


def unsupported(model: nn.Module, targets: Iterable[Target]) -> list[str]:
    """Why the inputs of some targets cannot be had as a matrix, a sentence each."""
    problems = []
    for target in targets:
        for name in target.modules:
            module = model.get_submodule(name)
            if isinstance(module, nn.Conv2d) and module.groups == 1:
                continue
            if isinstance(module, nn.Conv2d):
                problems.append(f"'{name}' is a convolution of {module.groups} groups, which calibration does not see")
            elif not isinstance(module, nn.Linear) and not target.transposed:
                problems.append(f"'{name}' is a {type(module).__name__}; calibration sees Linear, Conv1D and Conv2d")
    return [f"{problem}; exclude it" for problem in problems]


class Batches:
    """The calibration batches, and how a model runs on them."""

    def __init__(self, model: nn.Module, batches: Iterable[Any]) -> None:
        self.model = model
        device = next(model.parameters()).device
        self._batches = [_moved(batch, device) for batch in batches]
        if not self._batches:
            raise PlanError(["calibration: there is no batch in it; give an iterable of dicts of tensors"])

    def __len__(self) -> int:
        return len(self._batches)

    def forward(self, index: int) -> Any:
        """Run the model on a batch."""
        batch = self._batches[index]
        if isinstance(batch, Mapping):
            return self.model(**batch)
        return self.model(*batch) if isinstance(batch, (list, tuple)) else self.model(batch)

    def masks(self, index: int) -> list[Tensor]:
        """Which tokens are no padding: the attention masks among the keyword arguments."""
        batch = self._batches[index]
        if not isinstance(batch, Mapping):
            return []
        found = [batch.get(key) for key in ("attention_mask", "decoder_attention_mask")]
        return [mask.bool() for mask in found if isinstance(mask, Tensor) and mask.dim() == 2]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    return type(value)(_moved(item, device) for item in value) if type(value) in (list, tuple) else value


class Collector:
    """Hooks on the modules of some targets that collect what goes into them."""

    def __init__(self, model: nn.Module, targets: Iterable[Target], *, gram: bool) -> None:
        self._modules = {name: model.get_submodule(name) for target in targets for name in target.modules}
        self._names = {target.parameter: target.modules for target in targets}
        self._gram = gram
        self._moments: dict[str, Moments] = {}
        self._leads: dict[str, bool] = {}
        self._masks: Sequence[Tensor] = ()
        self._seen: list[tuple[Tensor, str]] = []

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Collect inside."""
        handles = [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, module in self._modules.items()
        ]
        try:
            yield
        finally:
            self._seen.clear()
            for handle in handles:
                handle.remove()

    def batch(self, masks: Sequence[Tensor]) -> None:
        """The next batch begins, of which these tokens are no padding."""
        self._masks = masks
        self._seen.clear()

    def evidence(self, target: Target) -> dict[str, Tensor]:
        """The fields of the target's view."""
        names = [name for name in target.modules if name in self._moments]
        moments = self._moments[names[0]] if names else Moments(gram=self._gram)
        return moments.evidence(names[0] if names else target.modules[0])

    def _hook(self, name: str) -> Callable[..., None]:
        tied = next((names for names in self._names.values() if name in names), (name,))

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            if name not in self._moments:
                # layers that receive the very same tensor (query, key, value) share what is collected
                leader = next((other for tensor, other in self._seen if tensor is inputs), None)
                shared = next((self._moments[other] for other in tied if other in self._moments), None)
                self._leads[name] = leader is None or shared is not None
                self._moments[name] = shared or (self._moments[leader] if leader else Moments(gram=self._gram))
            if self._leads[name]:
                self._seen.append((inputs, name))
                self._moments[name].add(tokens_of(module, inputs.detach(), self._masks))

        return hook


# ----------------------------------------------------------------------------------------------------- walking


class IrregularBlocksError(SessionError):
    """Blocks that cannot run one after the other; they are measured by whole forwards then."""


class Blocks:
    """A list of transformer blocks, each run on what those before it gave.

    Args:
        batches: of the model.
        name: of the ``nn.ModuleList``.
    """

    def __init__(self, batches: Batches, name: str) -> None:
        self._batches = batches
        self.name = name
        self.blocks = list(cast(nn.ModuleList, batches.model.get_submodule(name)))
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._hidden: list[Any] = []
        for index in range(len(batches)):
            self._catch(index)

    def run(self, block: int, collector: Collector | None = None) -> list[Any]:
        """The outputs of a block on all batches."""
        outputs = []
        with collector.hooked() if collector else contextlib.nullcontext():
            for index, hidden in enumerate(self._hidden):
                if collector:
                    collector.batch(self._batches.masks(index))
                args, kwargs = self._calls[index][block]
                output = self.blocks[block](
                    *(hidden if item is _HIDDEN else item for item in args),
                    **{key: hidden if item is _HIDDEN else item for key, item in kwargs.items()},
                )
                outputs.append(output[0] if isinstance(output, tuple) else output)
        return outputs

    def advance(self, outputs: list[Any]) -> None:
        """What goes into the next block."""
        self._hidden = outputs

    def influence(self, outputs: Sequence[Tensor]) -> float:
        """1 - the mean cosine between what goes into a block and what comes out."""
        total, tokens = 0.0, 0
        for index, (before, after) in enumerate(zip(self._hidden, outputs, strict=True)):
            cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            for mask in self._batches.masks(index):
                if mask.shape == cosine.shape:
                    cosine = cosine[mask]
                    break
            total, tokens = total + float(cosine.sum()), tokens + cosine.numel()
        check_finite(f"activations of the blocks in '{self.name}'", torch.tensor(total), "look at the calibration data")
        return 1 - total / tokens

    def _catch(self, index: int) -> None:
        """One whole forward: with what each block is called, and where the output of the one before it stands."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        last: list[Any] = []
        first: list[Any] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(calls) == len(self.blocks):
                raise IrregularBlocksError(f"the blocks in '{self.name}' run more than once in a forward")
            if not calls:
                first.append(args[0] if args else next(iter(kwargs.values())))
            hidden = last[0] if last else first[0]
            values = (*args, *kwargs.values())
            if not any(value is hidden for value in values):
                raise IrregularBlocksError(f"a block in '{self.name}' does not receive what the one before it gave")
            calls.append(
                (
                    tuple(_HIDDEN if item is hidden else item for item in args),
                    {key: _HIDDEN if item is hidden else item for key, item in kwargs.items()},
                )
            )

        def after(_: nn.Module, __: Any, output: Any) -> None:
            last[:] = [output[0] if isinstance(output, tuple) else output]

        handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in self.blocks]
        handles += [block.register_forward_hook(after) for block in self.blocks]
        try:
            self._batches.forward(index)
        finally:
            for handle in handles:
                handle.remove()
        if len(calls) != len(self.blocks):
            raise IrregularBlocksError(f"not every block in '{self.name}' runs in a forward")
        self._calls.append(calls)
        self._hidden.append(first[0])


_HIDDEN = object()


def block_lists(model: nn.Module, targets: Iterable[Target]) -> list[str]:
    """The outermost module lists that hold targets, the longest first."""
    names = [name for target in targets for name in target.modules]
    lists = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and any(n.startswith(f"{name}.") for n in names)
    }
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return sorted(outer, key=lambda name: -lists[name])


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and without caches of keys and values."""
    training = [module for module in model.modules() if module.training]
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    model.eval()
    try:
        if cached:
            config.use_cache = False  # type: ignore[union-attr]
        yield
    finally:
        if cached:
            config.use_cache = cached  # type: ignore[union-attr]
        for module in training:
            module.training = True


# ------------------------------------------------------------------------------------------------------ stages


class _Size(Criterion):
    """For counts that do not depend on scores."""

    def score(self, view: WeightView) -> Tensor:
        return view.weight.abs()


class Calibration:
    """Prunes the stages that need calibration batches or have a solver.

    Args:
        model: on its device.
        batches: mappings (keyword arguments of the forward), sequences (positional ones) or tensors.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any]) -> None:
        self._model = model
        self._batches = Batches(model, batches)

    def __call__(self, masks: Masks, pruner: Pruner) -> Mapping[str, MaskChange]:
        """Choose the masks of a stage, and solve for what stays."""
        with measuring(self._model), torch.no_grad():
            return _Stage(self._model, self._batches, masks, pruner).run()


class _Stage:
    """One stage on its way through the model."""

    def __init__(self, model: nn.Module, batches: Batches, masks: Masks, pruner: Pruner) -> None:
        self.model = model
        self.batches = batches
        self.masks = masks
        self.pruner = pruner
        bound = pruner.stage.components.get("solver")
        self.solver = None if bound is None else cast(Solver, bound.create())
        self.targets = pruner.stage.targets
        self.needs = pruner.needs
        self.gram = self.solver is not None or Need.GRAM in self.needs
        self.known: dict[str, dict[str, Any]] = {target.parameter: {} for target in self.targets}
        self.counts: Mapping[str, int] | None = None
        self.changes: dict[str, MaskChange] = {}

    def run(self) -> dict[str, MaskChange]:  # noqa: C901 - each kind of evidence in turn
        if Need.GRADIENT in self.needs:
            self._gradients()
        sequential = self.gram or Need.INPUT_NORM in self.needs
        if self._is_coupled():
            if self.solver is not None:
                pattern = self.pruner.recipe.pattern.use
                raise SessionError(
                    f"{self.pruner.stage.label}: the pattern '{pattern}' leaves a solver nothing to solve"
                )
            self._dense()
            sequential = False
        elif not sequential and Need.INFLUENCE in self.needs:
            self._dense()
        elif self.pruner.allocation.reads_scores and sequential:
            self._dense()
            self.counts = self.masks.counts(self.pruner, 0, 1.0, self._evidence)
            for known in self.known.values():
                for key in ("input_norm", "gram", "influence"):
                    known.pop(key, None)
        if not sequential:
            return dict(self.masks.update(self.pruner, 0, 1.0, self._evidence))
        if self.counts is None:
            self.counts = self.masks.counts(replace(self.pruner, criterion=_Size()), 0, 1.0)
        left = list(self.targets)
        for name in block_lists(self.model, self.targets):
            mine = [target for target in left if _inside(target, name)]
            try:
                walk = Blocks(self.batches, name)
            except IrregularBlocksError:
                if Need.INFLUENCE in self.needs:
                    raise
                continue
            left = [target for target in left if target not in mine]
            self._blocks(walk, mine)
        self._layers(left)
        return self.changes

    def _is_coupled(self) -> bool:
        """Whether units reach over several targets."""
        sizes = {target.parameter: torch.empty(target.matrix_shape, device="meta") for target in self.targets}
        try:
            with attributed(self.pruner.stage.components["pattern"].record):
                return self.pruner.pattern.units(sizes).keys() != sizes.keys()
        except (RuntimeError, TypeError, NotImplementedError):
            return False

    def _evidence(self, target: Target) -> Mapping[str, Any]:
        return self.known[target.parameter]

    def _gradients(self) -> None:  # noqa: C901 - a loop over batches and targets
        """The mean gradient of the loss; the criterion sees each batch's own."""
        weights = [self.model.get_parameter(target.parameter) for target in self.targets]
        flags = [(weight, weight.requires_grad) for weight in self.model.parameters()]
        criterion, label = self.pruner.criterion, self.pruner.stage.label
        total: list[Tensor | None] = [None] * len(weights)
        try:
            for weight, _ in flags:
                weight.requires_grad = False
            for weight in weights:
                weight.requires_grad = True
            for index in range(len(self.batches)):
                with torch.enable_grad():
                    outputs = self.batches.forward(index)
                    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
                    if loss is None:
                        raise SessionError(
                            f"{label}: the model's outputs have no loss; put labels into the calibration batches"
                        )
                    found: Sequence[Tensor | None] = torch.autograd.grad(loss, weights, allow_unused=True)
                for place, (target, gradient) in enumerate(zip(self.targets, found, strict=True)):
                    if gradient is None:
                        continue
                    check_finite(f"gradients of '{target.parameter}'", gradient, "look at the calibration data")
                    before = total[place]
                    total[place] = gradient.clone() if before is None else before.add_(gradient)
                    if criterion.samples:
                        view = self._view(target, {"gradient": target.matrix(gradient)})
                        with attributed(self.pruner.stage.components["prune"].record):
                            criterion.collect(view)
        finally:
            for weight, flag in flags:
                weight.requires_grad = flag
        for target, mean in zip(self.targets, total, strict=True):
            if mean is None:
                raise SessionError(f"{label}: no gradient reached '{target.parameter}'; exclude it")
            self.known[target.parameter]["gradient"] = target.matrix(mean / len(self.batches))

    def _view(self, target: Target, evidence: Mapping[str, Any]) -> WeightView:
        return self.masks.view(self.pruner, "prune", target, 0, lambda _: evidence)

    def _dense(self) -> None:
        """What the criterion needs of all targets, on the model as it is."""
        if Need.INFLUENCE in self.needs:
            for known in self.known.values():
                known["influence"] = 0.0
            for name in block_lists(self.model, self.targets):
                walk = Blocks(self.batches, name)
                for block in range(len(walk.blocks)):
                    outputs = walk.run(block)
                    influence = walk.influence(outputs)
                    for target in self.targets:
                        if _inside(target, f"{name}.{block}"):
                            self.known[target.parameter]["influence"] = influence
                    walk.advance(outputs)
        if self.needs & INPUTS:
            self._collect(self.targets, gram=Need.GRAM in self.needs)

    def _collect(self, targets: Sequence[Target], *, gram: bool) -> None:
        collector = Collector(self.model, targets, gram=gram)
        with collector.hooked():
            for index in range(len(self.batches)):
                collector.batch(self.batches.masks(index))
                self.batches.forward(index)
        for target in targets:
            self.known[target.parameter] |= collector.evidence(target)

    def _blocks(self, walk: Blocks, targets: Sequence[Target]) -> None:
        name = walk.name
        last = max(i for i in range(len(walk.blocks)) if any(_inside(t, f"{name}.{i}") for t in targets))
        for block in range(last + 1):
            mine = [target for target in targets if _inside(target, f"{name}.{block}")]
            if mine:
                collector = Collector(self.model, mine, gram=self.gram)
                outputs = walk.run(block, collector)
                influence = {"influence": walk.influence(outputs)} if Need.INFLUENCE in self.needs else {}
                for target in mine:
                    self.known[target.parameter] |= {**collector.evidence(target), **influence}
                del collector
                self._prune(mine)
            if block < last:
                walk.advance(walk.run(block))

    def _layers(self, targets: Sequence[Target]) -> None:
        """Layers outside of blocks, in the order in which they run, each by a forward of its own over all batches."""
        if not targets:
            return
        order: dict[str, int] = {}

        def noting(name: str) -> Callable[..., None]:
            def note(*_: Any) -> None:
                order.setdefault(name, len(order))

            return note

        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(noting(name))
            for target in targets
            for name in target.modules
        ]
        try:
            self.batches.forward(0)
        finally:
            for handle in handles:
                handle.remove()
        for target in sorted(targets, key=lambda t: min(order.get(name, len(order)) for name in t.modules)):
            if Need.INFLUENCE in self.needs:
                self.known[target.parameter]["influence"] = 0.0
            self._collect([target], gram=self.gram)
            self._prune([target])

    def _prune(self, targets: Sequence[Target]) -> None:
        assert self.counts is not None
        if self.solver is None:
            mine = {target.parameter: self.counts[target.parameter] for target in targets}
            self.changes |= self.masks.update(self.pruner, 0, 1.0, self._evidence, targets, mine)
        else:
            for target in targets:
                self._solve(target)
        for target in targets:
            self.known[target.parameter].clear()

    def _solve(self, target: Target) -> None:
        solver, weight = self.solver, self.model.get_parameter(target.parameter)
        assert solver is not None
        assert self.counts is not None
        matrix = target.matrix(weight.detach())
        check_finite(f"weights of '{target.parameter}'", matrix, "the model is damaged")
        evidence = self.known[target.parameter]
        choice = Choice(self.pruner, target, self.masks, evidence, self.counts[target.parameter])
        problem = LayerProblem(target.parameter, matrix.float().clone(), evidence["gram"], choice.group)
        with attributed(self.pruner.stage.components["solver"].record):
            solved, mask = solver.solve(problem, choice)
            check_finite(f"solved weights of '{target.parameter}'", solved, "raise the solver's damping")
        weight.copy_(target.restore(solved).to(weight.dtype))
        shaped = target.restore(mask)
        self.changes[target.parameter] = self.masks.replace(target.parameter, shaped, None, revives=self.pruner.revives)
        self.masks.apply()


class Choice:
    """Which weights of some columns stay, by criterion, pattern and count: the callback of solvers.

    Over blocks of columns the counts are rounded so that the layer's total is exact. Where the pattern's units cannot
    be told from some columns alone (rows, blocks), the mask is chosen once, on the weights as they were.

    A criterion that needs the Gram matrix is asked through the inverse that the solver has: what is lost by
    ``w^2 / [H^-1]_jj``, of the columns that are still free.
    """

    def __init__(self, pruner: Pruner, target: Target, masks: Masks, evidence: Mapping[str, Any], count: int) -> None:
        self._pruner = pruner
        self._name = target.parameter
        self._evidence = evidence
        self._count = count
        self._taken = 0
        old = masks.masks.get(target.parameter)
        self._old = None if old is None or pruner.criterion.acts == "forward" else target.matrix(old)
        self._view = masks.view(pruner, "prune", target, 0, lambda _: evidence)
        rows, self._columns = target.matrix_shape
        units = self._units(self._view.weight.abs())
        self.group: int | None = None
        self._fixed: Tensor | None = None
        if pruner.pattern.share() < 1.0 and units.dim() == 2 and len(units) == rows:
            self.group = self._columns // units.shape[1]
        elif units.shape != (rows, self._columns):
            with attributed(pruner.stage.components["prune"].record):
                score = pruner.criterion.score(self._view)
            self._fixed = self._expand(self._masked(score, 0, self._columns), count)

    def __call__(self, start: int, stop: int, weights: Tensor, inverse_diagonal: Tensor) -> Tensor:
        """See ``Solver.solve``."""
        if self._fixed is not None:
            return self._fixed[:, start:stop]
        score = self._masked(self._score(start, stop, weights, inverse_diagonal), start, stop)
        check_finite(f"scores of '{self._name}'", score, f"{self._pruner.stage.label} cannot choose by them")
        due = round(self._count * stop / self._columns)
        due, self._taken = due - self._taken, due
        return self._expand(score, due)

    def _score(self, start: int, stop: int, weights: Tensor, inverse_diagonal: Tensor) -> Tensor:
        if Need.GRAM in self._pruner.needs:
            return weights.square() / inverse_diagonal
        view = self._view
        columns = slice(start, stop)
        norm, gradient = view.input_norm, view.gradient
        part = replace(
            view,
            weight=weights,
            seed=view.seed + start,
            gram=None,
            input_norm=None if norm is None else norm[columns],
            gradient=None if gradient is None else gradient[:, columns],
        )
        with attributed(self._pruner.stage.components["prune"].record):
            return self._pruner.criterion.score(part)

    def _masked(self, score: Tensor, start: int, stop: int) -> Tensor:
        return score if self._old is None else score.masked_fill(~self._old[:, start:stop], float("-inf"))

    def _units(self, score: Tensor) -> Tensor:
        with attributed(self._pruner.stage.components["pattern"].record):
            return self._pruner.pattern.units({self._name: score})[self._name]

    def _expand(self, score: Tensor, count: int) -> Tensor:
        units = {self._name: self._units(score)}
        with attributed(self._pruner.stage.components["pattern"].record):
            keep = self._pruner.pattern.select(units, {self._name: count})
            return self._pruner.pattern.expand(keep, {self._name: score})[self._name]


def _inside(target: Target, name: str) -> bool:
    return any(module.startswith(f"{name}.") or module == name for module in target.modules)


def needs_calibration(stage: PlannedStage) -> bool:
    """Whether a stage wants calibration batches."""
    if not isinstance(stage.stage, PruneStage):
        return False
    return "solver" in stage.components or bool(stage.components["prune"].cls.needs & COLLECTED)


def reads_inputs(stage: PlannedStage) -> bool:
    """Whether a stage wants to know what goes into its layers."""
    return needs_calibration(stage) and (
        "solver" in stage.components or bool(stage.components["prune"].cls.needs & INPUTS)
    )
