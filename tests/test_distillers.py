"""The distillation losses: each against a twin by hand, and at work in real runs."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    VOCABULARY,
    Ordered,
    arguments,
    copied,
    labelled,
    same_state,
    sentences,
    texts,
    tiny_bert,
    tiny_classifier,
    tiny_llama,
)
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel, Trainer

import sparsehooks
from sparsehooks import Batch, CompressionCallback, Need, PlanError, SessionError
from sparsehooks.builtin.distillers.attention import Attention
from sparsehooks.builtin.distillers.contrastive import Contrastive
from sparsehooks.builtin.distillers.hidden import Cosine, Hidden
from sparsehooks.builtin.distillers.logits import DKD, JSD, KL, ReverseKL
from sparsehooks.builtin.distillers.relation import Relation
from sparsehooks.outputs import Outputs

EVERYTHING = frozenset({Need.HIDDEN_STATES, Need.ATTENTIONS, Need.PROJECTIONS})
LOSSES = {
    "kl": KL(),
    "reverse_kl": ReverseKL(),
    "jsd": JSD(),
    "dkd": DKD(),
    "hidden": Hidden(),
    "cosine": Cosine(),
    "scores": Attention(),
    "maps": Attention(Attention.Config(compare="maps")),
    "relation": Relation(Relation.Config(layers="all")),
    "minilm_v1": Relation(Relation.Config(("qk", "vv"), heads=4)),
    "contrastive": Contrastive(),
}
ENCODER = [name for name in LOSSES if name != "contrastive"]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits(distiller, student, teacher, shifts=False, **inputs):
    return distiller.loss({"logits": student}, {"logits": teacher}, Batch(inputs, shifts), {})


def answers(model, needs=EVERYTHING, **inputs):
    """The output of a model with all that distillers may need."""
    outputs = Outputs(model, needs)
    found = outputs.complete(model(**inputs, **outputs.ask()))
    outputs.close()
    return found


# ------------------------------------------------------------------------------------------------------ logits


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_reverse_kl_is_the_divergence_of_torch_the_other_way_round(temperature):
    student, teacher = 3 * randn(32, 10), 3 * randn(32, 10, seed=1)
    expected = F.kl_div(
        F.log_softmax(teacher.double() / temperature, dim=-1),
        F.softmax(student.double() / temperature, dim=-1),
        reduction="batchmean",
    )
    ours = logits(ReverseKL(ReverseKL.Config(temperature)), student, teacher).double().mean()
    torch.testing.assert_close(ours, expected * temperature**2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_what_gkd_writes(beta):
    student, teacher = 3 * randn(4, 5), 3 * randn(4, 5, seed=1)
    expected = []
    for p, q in zip((teacher.double() / 2).softmax(-1), (student.double() / 2).softmax(-1), strict=True):
        total = 0.0
        for one, other in zip(p.tolist(), q.tolist(), strict=True):
            mixture = beta * one + (1 - beta) * other
            total += beta * one * math.log(one / mixture) + (1 - beta) * other * math.log(other / mixture)
        expected.append(4 * total)
    ours = logits(JSD(JSD.Config(2.0, beta)), student, teacher)
    torch.testing.assert_close(ours.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-7)


def test_jsd_lies_between_the_two_divergences():
    student, teacher = randn(16, 10), randn(16, 10, seed=1)

    def jsd(beta, one=student, other=teacher):
        return logits(JSD(JSD.Config(beta=beta)), one, other)

    assert torch.equal(jsd(0.0), logits(KL(), student, teacher))
    assert torch.equal(jsd(1.0), logits(ReverseKL(), student, teacher))
    torch.testing.assert_close(jsd(1e-3) / 1e-3, jsd(0.0), rtol=5e-3, atol=1e-3)
    torch.testing.assert_close(jsd(1 - 1e-3) / 1e-3, jsd(1.0), rtol=5e-3, atol=1e-3)
    torch.testing.assert_close(jsd(0.5), jsd(0.5, teacher, student))
    assert bool((jsd(0.5, 100 * student, 100 * teacher) <= 4 * math.log(2) + 1e-5).all())


def test_dkd_is_what_the_paper_writes():
    student, teacher, labels = 3 * randn(6, 5), 3 * randn(6, 5, seed=1), torch.tensor([0, 4, 2, 2, 1, 3])
    expected = []
    for z_s, z_t, target in zip(student.double() / 4, teacher.double() / 4, labels.tolist(), strict=True):
        q, p = z_s.softmax(-1), z_t.softmax(-1)
        others = [index for index in range(5) if index != target]
        tckd = p[target] * (p[target] / q[target]).log() + (1 - p[target]) * ((1 - p[target]) / (1 - q[target])).log()
        q_others, p_others = q[others] / q[others].sum(), p[others] / p[others].sum()
        nckd = (p_others * (p_others / q_others).log()).sum()
        expected.append(16 * (0.5 * tckd + 3.0 * nckd))
    ours = logits(DKD(DKD.Config(4.0, alpha=0.5, beta=3.0)), student, teacher, labels=labels)
    torch.testing.assert_close(ours.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_kl_is_dkd_with_the_share_of_the_other_classes():
    student, teacher, labels = 3 * randn(8, 10), 3 * randn(8, 10, seed=1), torch.arange(8)
    for item in range(8):
        share = 1 - (teacher[item] / 2).softmax(-1)[labels[item]].item()
        part = slice(item, item + 1)
        ours = logits(DKD(DKD.Config(2.0, 1.0, share)), student[part], teacher[part], labels=labels[part])
        torch.testing.assert_close(ours, logits(KL(), student[part], teacher[part]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("distiller", "factor"),
    [
        (ReverseKL(ReverseKL.Config(1000.0)), 1.0),
        (JSD(JSD.Config(1000.0, 0.25)), 0.25 * 0.75),
        (DKD(DKD.Config(1000.0, 1.0, 0.9)), 1.0),
    ],
)
def test_at_a_high_temperature_gradients_are_centred_differences_of_the_logits(distiller, factor):
    student, teacher = randn(8, 10).double().requires_grad_(), randn(8, 10, seed=1).double()
    logits(distiller, student, teacher, labels=torch.arange(8)).sum().backward()
    difference = student.detach() - teacher
    centred = (difference - difference.mean(dim=-1, keepdim=True)) / 10
    torch.testing.assert_close(student.grad, factor * centred, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd", "dkd"])
def test_extreme_logits_leave_loss_and_gradient_finite(name):
    student, teacher = (1e4 * randn(8, 10)).requires_grad_(), 1e4 * randn(8, 10, seed=1)
    values = logits(LOSSES[name], student, teacher, labels=torch.arange(8))
    values.sum().backward()
    assert bool(values.isfinite().all())
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (None, "there are none"),
        (torch.ones(2, 3), r"got \(2, 3\) of torch.float32"),
        (torch.tensor([1]), r"got \(1,\)"),
    ],
)
def test_dkd_says_that_it_needs_classes(labels, found):
    with pytest.raises(SessionError, match=rf"dkd needs a class label for each of \(2,\) outputs; {found}"):
        logits(DKD(), randn(2, 3), randn(2, 3), labels=labels)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "dkd"])
def test_another_vocabulary_is_refused_with_both_shapes(name):
    with pytest.raises(
        SessionError, match=rf"{name} needs .* got \(2, 3\) from the student and \(2, 4\) from the teac"
    ):
        logits(LOSSES[name], randn(2, 3), randn(2, 4), labels=torch.tensor([0, 1]))
    with pytest.raises(SessionError, match=f"{name} compares logits, and the model returns none"):
        LOSSES[name].loss({}, {}, Batch({}), {})


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (JSD.Config, {"beta": 1.5}, r"'beta' = 1.5 is outside \[0, 1\]"),
        (JSD.Config, {"temperature": 0.0}, "'temperature' = 0.0 is not a positive number"),
        (DKD.Config, {"alpha": -1.0}, "'alpha' = -1.0 is not a number of at least 0"),
        (DKD.Config, {"beta": math.inf}, "'beta' = inf is not"),
        (Contrastive.Config, {"temperature": -1.0}, "'temperature' = -1.0 is not a positive number"),
        (Relation.Config, {"heads": 0}, "'heads' = 0 is not a number of at least 1"),
        (Relation.Config, {"relations": ("qx",)}, r"'relations' = \['qx'\] is no list of qq, qk, qv, kq"),
        (Attention.Config, {"layers": ((0, 1),)}, r"'layers' = \(\(0, 1\),\) is none of .* of layers from 1 on"),
        (Hidden.Config, {"layers": ((1, 2, 3),)}, r"pairs \[\[student, teacher\], ...\] of layers from 0 on"),
        (Hidden.Config, {"layers": ()}, r"'layers' = \(\) is none of 'all', 'last', 'uniform'"),
    ],
)
def test_options_that_cannot_be_are_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


# ------------------------------------------------------------------------------------ what a batch has of a model


def tagger(seed, layers=2, **options):
    torch.manual_seed(seed)
    settings = {"hidden_size": 64, "num_attention_heads": 4, **options}
    config = BertConfig(
        vocab_size=VOCABULARY, num_hidden_layers=layers, intermediate_size=64, max_position_embeddings=32, **settings
    )
    return BertForTokenClassification(config).eval()


def padded(lengths, width, seed=5):
    """Token classification: each row has its real tokens first, of which some have no label."""
    ids, mask, labels = torch.zeros(len(lengths), width).long(), torch.zeros(len(lengths), width).long(), []
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(seed + row)
        ids[row, :length] = torch.randint(1, VOCABULARY, (length,), generator=generator)
        mask[row, :length] = 1
        labels.append(torch.randint(-1, 2, (length,), generator=generator))
    tags = torch.full((len(lengths), width), -100)
    for row, label in enumerate(labels):
        tags[row, : len(label)] = torch.where(label < 0, -100, label)
    return {"input_ids": ids, "attention_mask": mask, "labels": tags}


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_nothing(name):
    student, teacher = tagger(0), tagger(1)

    def items(labels, *lengths, width):
        batch = padded(lengths, width)
        if not labels and name != "dkd":
            del batch["labels"]
        return LOSSES[name].loss(answers(student, **batch), answers(teacher, **batch), Batch(batch), {})

    with torch.no_grad():
        for labels in (True, False):
            tight, wide = items(labels, 7, 12, width=12), items(labels, 7, 12, width=17)
            assert bool((tight > 0).all())
            torch.testing.assert_close(tight, wide, rtol=1e-4, atol=1e-6)
            if name != "contrastive":
                alone = items(labels, 7, width=7)
                torch.testing.assert_close(tight[: len(alone)], alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(name):
    student, batch = tagger(0), padded((7, 12), 12)
    found = answers(student, **batch)
    values = LOSSES[name].loss(found, answers(tagger(0), **batch), Batch(batch), {})
    if name == "contrastive":  # it is the nearest, but the others are not infinitely far
        away = LOSSES[name].loss(found, answers(tagger(1), **batch), Batch(batch), {})
        assert bool((values < away).all())
        return
    torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-5)
    values.sum().backward()
    gradients = [weight.grad.abs().max() for weight in student.parameters() if weight.grad is not None]
    assert max(gradients) < 1e-4


@pytest.mark.parametrize("name", ENCODER)
def test_a_causal_model_counts_the_positions_of_its_own_loss(name):
    student, teacher = tiny_llama(seed=0).eval(), tiny_llama(seed=1).eval()
    ids = torch.randint(1, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.4, -100)
    with torch.no_grad():
        ours, theirs = (answers(model, input_ids=ids) for model in (student, teacher))
    if name == "minilm_v1":  # two queries share a key
        with pytest.raises(
            SessionError, match="'heads' = 4 does not cut the teacher's 64 and 32 features into as many"
        ):
            LOSSES[name].loss(ours, theirs, Batch({"labels": labels}), {})
        return
    items = LOSSES[name].loss(ours, theirs, Batch({"labels": labels}, shifts_labels=True), {})
    following = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)  # what each position is asked for; the last is none
    each = LOSSES[name].loss(ours, theirs, Batch({"labels": following}), {}).reshape(3, 9)
    expected = [each[row, token] for row in range(3) for token in range(8) if labels[row, token + 1] != -100]
    torch.testing.assert_close(items, torch.stack(expected))


# ------------------------------------------------------------------------------------------------ hidden states


def states(count, width=8, seed=0):
    return tuple(randn(3, 7, width, seed=10 * seed + layer) for layer in range(count))


def test_cosine_is_what_torch_calls_cosine_embedding_loss():
    ours, theirs = states(3), states(3, seed=1)
    values = Cosine().loss({"hidden_states": ours}, {"hidden_states": theirs}, Batch({"labels": torch.ones(3, 7)}), {})
    same = torch.ones(21)
    expected = F.cosine_embedding_loss(ours[-1].flatten(0, 1), theirs[-1].flatten(0, 1), same, reduction="none")
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("distiller", [Hidden(Hidden.Config("last")), Cosine(), Contrastive()])
def test_widths_that_differ_meet_in_the_teachers(distiller):
    narrow, wide = tiny_bert(), BertModel(BertConfig(hidden_size=96, num_hidden_layers=1, vocab_size=9))
    learned = distiller.prepare(narrow, wide, torch.Generator().manual_seed(0))
    assert learned["projection"].shape == (96, 64)
    assert distiller.prepare(narrow, narrow, torch.Generator()) == {}
    ours, theirs = states(2, 64), states(2, 96, seed=1)
    values = distiller.loss({"hidden_states": ours}, {"hidden_states": theirs}, Batch({}), learned)
    moved = ({"hidden_states": [state @ learned["projection"].t() for state in ours]}, {"hidden_states": theirs})
    torch.testing.assert_close(values, distiller.loss(*moved, Batch({}), {}))


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_contrastive_finds_the_sentence_among_the_batch(pooling):
    ours, theirs, mask = states(2), states(2, seed=1), torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5])

    def embedding(tokens, row):
        real = tokens[row][mask[row].bool()].double()
        return real.mean(dim=0) if pooling == "mean" else real[0]

    expected = []
    for row in range(3):
        pairs = [(embedding(ours[-1], row), embedding(theirs[-1], other)) for other in range(3)]
        cosines = torch.stack([one @ other / one.norm() / other.norm() for one, other in pairs])
        expected.append(-(cosines / 0.1).log_softmax(0)[row])
    batch = Batch({"attention_mask": mask})
    distiller = Contrastive(Contrastive.Config(0.1, pooling))
    values = distiller.loss({"hidden_states": ours}, {"hidden_states": theirs}, batch, {})
    torch.testing.assert_close(values.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_a_sentence_alone_in_its_batch_teaches_nothing():
    one = {"hidden_states": [state[:1].requires_grad_() for state in states(2)]}
    with pytest.warns(UserWarning, match="a micro-batch of one sample teaches nothing"):
        values = Contrastive().loss(one, {"hidden_states": [state[:1] for state in states(2, seed=1)]}, Batch({}), {})
    assert values.tolist() == [0.0]


# ---------------------------------------------------------------------------------------------------- attention


def attention(ours, theirs, compare, **inputs):
    distiller = Attention(Attention.Config(compare))
    return distiller.loss({"attentions": ours}, {"attentions": theirs}, Batch(inputs), {})


def test_attention_is_the_mean_squared_error_of_maps_or_scores():
    ours, theirs = (3 * randn(2, 3, 4, 5, 5, seed=seed) for seed in (0, 1))  # layers, samples, heads, queries, keys
    maps = [scores.softmax(-1).unbind() for scores in (ours, theirs)]
    expected = F.mse_loss(ours.softmax(-1), theirs.softmax(-1), reduction="none").mean(dim=(0, 2, 4))
    labels = torch.zeros(3, 5)
    torch.testing.assert_close(attention(*maps, "maps", labels=labels), expected.flatten())
    centred = [scores - scores.mean(dim=-1, keepdim=True) for scores in (ours, theirs)]
    expected = F.mse_loss(*centred, reduction="none").mean(dim=(0, 2, 4)).flatten()
    torch.testing.assert_close(attention(*maps, "scores", labels=labels), expected, rtol=1e-4, atol=1e-5)


def test_scores_do_not_see_what_the_softmax_hides():
    ours, theirs = 3 * randn(1, 2, 5, 5), 3 * randn(1, 2, 5, 5, seed=1)
    future = torch.ones(5, 5).triu(1).bool()
    maps = [[scores.masked_fill(future, -math.inf).softmax(-1)] for scores in (ours, theirs)]
    expected = []
    for query in range(5):
        seen = [scores[0, :, query, : query + 1] for scores in (ours, theirs)]
        centred = [part - part.mean(dim=-1, keepdim=True) for part in seen]
        expected.append(F.mse_loss(*centred))
    values = attention(*maps, "scores", labels=torch.zeros(1, 5))
    torch.testing.assert_close(values, torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compare", ["maps", "scores"])
def test_keys_that_are_padding_do_not_count_even_if_they_are_looked_at(compare):
    ours, theirs = (randn(2, 2, 5, 5, seed=seed).softmax(-1) for seed in (0, 1))
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    values = attention([ours], [theirs], compare, attention_mask=mask)
    cut = [maps[1:, :, :3, :3] for maps in (ours, theirs)]
    torch.testing.assert_close(values[1:], attention([cut[0]], [cut[1]], compare))


def test_scores_are_those_of_the_keys_that_dropout_left():
    ours, theirs = 3 * randn(1, 1, 4, 6), 3 * randn(1, 1, 4, 6, seed=1)
    kept = torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    student = (ours.softmax(-1) * kept / 0.9).requires_grad_()
    values = attention([student], [theirs.softmax(-1)], "scores", labels=torch.zeros(1, 4))
    left = [scores[..., kept] for scores in (ours, theirs)]
    centred = [part - part.mean(dim=-1, keepdim=True) for part in left]
    torch.testing.assert_close(values, F.mse_loss(*centred, reduction="none").mean(dim=-1)[0, 0], rtol=1e-4, atol=1e-5)
    values.sum().backward()
    assert bool(student.grad.isfinite().all())


def test_other_head_counts_are_sent_to_relation():
    with pytest.raises(SessionError, match=r"got \(1, 2, 5, 5\) from the student and \(1, 4, 5, 5\) .*; use relation"):
        attention([randn(1, 2, 5, 5).softmax(-1)], [randn(1, 4, 5, 5).softmax(-1)], "maps")


# ----------------------------------------------------------------------------------------------------- relation


def parts(width, layers=1, seed=0):
    return {
        name: tuple(randn(2, 5, width, seed=100 * seed + 10 * index + layer) for layer in range(layers))
        for index, name in enumerate(("queries", "keys", "values"))
    }


def relation(ours, theirs, relations=("qq", "kk", "vv"), heads=2, layers="last", **inputs):
    return Relation(Relation.Config(relations, heads, layers)).loss(ours, theirs, Batch(inputs), {})


@pytest.mark.parametrize("relations", [("qq", "kk", "vv"), ("qk", "vv")])
def test_relation_is_what_minilm_writes(relations):
    ours, theirs = parts(8), parts(12, seed=1)
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    letters = {"q": "queries", "k": "keys", "v": "values"}

    def row(output, pair, sample, head, token, size):
        one, other = (
            output[letters[letter]][0][sample, :, head * size : (head + 1) * size].double() for letter in pair
        )
        real = int(mask[sample].sum())
        return (one[token] @ other[:real].t() / size**0.5).softmax(-1)

    expected = []
    for sample, token in [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2)]:
        values = []
        for pair in relations:
            for head in range(2):
                p, q = row(theirs, pair, sample, head, token, 6), row(ours, pair, sample, head, token, 4)
                values.append((p * (p / q).log()).sum())
        expected.append(torch.stack(values).mean())
    labels = torch.where(mask.bool(), 1, -100)
    values = relation(ours, theirs, relations, attention_mask=mask, labels=labels)
    torch.testing.assert_close(values.double(), torch.stack(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("relations", [("qq", "kk", "vv"), ("qk",)])
def test_relation_does_not_see_a_rotation_of_a_heads_features(relations):
    ours, theirs = parts(16), parts(16, seed=1)
    rotation, _ = torch.linalg.qr(randn(8, 8, seed=7))
    turned = {
        name: tuple((tensor.unflatten(-1, (2, 8)) @ rotation).flatten(-2) for tensor in tensors)
        for name, tensors in ours.items()
    }
    torch.testing.assert_close(relation(turned, theirs, relations), relation(ours, theirs, relations))
    once = {**ours, "keys": turned["keys"]}
    changed = not torch.allclose(relation(once, theirs, relations), relation(ours, theirs, relations), atol=1e-3)
    assert changed == (relations == ("qk",))  # queries have to turn with the keys that they meet


def test_relation_says_which_heads_do_not_fit():
    with pytest.raises(SessionError, match="'heads' = 16 does not cut the teacher's 24 and 24 features"):
        relation(parts(16), parts(24), heads=16)


def test_projections_are_found_in_what_is_known():
    import transformers

    small = {"vocab_size": VOCABULARY}
    models = [
        (tiny_bert(), 64, 64),
        (tiny_llama(), 64, 32),
        (transformers.GPT2Model(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, **small)), 32, 32),
        (transformers.DistilBertModel(transformers.DistilBertConfig(dim=32, n_heads=2, n_layers=2, **small)), 32, 32),
    ]
    ids = torch.arange(6)[None]
    for model, query, key in models:
        found = answers(model.eval(), {Need.PROJECTIONS}, input_ids=ids)
        assert [tuple(tensor.shape) for tensor in found["queries"]] == 2 * [(1, 6, query)]
        assert [tuple(tensor.shape) for tensor in found["keys"]] == 2 * [(1, 6, key)]
        assert hooked(model) == 0
    bert, gpt2 = models[0][0], models[2][0]
    found = answers(bert, {Need.PROJECTIONS, Need.HIDDEN_STATES}, input_ids=ids)
    last = bert.encoder.layer[1].attention.self
    assert torch.equal(found["values"][1], last.value(found["hidden_states"][1]))
    found = answers(gpt2, {Need.PROJECTIONS, Need.HIDDEN_STATES}, input_ids=ids)
    fused = gpt2.h[0].attn.c_attn(gpt2.h[0].ln_1(found["hidden_states"][0]))
    assert torch.equal(torch.cat([found[name][0] for name in ("queries", "keys", "values")], dim=-1), fused)


# ------------------------------------------------------------------------------------------------------- layers


def over_layers(layers, ours, theirs):
    return Hidden(Hidden.Config(layers)).loss({"hidden_states": ours}, {"hidden_states": theirs}, Batch({}), {})


def test_layers_count_from_the_embeddings():
    ours, theirs = states(3), states(5, seed=1)  # two layers and four
    each = {
        (one, other): F.mse_loss(ours[one], theirs[other], reduction="none").mean(dim=(1, 2))
        for one in range(3)
        for other in range(5)
    }
    torch.testing.assert_close(over_layers("uniform", ours, theirs), (each[0, 0] + each[1, 2] + each[2, 4]) / 3)
    torch.testing.assert_close(over_layers("last", ours, theirs), each[2, 4])
    pairs = over_layers(((0, 0), (2, 1)), ours, theirs)
    torch.testing.assert_close(pairs, (each[0, 0] + each[2, 1]) / 2)
    assert torch.equal(over_layers("uniform", ours, ours[::-1]), over_layers("all", ours, ours[::-1]))


def test_attention_and_relation_count_from_the_first_layer():
    ours, theirs = ([scores.softmax(-1) for scores in states(n, 7, seed=n)] for n in (2, 4))
    ours, theirs = [maps[:, None] for maps in ours], [maps[:, None] for maps in theirs]
    distiller = Attention(Attention.Config("maps", "uniform"))
    uniform = distiller.loss({"attentions": ours}, {"attentions": theirs}, Batch({}), {})
    torch.testing.assert_close(uniform, attention(ours, [theirs[1], theirs[3]], "maps"))
    student, teacher = parts(8, 2), parts(8, 4, seed=1)
    chosen = {name: (tensors[1], tensors[3]) for name, tensors in teacher.items()}
    for layers in ("uniform", ((1, 2), (2, 4))):
        torch.testing.assert_close(
            relation(student, teacher, layers=layers), relation(student, chosen, layers="all"), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("all", 'hidden: the student has 2 layers and the teacher 3; use layers = "last", "uniform", or pairs'),
        ("uniform", "hidden: the student has 2 layers and the teacher 3, which do not divide; use layers"),
        (((1, 1), (2, 4)), r"'layers' = \[\[1, 1\], \[2, 4\]\] names one that is not there"),
        (((3, 1),), r"the student has 2 layers and the teacher 3; 'layers' = \[\[3, 1\]\] names"),
    ],
)
def test_a_mapping_that_does_not_fit_is_named(layers, message):
    with pytest.raises(SessionError, match=message):
        over_layers(layers, states(3), states(4))


@pytest.mark.parametrize(("distiller", "key"), [(Attention(), "attentions"), (Relation(), "queries")])
def test_what_a_model_does_not_return_is_named(distiller, key):
    with pytest.raises(SessionError, match=f"the model or its teacher returns no {key}"):
        distiller.loss({"logits": randn(2, 2)}, {"logits": randn(2, 2)}, Batch({}), {})


def test_a_recipe_writes_pairs_of_layers_as_lists():
    recipe = {"stage": [{"distill": {"use": "hidden", "layers": [[0, 0], [2, 4]]}}]}
    plan = sparsehooks.Plan.build(sparsehooks.Recipe.from_dict(recipe), sparsehooks.PluginManager())
    assert plan.stages[0].components["distill"].config == Hidden.Config(((0, 0), (2, 4)))
    recipe["stage"][0]["distill"]["layers"] = [["a", "b"]]
    with pytest.raises(
        PlanError, match=r"stage\[0\].distill.layers: expected a string or a list, got \[\['a', 'b'\]\]"
    ):
        sparsehooks.Plan.build(sparsehooks.Recipe.from_dict(recipe), sparsehooks.PluginManager())


# --------------------------------------------------------------------------------------------------------- runs


def deep_teacher(folder, **options):
    torch.manual_seed(2)
    settings = {"hidden_size": 64, "num_attention_heads": 2, "num_labels": 3, **options}
    config = BertConfig(
        vocab_size=VOCABULARY, num_hidden_layers=4, intermediate_size=128, max_position_embeddings=32, **settings
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


SEVERAL = [
    ({"use": "jsd", "beta": 0.3}, 20000.0),
    ({"use": "dkd"}, 500.0),
    ({"use": "hidden", "layers": "uniform"}, 0.25),
    ({"use": "attention", "layers": [[1, 2], [2, 4]]}, 1000.0),
    ({"use": "relation"}, 1000.0),
    ({"use": "cosine"}, 0.75),
    ({"use": "contrastive"}, 0.125),
]
"""With weights that make terms of equal size of what untrained models differ by."""
CLASSES = {
    "jsd": JSD,
    "dkd": DKD,
    "hidden": Hidden,
    "attention": Attention,
    "relation": Relation,
    "cosine": Cosine,
    "contrastive": Contrastive,
}


def hooked(model):
    """How many hooks there are that are not those by which transformers itself collects hidden states."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return sum(hook.__module__.startswith("sparsehooks") for hook in hooks)


