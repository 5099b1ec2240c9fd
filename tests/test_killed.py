"""A run that is killed in the middle and resumed ends as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from helpers import arguments, copied, prune, same_state, sentences, tiny_bert
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

import sparsehooks

RECIPE = {
    "stage": [
        {**prune()["stage"][0], "allocation": "global", "schedule": {"use": "cubic", "end": 0.8, "every": 1}},
        {"distill": {"use": "hidden"}},
        {"quantize": "int8", "targets": ["Linear", "Embedding"], "schedule": {"use": "oneshot", "start": 0.6}},
    ]
}


class Kill(TrainerCallback):
    """SIGKILL to the own process after a step: nothing is flushed, nothing is cleaned up."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder, kill_at):
    model = tiny_bert()
    trainer = Trainer(
        model=model,
        args=arguments(folder, max_steps=20, save_strategy="steps", save_steps=3, lr_scheduler_type="linear"),
        train_dataset=sentences(),
        callbacks=[Kill(kill_at)],
    )
    trainer.add_callback(sparsehooks.CompressionCallback(RECIPE))
    teachers = []

    class Teacher(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            session = next(c for c in trainer.callback_handler.callbacks if hasattr(c, "session")).session
            (teacher,) = session._distillation._teachers.values()
            teachers.append(copied(teacher.model))

    trainer.add_callback(Teacher())
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    torch.save(
        {"model": copied(model), "teacher": teachers[0], "optimizer": trainer.optimizer.state_dict()},
        Path(folder) / "end.pt",
    )


def start(folder, kill_at):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, __file__, str(folder), str(kill_at)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_killed_twice_and_resumed_is_bit_identical(tmp_path):
    for kill_at in (7, 16):
        assert start(tmp_path / "killed", kill_at).returncode == -signal.SIGKILL
    for folder in ("killed", "whole"):
        done = start(tmp_path / folder, -1)
        assert done.returncode == 0, done.stderr[-3000:]
    whole, killed = (torch.load(tmp_path / folder / "end.pt") for folder in ("whole", "killed"))
    assert same_state(whole["model"], killed["model"])
    assert same_state(whole["teacher"], killed["teacher"])
    assert same_state(killed["teacher"], tiny_bert())
    first, second = whole["optimizer"], killed["optimizer"]
    assert first["state"].keys() == second["state"].keys()
    for key, slots in first["state"].items():
        assert all(torch.equal(slots[name], second["state"][key][name]) for name in slots)
    last = "checkpoint-18/optimizer.pt"
    states = [torch.load(tmp_path / folder / last)["param_groups"][0]["sparsehooks"] for folder in ("whole", "killed")]
    assert states[0]["step"] == states[1]["step"] == 18
    assert same_state(states[0]["masks"], states[1]["masks"])


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]))
