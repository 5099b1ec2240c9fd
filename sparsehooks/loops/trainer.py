"""The Trainer: one callback that hosts everything, and a second door for losses the Trainer computes itself."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparsehooks.errors import SessionError
from sparsehooks.loops.checkpoints import read_state, write_state
from sparsehooks.loops.forward import Handle, LossTerms, add_loss_terms
from sparsehooks.loops.wrappers import (
    arm_all,
    disarm_all,
    refuse_deepspeed,
    reset_compiled,
    unwrapped,
    unwrapped_optimizer,
)
from sparsehooks.plugins import PluginManager, as_manager
from sparsehooks.recipe import Recipe
from sparsehooks.resuming import state_in
from sparsehooks.session import Session
from sparsehooks.sharding import is_sharded


class CompressionCallback(TrainerCallback):
    """Compress the model while the Trainer trains it: ``trainer.add_callback(CompressionCallback("recipe.toml"))``.

    Checkpoints stay dense, so the Trainer resumes from them as from any other. When training ends, the model holds
    its final weights and ``trainer.save_model()``, ``push_to_hub()`` and ``model.save_pretrained()`` write the
    sparse form. With ``load_best_model_at_end`` only checkpoints after the last schedule has ended compete.

    Args:
        recipe: a path, a mapping, or a ``Recipe``.
        plugins: see ``PluginManager``.

    Raises:
        RecipeError: if the recipe cannot be read. ``PlanError`` follows in ``train()``, before the first step.
    """

    def __init__(
        self, recipe: Recipe | Mapping[str, Any] | str | Path, plugins: Sequence[Any] | PluginManager = ()
    ) -> None:
        self.manager = as_manager(plugins)
        self.recipe = Recipe.of(recipe, self.manager)
        self.session: Session | None = None
        self.loss_terms: LossTerms | None = None
        self.resumes_from: str | Path | None = None
        self._handles: list[Handle] = []
        self._complete = False

    def detach(self, error: BaseException | None = None) -> None:
        """Undo what a run that broke off has left on the model: call it after an error in your own code.

        Training that ends, an error of sparsehooks, and the next ``train()`` do this by themselves.
        """
        session, self.session = self.session, None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if session is not None:
            session.abort(error)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach: the model is prepared, and a checkpoint is loaded."""
        start = None
        if args.auto_find_batch_size and self.session is not None:  # it begins again, with smaller batches
            start = self.session.start_of_run
        self.detach()
        model, optimizer = unwrapped(kwargs["model"]), kwargs["optimizer"]
        refuse_deepspeed(model, "DEEPSPEED" if getattr(args, "deepspeed_plugin", None) else None)
        if (
            self.loss_terms is None
            and args.label_smoothing_factor
            and any(s.action == "distill" for s in self.recipe.stages)
        ):
            raise SessionError(
                "with label smoothing the Trainer computes its own loss and the distillation would be lost; "
                "use sparsehooks.attach_trainer(trainer, recipe) instead of the callback"
            )
        if args.n_gpu > 1:
            raise SessionError("several GPUs in one process (DataParallel) are not supported; start with torchrun")
        session = Session.of(self.recipe, self.manager, model, state.max_steps)
        opened = disarm_all(model)
        self.session = session
        with self._aborting():
            session.start(
                model,
                unwrapped_optimizer(optimizer),
                state.global_step,
                state=self._beside_checkpoint(args, state, model),
                folder=Path(args.output_dir or "."),
                opened=opened,
                start=start,
            )
            if session.learns and args.load_best_model_at_end and args.save_only_model:
                raise SessionError(
                    "with save_only_model the checkpoints lack what the recipe learns beside the model, and "
                    "load_best_model_at_end needs it; leave one of them out"
                )
            attach = add_loss_terms if self.loss_terms is None else self.loss_terms.attach
            self._handles = attach(kwargs["model"], session)
            if self._handles and getattr(args, "torch_compile", False):
                torch.compiler.reset()  # compiled code ignores hooks that came later
            reset_compiled(kwargs["model"])
        self._complete = session.complete

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The gradients are ready."""
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        with self._aborting() as session:
            session.before_step(1.0 if scaler is None else scaler.get_scale())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The weights have changed: mask them before anything evaluates or saves them."""
        with self._aborting() as session:
            session.after_step(skipped=bool(getattr(kwargs["optimizer"], "step_was_skipped", False)))
            if session.complete and not self._complete:
                # what was best so far is not yet what the recipe asks for
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None
                self._complete = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the sparsity to the logs; the history holds a copy already."""
        if self.session is not None and self.session.masks.masks:
            for logs in (kwargs.get("logs"), state.log_history[-1] if state.log_history else None):
                if logs is not None:
                    logs["sparsity"] = self.session.sparsity

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass the metrics on."""
        if self.session is not None:
            with self._aborting() as session:
                session.metrics(kwargs["metrics"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep beside the checkpoint what an optimizer over sharded weights cannot carry."""
        if self.session is not None and self.session.sharded:
            with self._aborting() as session:
                write_state(session, _checkpoint(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish, and arm the model: from here on it saves in the sparse form."""
        with self._aborting() as session:
            if session.learns and args.load_best_model_at_end and state.best_model_checkpoint is not None:
                best = Path(state.best_model_checkpoint)
                if session.sharded:
                    session.take_learned(read_state(best))
                else:
                    optimizer = torch.load(best / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
                    session.take_learned(state_in(optimizer))
            session.finish()
        self.detach()
        arm_all(unwrapped(kwargs["model"]), session)

    def _beside_checkpoint(self, args: TrainingArguments, state: TrainerState, model: Any) -> dict[str, Any] | None:
        if not state.global_step or not is_sharded(model):
            return None
        return read_state(self.resumes_from or args.resume_from_checkpoint or _checkpoint(args, state))

    @contextmanager
    def _aborting(self) -> Iterator[Session]:
        """Whatever is raised inside detaches the callback on its way out."""
        if self.session is None:
            raise SessionError("the callback was not there when training began; add it before trainer.train()")
        try:
            yield self.session
        except BaseException as error:
            self.detach(error)
            raise


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def attach_trainer(
    trainer: Trainer,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    plugins: Sequence[Any] | PluginManager = (),
) -> CompressionCallback:
    """Add the callback to a Trainer that computes its own loss, and in front of the callbacks that log.

    The same as ``trainer.add_callback(CompressionCallback(recipe))``, and in addition: where the Trainer does not take
    its loss from the model (label smoothing, ``compute_loss_func``, the Trainers of TRL and Sentence Transformers), the
    loss terms are added after ``trainer.compute_loss``; the sparsity reaches loggers (Weights & Biases, TensorBoard),
    which read the logs before later callbacks; and whatever ends ``trainer.train()`` leaves nothing attached.

    Returns:
        the callback.
    """
    callback = CompressionCallback(recipe, plugins)
    trainer.callback_handler.callbacks.insert(0, callback)
    overridden = type(trainer).compute_loss is not Trainer.compute_loss
    if overridden or trainer.label_smoother is not None or trainer.compute_loss_func is not None:
        callback.loss_terms = LossTerms()
        trainer.compute_loss = _with_terms(trainer, callback.loss_terms)  # type: ignore[method-assign]
    train = trainer.train

    @functools.wraps(train)
    def train_and_detach(*args: Any, **kwargs: Any) -> Any:
        checkpoint = args[0] if args else kwargs.get("resume_from_checkpoint")
        callback.resumes_from = checkpoint if isinstance(checkpoint, (str, Path)) else None
        try:
            return train(*args, **kwargs)
        except BaseException as error:
            callback.detach(error)  # the Trainer does not tell its callbacks
            raise

    trainer.train = train_and_detach  # type: ignore[method-assign]
    return callback


def _with_terms(trainer: Trainer, loss_terms: LossTerms) -> Any:
    """The Trainer's ``compute_loss`` with the session's terms on top."""
    compute_loss = trainer.compute_loss

    @functools.wraps(compute_loss)
    def compute_loss_with_terms(
        model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        given = dict(inputs)  # the Trainer takes the labels out
        if num_items_in_batch is not None and _is_scaled(trainer, num_items_in_batch):
            given["num_items_in_batch"] = num_items_in_batch
        loss_terms.begin(given)
        found: Any = compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        loss, *outputs = found if return_outputs else (found,)
        terms = loss_terms.end()
        if terms is not None:
            loss = loss + terms * _scale(trainer, num_items_in_batch)
        return (loss, *outputs) if return_outputs else loss

    return compute_loss_with_terms


def _is_scaled(trainer: Trainer, items: Any) -> bool:
    """Whether the Trainer leaves the loss as it is, because it was divided by the number of items already."""
    if trainer.loss_is_scaled_for_ga is not None:
        return bool(trainer.loss_is_scaled_for_ga)
    return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None


def _scale(trainer: Trainer, items: Any) -> float:
    """The factor that makes a term of ours meet what the Trainer does to the loss afterwards."""
    if not _is_scaled(trainer, items):
        return 1.0  # a mean over this micro-batch, like the loss; the Trainer divides both
    if items is None:
        return 1.0 / trainer.current_gradient_accumulation_steps
    processes = trainer.accelerator.num_processes // trainer.get_tp_size()
    return float(processes) if trainer.args.average_tokens_across_devices else 1.0