def several(teacher):
    return {"stage": [{"distill": use, "teacher": str(teacher), "weight": weight} for use, weight in SEVERAL]}


def test_several_losses_add_up_and_the_attention_is_as_before(tmp_path):
    teacher = deep_teacher(tmp_path / "teacher")
    model, rows = tiny_classifier(seed=1), labelled(8)
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
    with torch.no_grad():
        ours, theirs = answers(model, **batch), answers(teacher, **batch)
    terms = {}
    for use, weight in SEVERAL:
        options = {key: tuple(map(tuple, v)) if isinstance(v, list) else v for key, v in use.items() if key != "use"}
        distiller = CLASSES[use["use"]](CLASSES[use["use"]].Config(**options))
        terms[use["use"]] = weight * distiller.loss(ours, theirs, Batch(batch), {}).mean().item()
    assert min(terms.values()) > 0.1
    trainer = Ordered(model=model, args=arguments(tmp_path, max_steps=1, logging_steps=1), train_dataset=rows)
    callback = CompressionCallback(several(tmp_path / "teacher"))
    trainer.add_callback(callback)
    assert model.config._attn_implementation == "sdpa"
    trainer.train()
    expected = ours["loss"].item() + sum(terms.values())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert (model.config._attn_implementation, hooked(model)) == ("sdpa", 0)
    before = model(**batch).logits
    assert model(**batch, output_attentions=False).attentions is None
    trainer.save_model(tmp_path / "saved")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(**batch).logits, before)


