"""Two processes on the CPU (gloo): the ranks agree, and together they do what one process does."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import same_state
from transformers import AutoModel

import sparsehooks  # noqa: F401 - opens the artifact

WORKER = Path(__file__).parent / "ddp_worker.py"


def run(folder, mode, processes):
    return launch(WORKER, folder, mode, processes)


def launch(worker, folder, mode, processes):
    """What each process of a worker script found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(worker), str(folder), mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{mode}-rank{rank}.pt") for rank in range(processes)]


def test_two_ranks_compress_resume_and_save_as_one(tmp_path):
    first, second = run(tmp_path, "run", 2)
    assert same_state(first, second)
    resumed, _ = run(tmp_path, "resume", 2)
    assert same_state(first, resumed)
    assert same_state(first, AutoModel.from_pretrained(tmp_path / "artifact"))


def test_the_distilled_gradient_does_not_depend_on_the_number_of_ranks(tmp_path):
    pair = run(tmp_path, "gradient", 2)
    (alone,) = run(tmp_path / "alone", "gradient", 1)
    for loss, changes in alone.items():
        assert same_state(*(found[loss] for found in pair))
        difference = torch.cat([(pair[0][loss][name] - value).flatten() for name, value in changes.items()])
        moved = torch.cat([value.flatten() for value in changes.values()])
        assert difference.norm() / moved.norm() < 1e-6, loss


def test_the_metrics_of_the_first_rank_decide(tmp_path):
    assert same_state(*run(tmp_path, "metrics", 2))


def test_ranks_that_choose_differently_stop(tmp_path):
    (first, second) = run(tmp_path, "disagree", 2)
    assert first["error"] == second["error"]
    assert "different masks" in first["error"]


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    return run(tmp_path_factory.mktemp("cached"), "cache", 2)


def test_after_the_first_epoch_no_rank_asks_its_teacher(cached):
    assert [found["forwards"] for found in cached] == 2 * [[4, 0, 0]]


def test_whatever_fails_on_the_first_rank_stops_the_others(cached):
    first, second = (found["errors"] for found in cached)
    assert first == ["OSError: disk", "KeyboardInterrupt: ", "ArtifactError: ours"]
    assert second == [
        "SessionError: rank 0 failed with OSError: disk",
        "SessionError: rank 0 failed with KeyboardInterrupt: ",
        "SessionError: ours",
    ]
