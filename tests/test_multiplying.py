"""Layers that multiply by a backend while they train: the same numbers as without one, and fewer products."""

import warnings

import pytest
import torch
from helpers import arguments, labelled, linear_weights, same_state, tiny_classifier
from test_semi_structured import GPU, Emulated, needs_gpu
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

import sparsehooks
from sparsehooks import (
    Backend,
    Component,
    CompressionCallback,
    Plan,
    PlanError,
    PluginManager,
    Recipe,
    Support,
    hookimpl,
)
from sparsehooks.builtin.backends import semi_structured
from sparsehooks.builtin.backends.two_four import off_pattern, pack, unpack
from sparsehooks.multiplying import Products
from sparsehooks.targets import find

BOTH_WAYS = {"use": "2:4", "transposable": True}
EVERY = {"use": "constant", "start": 0.0, "end": 1.0, "every": 2}


class Twin(Backend):
    """2:4 in torch alone."""

    trains = True
    packed = ()

    def supports(self, layer, device):
        why = off_pattern(layer.weight)
        return Support(ok=why is None, reason=why or "")

    def pack(self, layer):
        Twin.packed += (tuple(layer.weight.shape),)
        return (*pack(layer.weight.contiguous()), layer.bias)

    def run(self, packed, input):  # noqa: A002
        values, positions, bias = packed
        return functional.linear(input, unpack(values, positions), bias)


class TwinPlugin:
    @hookimpl
    def register_components(self, registry):
        registry.add(Component("backend", "twin", Twin, "2:4 in torch alone"))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def train(model, recipe, steps=8, dtype=torch.float32, **options):
    """Each step's output and gradients."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    found = []
    with sparsehooks.attach(model, optimizer, recipe, total_steps=steps, plugins=[TwinPlugin()], **options) as session:
        for _ in range(steps):
            inputs = torch.randn(2, 8, 16, generator=generator, dtype=dtype, requires_grad=True)
            optimizer.zero_grad()
            outputs = model(inputs)
            outputs.square().mean().backward()
            found += [outputs.detach(), inputs.grad, *(weight.grad.clone() for weight in model.parameters())]
            optimizer.step()
    return found, session


def recipe(**stage):
    return {"stage": [{"prune": "sr_ste", "pattern": BOTH_WAYS, "schedule": EVERY, **stage}]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("criterion", ["sr_ste", "movement", "magnitude"])
@pytest.mark.parametrize("pattern", ["2:4", BOTH_WAYS])
def test_outputs_and_all_gradients_are_those_of_the_masked_layer(dtype, criterion, pattern):
    dense, sparse = net().to(dtype), net().to(dtype)
    Twin.packed = ()
    given = {"prune": criterion, "pattern": pattern}
    expected, _ = train(dense, recipe(**given), dtype=dtype)
    assert Twin.packed == ()
    found, _ = train(sparse, recipe(**given, backend="twin"), dtype=dtype)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert same_state(sparse, dense)
    assert type(sparse[0]) is nn.Linear
    forward, backward = [(32, 16), (8, 32)], [(32, 8), (16, 32)]
    assert list(Twin.packed) == 8 * (forward + backward if pattern is BOTH_WAYS else forward)
    assert off_pattern(sparse[0].weight) is None
    assert (off_pattern(sparse[0].weight.t()) is None) == (pattern is BOTH_WAYS)


def test_until_the_masks_are_final_the_layers_multiply_densely():
    Twin.packed = ()
    ramp = {"use": "linear", "start": 2, "end": 6, "every": 2}
    dense, sparse = net(), net()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        expected, _ = train(dense, recipe(schedule=ramp, prune="magnitude"))
        found, _ = train(sparse, recipe(schedule=ramp, prune="magnitude", backend="twin"))
    assert not said
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(Twin.packed) == 2 * 4, "of eight steps the last two, forward and backward"


@pytest.mark.parametrize(
    ("stage", "why"),
    [
        ({"pattern": "unstructured", "sparsity": 0.5}, r"row \d+ has [34] nonzeros in the columns"),
        ({"prune": "l0", "pattern": "2:4"}, r"row \d+ has [34] nonzeros in the columns"),
    ],
)
def test_what_the_backend_does_not_take_is_said_once_and_multiplies_densely(stage, why):
    Twin.packed = ()
    given = recipe(**{**stage, "targets": ["0"]})
    dense, sparse = net(), net()
    torch.manual_seed(2)  # of l0's gates
    expected, _ = train(dense, given)
    given["stage"][0]["backend"] = "twin"
    torch.manual_seed(2)
    with pytest.warns(UserWarning, match=rf"'0', and others likewise, multiply densely: {why}") as said:
        found, _ = train(sparse, given)
    assert len(said) == 1
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert Twin.packed == ()


def test_weights_that_are_zero_by_chance_are_not_taken_for_masked():
    Twin.packed = ()
    model = net()
    nn.init.zeros_(model[2].weight)
    with pytest.warns(UserWarning, match="multiply densely"):
        train(model, recipe(prune="magnitude", pattern="unstructured", sparsity=0.3, targets=["2"], backend="twin"))
    assert Twin.packed == ()


def products(model, backend):
    """A stage's products, and the weights of its layers."""
    given = Recipe.from_dict(recipe(backend=backend, pattern="2:4"))
    stage = Plan.build(given, PluginManager([TwinPlugin()])).stages[0]
    return Products(stage, stage.components["backend"].create()), find(model, ["Linear"], [])[0]