def test_after_a_failure_the_attention_is_as_before(tmp_path):
    deep_teacher(tmp_path / "teacher", num_attention_heads=4)
    model = tiny_classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = {"input_ids": torch.ones(2, 4).long(), "labels": torch.zeros(2).long()}
    recipe = {
        "stage": [
            {"distill": use, "teacher": str(tmp_path / "teacher")}
            for use in ("relation", {"use": "attention", "layers": "last"})
        ]
    }
    seen = []

    def run():
        with sparsehooks.attach(model, optimizer, recipe, total_steps=1):
            seen.append((model.config._attn_implementation, hooked(model)))
            model(**batch)

    with pytest.raises(SessionError, match=r"got \(2, 2, 4, 4\) from the student and \(2, 4, 4, 4\)"):
        run()
    assert seen == [("eager", 6 + 1)]  # the projections of two layers, and the loss
    assert (model.config._attn_implementation, hooked(model)) == ("sdpa", 0)
    trainer = Trainer(model=model, args=arguments(tmp_path / "run"), train_dataset=labelled(8))
    sparsehooks.attach_trainer(trainer, recipe)
    with pytest.raises(SessionError, match="use relation"):
        trainer.train()
    assert model.config._attn_implementation == "sdpa"


def test_a_model_of_several_goes_back_to_the_attention_of_each():
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={"vocab_size": 9, **sizes}, vision_config={"image_size": 8, "patch_size": 4, **sizes}
    )
    model = transformers.CLIPModel(config)
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})

    def implementations():
        return [part._attn_implementation for part in (config, config.text_config, config.vision_config)]

    outputs = Outputs(model, {Need.ATTENTIONS})
    assert implementations() == ["eager", "eager", "eager"]
    outputs.close()
    assert implementations() == ["sdpa", "eager", "sdpa"]


