"""Channel permutation: the same function, and N:M keeps more."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import tiny_bert, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

import sparsehooks
from sparsehooks import permute_channels
from sparsehooks.permutation import best_order
from sparsehooks.targets import find


def kept(matrix, n=2, m=4):
    return matrix.abs().reshape(len(matrix), -1, m).topk(n, dim=2).values.sum().item()


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=2, n_head=2))


@pytest.mark.parametrize(
    ("model", "reader", "cls"),
    [
        (tiny_bert, "encoder.layer.0.output.dense", "Linear"),
        (tiny_llama, "model.layers.0.mlp.down_proj", "Linear"),
        (tiny_gpt2, "transformer.h.0.mlp.c_proj", "Conv1D"),
    ],
)
def test_the_model_computes_the_same_and_keeps_more(model, reader, cls):
    model, ids = model().eval(), torch.arange(12)[None]
    (target,) = find(model, [reader], [])[0]
    weight = model.get_parameter(f"{reader}.weight")
    before, magnitude = model(ids)[0], kept(target.matrix(weight.detach()))
    gains = permute_channels(model, find(model, [cls], [])[0], 2, 4, seed=0)
    torch.testing.assert_close(model(ids)[0], before, rtol=1e-5, atol=1e-6)
    assert len(gains) == 2
    assert kept(target.matrix(weight.detach())) > magnitude


def test_two_stripes_are_shared_out_in_the_best_of_all_ways():
    magnitude = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    best = max(kept(magnitude[:, list(order)]) for order in _orders())
    found = kept(magnitude[:, best_order(magnitude, 2, 4, seed=0)])
    assert found == pytest.approx(best)


def _orders():
    for first in itertools.combinations(range(8), 4):
        yield (*first, *(column for column in range(8) if column not in first))


def test_an_order_that_cannot_be_bettered_stays():
    magnitude = torch.zeros(4, 16)
    magnitude[:, ::2] = 1.0
    assert torch.equal(best_order(magnitude, 2, 4, seed=0), torch.arange(16))


def test_a_recipe_permutes_before_it_prunes():
    stage = {"prune": "magnitude", "exclude": ["*embeddings*", "*pooler*"]}
    plain, permuted, dense = tiny_bert(), tiny_bert(), tiny_bert()
    sparsehooks.compress(plain, {"stage": [{**stage, "pattern": "2:4"}]})
    sparsehooks.compress(permuted, {"stage": [{**stage, "pattern": {"use": "2:4", "permute": True}}]})
    name = "encoder.layer.1.output.dense.weight"
    assert (permuted.get_parameter(name).reshape(-1, 4) != 0).sum(1).max() <= 2
    total = dense.get_parameter(name).abs().sum()
    assert permuted.get_parameter(name).abs().sum() > plain.get_parameter(name).abs().sum() > 0.5 * total