def product(model, mask, backend):
    """What takes the place of the product of the model's only layer."""
    made, (target,) = products(model, backend)
    return made.of(target, mask)


def test_each_new_mask_is_shown_to_the_backend():
    model = nn.Sequential(nn.Linear(16, 8))
    first = torch.arange(16).expand(8, 16) % 4 < 2
    masks = [first, first, torch.ones(8, 16, dtype=torch.bool), first]
    given = iter(masks)
    multiply = product(model, lambda: next(given), "twin")
    inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))

    def packed(mask):
        weight = model[0].weight.masked_fill(~mask, 0)
        Twin.packed = ()
        found = multiply(inputs, weight, model[0].bias)
        assert torch.equal(found, functional.linear(inputs, weight, model[0].bias))
        return len(Twin.packed)

    with pytest.warns(UserWarning, match="row 0 has 4 nonzeros in the columns 0 to 3"):
        found = [packed(mask) for mask in masks]
    assert found == [1, 1, 0, 1]


def test_a_layer_is_named_once_and_a_reason_given_once():
    first = torch.ones(8, 16, dtype=torch.bool)
    second = first.clone()
    second[0, :4] = torch.tensor([True, False, True, False])
    third = first.clone()
    third[0] = second[1] = torch.arange(16) % 2 == 0
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False))
    made, targets = products(model, "twin")

    def said(layer, mask):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made.of(targets[layer], lambda: mask)(torch.ones(1, 16), model[layer].weight * mask, None)
        return [str(warning.message).removeprefix("stage[0] prune sr_ste: ") for warning in caught]

    likewise = "and others likewise, multiply densely: row"
    assert said(0, first) == [f"'0', {likewise} 0 has 4 nonzeros in the columns 0 to 3"]
    assert said(0, second) == []
    assert said(1, first) == []
    assert said(1, second) == [f"'1', {likewise} 0 has 4 nonzeros in the columns 4 to 7"]
    assert said(1, third) == []


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does that itself
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # and this
@pytest.mark.parametrize("backend", [None, "twin"])
def test_a_backend_breaks_the_graph_of_compile_and_gives_no_second_derivatives(backend):
    model, inputs = net(), torch.randn(4, 16, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = recipe() if backend is None else recipe(backend=backend)
    torch._dynamo.reset()
    with sparsehooks.attach(model, optimizer, given, total_steps=1, plugins=[TwinPlugin()]):
        expected = model(inputs)
        (gradient,) = torch.autograd.grad(expected.square().sum(), inputs, create_graph=True)
        whole = torch.compile(model, backend="eager", fullgraph=True)
        if backend is None:
            assert torch.equal(whole(inputs), expected)
            gradient.sum().backward()
        else:
            with pytest.raises(torch._dynamo.exc.Unsupported):
                whole(inputs)
            assert torch.equal(torch.compile(model, backend="eager")(inputs), expected)
            with pytest.raises(RuntimeError, match="differentiate twice"):
                gradient.sum().backward()
        optimizer.step()


def test_the_layers_of_gpt2_lie_the_other_way_round():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(Conv1D(32, 16), nn.ReLU(), nn.Linear(32, 8, bias=False))

    dense, sparse = model(), model()
    expected, _ = train(dense, recipe(targets=["Linear", "Conv1D"]))
    Twin.packed = ()
    found, _ = train(sparse, recipe(targets=["Linear", "Conv1D"], backend="twin"))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert set(Twin.packed) == {(32, 16), (16, 32), (8, 32), (32, 8)}


def test_what_needs_no_gradient_gets_none():
    model = net()
    model[0].bias.requires_grad_(False)
    inputs = torch.randn(4, 16)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    Twin.packed = ()
    given = recipe(backend="twin")
    with sparsehooks.attach(model, optimizer, given, total_steps=1, plugins=[TwinPlugin()]):
        model(inputs).sum().backward()
        optimizer.step()
    assert list(Twin.packed) == [(32, 16), (8, 32), (32, 8)], "nobody asks for the gradient of the first inputs"
    assert model[0].bias.grad is None
    assert model[0].weight.grad.any()


def test_a_plan_refuses_what_cannot_be():
    manager = PluginManager([TwinPlugin()])

    def problems(model=None, **stage):
        with pytest.raises(PlanError) as error:
            Plan.build(Recipe.from_dict(recipe(**stage)), manager, model)
        return str(error.value)

    said = problems(backend="dense_packed")
    assert "recipe.stage[0].backend: 'dense_packed' gives no gradients; leave 'backend' out" in said
    assert "did you mean 'twin'" in problems(backend="twins")
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 8))
    said = problems(model, backend="twin", targets=["Embedding", "Linear"])
    assert "recipe.stage[0].backend: no backend runs '0', which is a Embedding; exclude it" in said
    recipe_of = Recipe.from_dict(recipe(backend="twin"))
    assert Recipe.from_dict(recipe_of.to_dict()) == recipe_of


