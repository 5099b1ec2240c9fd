"""Weights sharded over two processes on the CPU (FSDP2, gloo): the run is the one that a single process makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import same_state
from test_distributed import launch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from sparsehooks import sharding

WORKER = Path(__file__).parent / "fsdp_worker.py"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    (alone,) = launch(WORKER, folder, "plain", 1)
    sharded = launch(WORKER, folder, "plain", 2)
    return folder, alone, sharded


@pytest.mark.parametrize("recipe", ["magnitude", "rigl", "movement", "structured"])
def test_the_run_is_that_of_one_process(plain, recipe):
    _, alone, ranks = plain
    for found in ranks:
        assert same_state(found[recipe]["masks"], alone[recipe]["masks"])
        assert same_state(found[recipe]["model"], ranks[0][recipe]["model"])
        for name, weight in alone[recipe]["model"].items():
            # under AdamW and on grids, sums in another order move weights a little further than gradients
            assert torch.allclose(found[recipe]["model"][name], weight, atol=1e-4 if recipe == "movement" else 1e-6)


@pytest.mark.parametrize("recipe", ["rigl", "movement"])
def test_a_resumed_run_is_bit_identical_and_its_artifact_opens(plain, recipe):
    folder, _, ranks = plain
    for found in ranks:
        assert same_state(found[recipe]["model"], found[f"{recipe}, resumed"]["model"])
        assert same_state(found[recipe]["masks"], found[f"{recipe}, resumed"]["masks"])
    opened = AutoModel.from_pretrained(folder / "plain" / recipe / "artifact", add_pooling_layer=False)
    assert same_state(opened, ranks[0][recipe]["model"])


def test_what_shards_cannot_do_is_said_before_training(plain):
    for found in plain[2]:
        permuted, shrunk = found["refused"]
        assert "'permute'" in permuted
        assert "sparsehooks.compress" in shrunk


@pytest.mark.parametrize("loop", ["trainer", "accelerate"])
def test_loops_train_resume_and_save(tmp_path, loop):
    first, second = launch(WORKER, tmp_path, loop, 2)
    assert same_state(first["whole"], second["whole"])
    assert same_state(first["whole"], first["resumed"])
    pruned = [name for name, weight in first["whole"].items() if int((weight == 0).sum()) > weight.numel() // 10]
    assert len(pruned) == 14
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / loop / "saved"), first["whole"])
    if loop == "trainer":
        assert "attach_trainer" in first["elsewhere"]


class Placed:
    """As much of a sharded tensor as ``part`` looks at."""

    def __init__(self, ranks, rank, dim):
        self.device_mesh, self.placements = self, [self]
        self.ranks, self.rank, self.dim = ranks, rank, dim

    def is_shard(self):
        return True

    def size(self, _):
        return self.ranks

    def get_local_rank(self, _):
        return self.rank


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_parts_are_what_torch_shards(rows, dim):
    from torch.distributed.tensor import Shard

    values = torch.arange(rows * rows).view(rows, rows)
    for ranks in (1, 2, 3, 4):
        pieces, _ = Shard(dim)._split_tensor(values, ranks, with_padding=False)
        for rank, piece in enumerate(pieces):
            assert torch.equal(sharding.part(values, Placed(ranks, rank, dim)), piece)


def test_a_model_that_is_not_sharded_is_left_alone():
    model = nn.Linear(3, 2)
    assert not sharding.is_sharded(model)
    assert sharding.whole(model.weight) is model.weight
    assert sharding.local(model.weight) is model.weight
    assert sharding.whole_state(model).keys() == model.state_dict().keys()