def test_an_attention_that_cannot_be_switched_is_named_before_training(monkeypatch):
    monkeypatch.setattr(BertModel, "_can_set_attn_implementation", lambda *_: False)
    with pytest.raises(SessionError, match="BertModel returns no attention maps with its 'sdpa' attention, and cannot"):
        losses([{"distill": "attention"}])


def test_gradient_accumulation_changes_nothing(tmp_path):
    tiny_llama(seed=4).save_pretrained(tmp_path / "teacher")
    uses = [
        {"use": "jsd"},
        {"use": "relation", "layers": "all"},
        {"use": "attention"},
        {"use": "dkd"},
        {"use": "cosine"},
    ]
    recipe = {"stage": [{"distill": use, "teacher": str(tmp_path / "teacher")} for use in uses]}

    def one(batch, accumulation):
        student = tiny_llama(seed=3)
        before = copied(student)
        options = arguments(
            tmp_path / "run",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            weight_decay=0.0,
            max_steps=1,
        )
        trainer = Ordered(model=student, args=options, train_dataset=texts(8))
        trainer.add_callback(CompressionCallback(recipe))
        trainer.train()
        return torch.cat([(value - before[name]).flatten() for name, value in student.state_dict().items()])

    whole, parts = one(8, 1), one(2, 4)
    assert whole.norm() > 0
    assert (whole - parts).norm() / whole.norm() < 1e-6