def test_without_training_nothing_multiplies():
    model = net()
    with pytest.warns(UserWarning, match=r"recipe.stage\[0\].backend: nothing trains here; see accelerate_model"):
        sparsehooks.compress(model, recipe(prune="magnitude", backend="semi_structured"))
    assert off_pattern(model[0].weight) is None


# --------------------------------------------------------------------------------------------- sparse tensor cores


class Exact(Emulated):
    """Multiplies as torch's layer does, bit for bit."""

    def _dense(self, weight, columns, bias, out_dtype):
        self.products = getattr(self, "products", 0) + 1
        return functional.linear(columns.t(), weight, bias).t()


def run(folder, backend=None, resume=None, steps=6):
    stage = {"prune": "sr_ste", "pattern": BOTH_WAYS, "exclude": ["*embeddings*", "*pooler*", "classifier"]}
    stage |= {"schedule": EVERY} if backend is None else {"schedule": EVERY, "backend": backend}
    options = {"max_steps": steps, "bf16": True, "save_strategy": "steps", "save_steps": 3}
    rows = labelled(length=16)
    trainer = Trainer(model=tiny_classifier(), args=arguments(folder, **options), train_dataset=rows)
    trainer.add_callback(CompressionCallback({"stage": [stage]}))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("cusparselt", [True, False])
