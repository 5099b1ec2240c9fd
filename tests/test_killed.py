"""A run that is killed again and again, and resumed, ends as one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import torch
from helpers import arguments, copied, same_state, sentences, tiny_bert
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

import sparsehooks

STEPS, KILLS = 30, 10
RECIPE = {
    "stage": [
        {
            "prune": "movement",
            "sparsity": 0.7,
            "allocation": "global",
            "targets": ["*attention*"],
            "schedule": {"use": "cubic", "end": 0.8, "every": 1},
        },
        {
            "prune": "magnitude",
            "sparsity": 0.8,
            "allocation": "erk",
            "grow": {"use": "gradient", "fraction": 0.3, "schedule": "cosine"},
            "targets": ["*intermediate*", "*layer.*.output.dense"],
            "exclude": ["*attention*"],
            "schedule": {"use": "linear", "end": 0.9, "every": 2},
        },
        {"distill": {"use": "hidden"}},
        {"quantize": {"use": "lsq", "bits": 6}, "schedule": {"use": "oneshot", "start": 0.3}, "exclude": ["*pooler*"]},
    ]
}


class Kill(TrainerCallback):
    """SIGKILL to the own process after a step: nothing is flushed, nothing is cleaned up."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@torch.no_grad()
def answer(model):
    """By the whole model: what masks the layers would not show in its weights."""
    return model.eval()(input_ids=sentences(1)[0]["input_ids"][None]).last_hidden_state


def train(folder, kill_at):
    """Go on from the last checkpoint, if there is one."""
    model = tiny_bert()
    trainer = Trainer(
        model=model,
        args=arguments(folder, max_steps=STEPS, save_strategy="steps", save_steps=2, lr_scheduler_type="linear"),
        train_dataset=sentences(),
        callbacks=[Kill(kill_at)],
    )
    trainer.add_callback(sparsehooks.CompressionCallback(RECIPE))
    teachers = []

    class Teacher(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            session = next(c for c in trainer.callback_handler.callbacks if hasattr(c, "session")).session
            (teacher,) = session._distillation._teachers.values()
            teachers.append(copied(teacher.model) | {"answer": answer(teacher.model)})

    trainer.add_callback(Teacher())
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    torch.save(
        {"model": copied(model), "teacher": teachers[0], "optimizer": trainer.optimizer.state_dict()},
        Path(folder) / "end.pt",
    )


def run(folder, kills):
    """One process for each kill and one more; forked, because most of their time would go into imports."""
    for kill_at in (*kills, -1):
        child = os.fork()
        if child == 0:
            train(folder, kill_at)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == (0 if kill_at < 0 else -signal.SIGKILL), kill_at


def test_killed_ten_times_at_random_and_resumed_is_bit_identical(tmp_path):
    kills = sorted(random.Random(4).sample(range(1, STEPS), KILLS))
    for folder, steps in (("killed", kills), ("whole", [])):
        (tmp_path / folder).mkdir()
        command = [sys.executable, __file__, str(tmp_path / folder), *map(str, steps)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    whole, killed = (torch.load(tmp_path / folder / "end.pt") for folder in ("whole", "killed"))
    assert same_state(whole["model"], killed["model"])
    assert same_state(whole["teacher"], killed["teacher"])
    assert same_state(killed["teacher"], copied(tiny_bert()) | {"answer": answer(tiny_bert())})
    first, second = whole["optimizer"], killed["optimizer"]
    assert first["state"].keys() == second["state"].keys()
    for key, slots in first["state"].items():
        assert all(torch.equal(slots[name], second["state"][key][name]) for name in slots)
    last = f"checkpoint-{STEPS}/optimizer.pt"
    states = [torch.load(tmp_path / folder / last)["param_groups"][0]["sparsehooks"] for folder in ("whole", "killed")]
    assert states[0]["step"] == states[1]["step"] == STEPS
    assert same_state(states[0]["masks"], states[1]["masks"])
    for owner, tensors in states[0]["learned"]["tensors"].items():
        assert same_state(tensors, states[1]["learned"]["tensors"][owner])
    assert sum(bool(tensors) for tensors in states[0]["learned"]["tensors"].values()) > 12  # scores and scales


if __name__ == "__main__":
    run(sys.argv[1], [int(step) for step in sys.argv[2:]])