def losses(stages, steps=6, model=None):
    """The loss that each of some steps adds; nothing learns."""
    model = tiny_bert() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batch = {key: torch.stack([row[key] for row in sentences(4)]) for key in ("input_ids", "attention_mask")}
    found = []
    with sparsehooks.attach(model, optimizer, {"stage": stages}, total_steps=steps):
        for _ in range(steps):
            loss = model(**batch).get("loss")
            found.append(None if loss is None else loss.item())
            if loss is not None:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return found


def test_a_schedule_gives_a_share_of_the_weight(tmp_path):
    tiny_bert(seed=1).save_pretrained(tmp_path / "teacher")
    stage = {"distill": "cosine", "teacher": str(tmp_path / "teacher"), "weight": 3.0}
    (full, *rest) = losses([stage])
    assert full > 0
    assert rest == 5 * [full]
    ramp = losses([{**stage, "schedule": {"use": "linear", "start": 1, "end": 5}}])
    assert ramp[0] is None  # the share of step 1 is 0: not even the teacher is asked
    assert ramp[1:] == pytest.approx([full / 4, full / 2, 3 * full / 4, full, full], rel=1e-6)
    late = losses([{**stage, "schedule": {"use": "oneshot", "start": 0.5}}])
    assert late == [None, None, *4 * [pytest.approx(full)]]