def test_a_trainer_ends_with_the_same_weights_bit_for_bit(tmp_path, monkeypatch, cusparselt):
    dense = run(tmp_path / "dense").model
    emulated = Exact(monkeypatch, capability=(8, 0), cusparselt=cusparselt)
    trainer = run(tmp_path / "sparse", "semi_structured")
    assert same_state(trainer.model, dense)
    layers = len(linear_weights(dense))
    assert emulated.products >= 6 * 2 * layers, "every layer, forward and backward"
    assert emulated.searched == (6 if cusparselt else 0), "once for each shape, with its bias and transposed"
    trainer.save_model(tmp_path / "saved")
    with sparsehooks.safe_open(tmp_path / "saved") as file:
        for name in linear_weights(dense):
            weight = file.get_tensor(name)
            assert off_pattern(weight) is None
            assert off_pattern(weight.t()) is None
    resumed = run(tmp_path / "again", "semi_structured", str(tmp_path / "sparse" / "checkpoint-3"))
    assert same_state(resumed.model, dense)


def test_without_sparse_tensor_cores_a_sentence_says_so_and_the_numbers_are_the_same(tmp_path):
    dense = run(tmp_path / "dense").model
    with pytest.warns(UserWarning, match="multiply densely") as said:
        trainer = run(tmp_path / "sparse", "semi_structured")
    assert len(said) == 1
    assert str(said[0].message) == (
        "stage[0] prune sr_ste: 'bert.encoder.layer.0.attention.self.query', and others likewise, multiply densely: "
        "2:4 runs on NVIDIA's GPUs, not on cpu"
    )
    assert same_state(trainer.model, dense)


def test_float32_without_autocast_is_told_what_to_do(monkeypatch):
    Exact(monkeypatch)
    with pytest.warns(UserWarning, match=r"torch.float32; load it as float16 or bfloat16, or train under autocast"):
        train(net(), recipe(backend="semi_structured"))


@pytest.mark.parametrize("cusparselt", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_torchs_own_operations_take_the_shapes_of_both_passes(monkeypatch, cusparselt, tokens):
    """On tensors without numbers: torch computes shapes and refuses wrong ones."""
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt)
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight[:, : weight.shape[1] * 9 // 16].contiguous())
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda *_, **__: 3)
    monkeypatch.setattr(semi_structured, "_ALGORITHMS", {})
    monkeypatch.setattr(semi_structured.SemiStructured, "supports", lambda *_: Support(ok=True))
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(90, 100, dtype=torch.bfloat16))
        mask = torch.ones(100, 90, dtype=torch.bool)
        inputs = torch.empty(2, tokens, 90, dtype=torch.bfloat16, requires_grad=True)
        found = product(model, lambda: mask, "semi_structured")(inputs, model[0].weight, model[0].bias)
        assert (found.shape, found.dtype) == ((2, tokens, 100), torch.bfloat16)
        found.sum().backward()
        assert inputs.grad.shape == inputs.shape
        assert model[0].weight.grad.shape == (100, 90)


@needs_gpu
@pytest.mark.parametrize("pattern", ["2:4", BOTH_WAYS])
def test_a_gpu_trains_the_same(pattern):
    def trained(**stage):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128)).to(GPU)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        inputs = torch.randn(4, 33, 256, device=GPU, requires_grad=True)
        given = recipe(pattern=pattern, **stage)
        with sparsehooks.attach(model, optimizer, given, total_steps=1), torch.autocast("cuda", torch.bfloat16):
            model(inputs).square().mean().backward()
            optimizer.step()
        return [inputs.grad, *(weight.grad for weight in model.parameters())]

    layer = nn.Linear(64, 64, dtype=torch.bfloat16, device=GPU)
    nn.init.zeros_(layer.weight)
    if not (support := semi_structured.SemiStructured().supports(layer, layer.weight.device)).ok:
        pytest.skip(support.reason)
    for found, expected in zip(trained(backend="semi_structured"), trained(), strict=True):
        torch.testing.assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0.02)