def test_a_schedule_that_cannot_be_is_a_problem_of_the_plan():
    stage = {"distill": "kl", "schedule": {"use": "feedback", "metric": "eval_loss", "drop": 0.1}}
    with pytest.raises(PlanError, match="'feedback' follows what pruning does to a metric"):
        losses([stage], model=tiny_classifier())
    with pytest.raises(PlanError, match="acts until step 9, but the run has 6 steps"):
        losses([{"distill": "hidden", "schedule": {"use": "linear", "end": 9}}])


def test_a_run_with_a_schedule_resumes_bit_identical(tmp_path):
    deep_teacher(tmp_path / "teacher", hidden_size=96)
    uses = [{"use": "hidden", "layers": "uniform"}, {"use": "attention", "layers": "last"}, {"use": "relation"}]
    ramp = {"use": "cosine", "start": 0.25, "end": 0.75}
    recipe = {"stage": [{"distill": use, "teacher": str(tmp_path / "teacher"), "schedule": ramp} for use in uses]}

    def run(resume=None):
        model = tiny_classifier()
        options = arguments(tmp_path / "run", save_strategy="steps", save_steps=5, max_steps=10)
        trainer = Trainer(model=model, args=options, train_dataset=labelled())
        trainer.add_callback(CompressionCallback(recipe))
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run()
    assert same_state(whole, run(str(tmp_path / "run" / "checkpoint-5")))


def test_a_teacher_is_asked_once_and_only_for_what_its_stages_need(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        tiny_bert(seed=seed).save_pretrained(tmp_path / name)
    recipe = {
        "stage": [
            {"distill": "hidden", "teacher": str(tmp_path / "one")},
            {"distill": "cosine", "teacher": str(tmp_path / "one")},
            {"distill": "attention", "teacher": str(tmp_path / "two")},
        ]
    }
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    asked = []
    with sparsehooks.attach(model, optimizer, recipe, total_steps=1) as session:
        for name, teacher in session._distillation._teachers.items():
            teacher.model.register_forward_pre_hook(
                lambda module, args, kwargs, name=name.use: asked.append(
                    (name[-3:], sorted(kwargs.keys() - {"input_ids", "use_cache"}), module.config._attn_implementation)
                ),
                with_kwargs=True,
            )
        model(input_ids=torch.ones(2, 4).long()).loss.backward()
        optimizer.step()
    assert asked == [("one", ["output_hidden_states"], "sdpa"), ("two", ["output_attentions"], "eager")]


def test_a_teacher_with_more_words_teaches_hidden_states_but_not_logits(tmp_path):
    deep_teacher(tmp_path / "more", num_labels=5)
    model = tiny_classifier()
    stage = {"teacher": str(tmp_path / "more"), "distill": {"use": "hidden", "layers": "uniform"}}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=VOCABULARY + 9, **sizes)).save_pretrained(tmp_path / "words")
    assert losses([{**stage, "teacher": str(tmp_path / "words")}])[0] > 0
    with pytest.raises(SessionError, match=r"got \(4, 3\) from the student and \(4, 5\) from the teacher"):
        losses([{**stage, "distill": "kl"}], model=model)
    BertModel(BertConfig(vocab_size=VOCABULARY - 9, **sizes)).save_pretrained(tmp_path / "less")
    with pytest.raises(SessionError, match=r"knows 119 tokens, and the batch holds token 12\d; take"):
        losses([{**stage, "teacher": str(tmp_path / "less")}])
