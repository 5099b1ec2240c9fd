"""Which backend runs a layer, how it is chosen, and the layer that it runs."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from helpers import same_state, tiny_bert
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import prune
from transformers import AutoModel

from sparsehooks import (
    ArtifactError,
    Backend,
    Component,
    PlanError,
    PluginError,
    RecipeError,
    SessionError,
    Support,
    accelerate_model,
    attach,
    compress,
    hookimpl,
    restore_model,
    save_pretrained,
)
from sparsehooks.accelerated import Accelerated, Lane
from sparsehooks.speed import Speeds, ratio
from sparsehooks.trials import fastest


class Plain(Backend):
    """Computes as torch does, and counts."""

    def __init__(self, config=None):
        super().__init__(config)
        self.packs, self.runs = 0, []

    def supports(self, layer, device):
        return Support(ok=True)

    def pack(self, layer):
        assert type(layer) is nn.Linear
        self.packs += 1
        return layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone()

    def run(self, packed, input):  # noqa: A002
        self.runs.append(input.numel() // input.shape[-1])
        return F.linear(input, *packed)


class Offering:
    """A plugin with these backends, by name."""

    def __init__(self, **backends):
        self.backends = backends

    @hookimpl
    def register_components(self, registry):
        for name, cls in self.backends.items():
            registry.add(Component("backend", name, cls, "for tests"))


def offering(**backends):
    """Only these, without what is built in."""
    return [Offering(**backends), "no:backends"]


def batch(tokens=12):
    return {"input_ids": torch.randint(1, 128, (3, tokens), generator=torch.Generator().manual_seed(0))}


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()


INPUTS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def clock(monkeypatch):
    """Ratios by backend and tokens, in place of time."""
    ratios = {}

    def measured(self, key, tokens):
        value = ratios[key]
        return value(tokens) if callable(value) else value

    monkeypatch.setattr("sparsehooks.trials.Trial._time", measured)
    return ratios


# ----------------------------------------------------------------------------------------------------------- the layer


def test_the_layer_is_an_ordinary_one_but_for_who_computes():
    model = small()
    expected, before = model(INPUTS), copy.deepcopy(model)
    verdicts = accelerate_model(model, "plain", plugins=offering(plain=Plain))
    assert list(verdicts) == ["0", "2"]
    assert verdicts["0"].backend(1) == verdicts["0"].backend(10**6) == "plain"
    assert isinstance(model[0], nn.Linear)
    assert same_state(model, before)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in before.named_parameters()]
    assert torch.equal(model(INPUTS), expected)
    runner = model[0]._sparsehooks_engine.backends["plain"]
    assert runner.runs[-1] == 10
    restore_model(model)
    assert type(model[0]) is nn.Linear
    assert vars(model[0]).keys() == vars(before[0]).keys()
    restore_model(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_packs_for_itself(copied):
    model = small()
    accelerate_model(model, "plain", plugins=offering(plain=Plain))
    expected = model(INPUTS)
    made = copied(model[0])
    assert isinstance(made, Accelerated)
    assert made._sparsehooks_engine is not model[0]._sparsehooks_engine
    assert not made._sparsehooks_engine._packed
    if copied is not copy.copy:
        with torch.no_grad():
            made.weight.zero_()
            made.bias.zero_()
        assert not made(INPUTS).any()
    assert torch.equal(model(INPUTS), expected)


def test_the_packed_form_follows_the_weight():
    model = small()
    accelerate_model(model, "plain", plugins=offering(plain=Plain))
    layer = model[0]
    runner = layer._sparsehooks_engine.backends["plain"]
    layer(INPUTS)
    packs = runner.packs
    layer(INPUTS)
    assert runner.packs == packs

    def expect():
        with torch.no_grad():
            inputs = INPUTS.to(layer.weight.dtype)
            assert torch.equal(layer(inputs), F.linear(inputs, layer.weight, layer.bias))

    with torch.no_grad():
        layer.weight.mul_(2)
    expect()
    layer.load_state_dict({"weight": torch.ones(24, 16), "bias": torch.zeros(24)})
    expect()
    layer.load_state_dict({"weight": torch.ones(24, 16) * 2, "bias": torch.ones(24)}, assign=True)
    expect()
    layer.double()
    expect()
    layer.weight = nn.Parameter(torch.randn(24, 16, dtype=torch.double))
    expect()
    layer.bias = None
    expect()
    assert runner.packs == packs + 6


def test_a_weight_that_takes_the_place_of_another_is_packed_anew():
    """It lies where the one before lay, and is as new."""
    model, memory = small(), np.ones((24, 16), np.float32)
    accelerate_model(model, "plain", targets=["0"], plugins=offering(plain=Plain))
    for seed in range(2):
        memory[:] = np.random.default_rng(seed).standard_normal(memory.shape)
        model[0].weight = nn.Parameter(torch.from_numpy(memory), requires_grad=False)
        with torch.no_grad():
            assert torch.equal(model[0](INPUTS), F.linear(INPUTS, model[0].weight, model[0].bias))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_is_made_anew_in_each_forward_is_torchs(name):
    model = small()
    accelerate_model(model, "plain", targets=["0"], plugins=offering(plain=Plain))
    layer = model[0]
    runs = layer._sparsehooks_engine.backends["plain"].runs
    runs.clear()
    prune.l1_unstructured(layer, name, amount=0.5)
    with torch.no_grad():
        assert torch.equal(layer(INPUTS), F.linear(INPUTS, layer.weight, layer.bias))
        assert not runs
        prune.remove(layer, name)
        layer(INPUTS)
    assert len(runs) == 1


class Single(Plain):
    def supports(self, layer, device):
        single = layer.weight.dtype == torch.float32
        return Support(ok=single, reason="" if single else f"its weight is {layer.weight.dtype}")


def test_what_became_of_a_layer_may_not_suit_its_backend():
    model = small()
    accelerate_model(model, "single", targets=["0"], plugins=offering(single=Single))
    model.double()
    with pytest.warns(UserWarning, match="'0' runs dense, no longer by 'single': its weight is torch.float64"):
        found = model(INPUTS.double())
    restored = copy.deepcopy(model)
    restore_model(restored)
    assert torch.equal(found, restored(INPUTS.double()))
    model(INPUTS.double())  # said once
    model.float()
    runs = len(model[0]._sparsehooks_engine.backends["single"].runs)
    model(INPUTS)
    assert len(model[0]._sparsehooks_engine.backends["single"].runs) == runs + 1


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy])
def test_what_is_true_of_many_layers_is_said_once(copied):
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))).eval()
    accelerate_model(model, "single", plugins=offering(single=Single))
    model = copied(model).double()
    with pytest.warns(UserWarning, match="float64; so may 2 more of the layers that it ran$") as said:
        model(INPUTS.double())
    assert len(said) == 1


class Half(Plain):
    """Rounds what is no bfloat16."""

    def supports(self, layer, device):
        return Support(ok=True, exact=layer.weight.dtype == torch.bfloat16)

    def run(self, packed, input):  # noqa: A002
        self.runs.append(len(input))
        return F.linear(input.bfloat16(), *(part.bfloat16() for part in packed)).to(input.dtype)


def test_a_backend_that_begins_to_round_ends(clock):
    """Unless it was named, or the model rounds there."""
    clock["half"] = 2.0
    model, plugins = small().bfloat16(), offering(half=Half)
    compress(model, {"stage": [{"activation": "int8", "targets": ["2"]}]})
    assert accelerate_model(model, plugins=plugins).stays == {}
    with pytest.warns(UserWarning, match="'0' runs dense, no longer by 'half': it rounds what the model does not"):
        model.float()(INPUTS)
    runs = model[2]._sparsehooks_engine.backends["half"].runs
    runs.clear()
    model(INPUTS)
    assert len(runs) == 1
    accelerate_model(model.bfloat16(), "half", plugins=plugins)
    model.float()(INPUTS)


def test_no_gradient_comes_through_it():
    model = small()
    accelerate_model(model, "plain", targets=["0"], plugins=offering(plain=Plain))
    found = model(INPUTS)  # without no_grad, as many do
    with pytest.raises(
        SessionError, match=r"'0' for inference only, .*; call sparsehooks.restore_model\(model\) first"
    ):
        found.sum().backward()
    model.requires_grad_(requires_grad=False)
    assert not model(INPUTS).requires_grad
    with pytest.raises(SessionError, match="'0' for inference only"):
        model(INPUTS.clone().requires_grad_()).sum().backward()
    restore_model(model)
    model.requires_grad_()
    model(INPUTS).sum().backward()
    assert model[0].weight.grad is not None


# torch's own, when it compiles any autograd.Function
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["plain", "int8", "dense_packed"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_it_compiles_as_a_whole(name, compiler):
    torch._dynamo.reset()
    model = small()
    compress(model, {"stage": [{"quantize": "int8"}]})
    accelerate_model(model, name, plugins=[Offering(plain=Plain)])
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=compiler)
        for inputs in (INPUTS, INPUTS[:1, :3], INPUTS[0, 0]):
            assert torch.equal(compiled(inputs), model(inputs))
    found = compiled(INPUTS)
    with pytest.raises(SessionError, match="for inference only"):
        found.sum().backward()


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # as above
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_is_torchs_alone(tmp_path, strict):
    """It takes any number of items, and runs where nobody has heard of the backend."""
    model = small()
    compress(model, {"stage": [{"quantize": "int8"}, {"activation": "int8"}]})
    dense = copy.deepcopy(model)
    accelerate_model(model, "int8")
    batch = ({0: torch.export.Dim.DYNAMIC},)
    with torch.no_grad():
        torch.export.save(
            torch.export.export(model, (INPUTS,), dynamic_shapes=batch, strict=strict), tmp_path / "model.pt2"
        )
        program = torch.export.load(tmp_path / "model.pt2")
        assert not any("sparsehooks" in str(node.target) for node in program.graph.nodes)
        for inputs in (INPUTS, torch.cat([INPUTS, INPUTS + 1])):
            assert torch.equal(program.module()(inputs), dense(inputs))
    assert isinstance(model[0], Accelerated)


def test_a_threshold_stays_under_inference_mode_too():
    model = tiny_bert().eval()
    compress(model, {"stage": [{"activation": "teal", "sparsity": 0.5}]}, calibration=[batch()])
    with torch.inference_mode():
        before = model(**batch())[0]
        accelerate_model(model, "plain", plugins=offering(plain=Plain))
        assert torch.equal(model(**batch())[0], before)


def test_bad_inputs_get_torchs_own_error():
    model = small()
    accelerate_model(model, "plain", plugins=offering(plain=Plain))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(torch.randn(2, 8))
    with pytest.raises(RuntimeError):
        model(torch.tensor(1.0))


# ------------------------------------------------------------------------------------------------------- who may run it


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_torchs(layout):
    model = small()
    dense = copy.deepcopy(model)
    accelerate_model(model, "plain", plugins=offering(plain=Plain))
    runs = model[0]._sparsehooks_engine.backends["plain"].runs
    runs.clear()
    nested = torch.nested.nested_tensor([INPUTS[0], INPUTS[1, :3]], layout=layout)
    for found, expected in zip(model(nested).unbind(), dense(nested).unbind(), strict=True):
        assert torch.equal(found, expected)
    assert not runs


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_what_a_kernel_cannot_read_is_torchs():
    """Autocast, views that negate, transformations, other dtypes and devices."""
    model = small()
    dense = copy.deepcopy(model)
    accelerate_model(model, "plain", plugins=offering(plain=Plain))
    runs = model[0]._sparsehooks_engine.backends["plain"].runs
    runs.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(INPUTS), dense(INPUTS))
    assert torch.equal(model[0](torch._neg_view(INPUTS)), dense[0](torch._neg_view(INPUTS)))
    with torch.no_grad():
        assert torch.equal(torch.vmap(model[0])(INPUTS), torch.vmap(dense[0])(INPUTS))
        traced = torch.jit.trace(model[0], INPUTS, check_trace=False)
        assert torch.equal(traced(INPUTS), dense[0](INPUTS))
    with forward_ad.dual_level():
        found = model[0](forward_ad.make_dual(INPUTS, INPUTS))
        assert forward_ad.unpack_dual(found).tangent is not None
    for wrong in (INPUTS.double(), INPUTS.long(), INPUTS.to("meta")):
        with pytest.raises(RuntimeError):
            model[0](wrong)
    assert not runs


def test_what_interrupts_a_trial_leaves_the_layer_as_it_was(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsehooks.trials.Trial._time", stop)
    model = small()
    with pytest.raises(KeyboardInterrupt):
        accelerate_model(model, plugins=offering(plain=Plain))
    assert not any(isinstance(layer, Accelerated) for layer in model)


def test_a_layer_that_would_lose_by_being_looked_up_stays(clock, monkeypatch):
    clock["plain"] = lambda tokens: 2.0 if tokens == 512 else 0.5
    monkeypatch.setattr("sparsehooks.trials.ratio", lambda *_: 0.9)
    model = small()
    verdicts = accelerate_model(model, plugins=offering(plain=Plain))
    assert type(model[0]) is nn.Linear
    assert verdicts["0"].reasons["plain"] == (
        "torch would run inputs of 1 token, and looking up who runs the layer costs more than 3% of its time there; "
        "give an example of the sizes that matter"
    )
    verdicts = accelerate_model(model, example=torch.randn(512, 16), plugins=offering(plain=Plain))
    assert verdicts["0"].backend(512) == "plain"


def test_a_second_verdict_replaces_the_first():
    model = small()
    plugins = offering(plain=Plain, other=Plain)
    accelerate_model(model, "plain", plugins=plugins)
    accelerate_model(model, "other", targets=["2"], plugins=plugins)
    assert list(model[0]._sparsehooks_engine.backends) == ["plain"]
    assert list(model[2]._sparsehooks_engine.backends) == ["other"]
    assert type(model[2]).__mro__[2] is nn.Linear


def test_layers_that_are_no_plain_ones_stay():
    class Mine(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "mine": Mine(8, 8),
            "empty": nn.Linear(8, 1),
            "offloaded": nn.Linear(8, 8),
            "meta": nn.Linear(8, 8, device="meta"),
            "attention": nn.MultiheadAttention(8, 2),
            "image": nn.Conv2d(3, 8, 2),
            "fine": nn.Linear(8, 8),
        }
    )
    model["empty"].weight = nn.Parameter(torch.empty(0, 8))
    model["offloaded"].forward = lambda inputs: inputs
    verdicts = accelerate_model(model, "plain", targets=["Linear", "Conv2d"], plugins=offering(plain=Plain))
    assert verdicts["image"].shape == (8, 3, 2, 2)
    assert verdicts.stays == {
        "mine": {"plain": "it is a Mine, not a Linear"},
        "empty": {"plain": "its weight of shape (0, 8) is empty"},
        "offloaded": {"plain": "it has a forward of its own (offloading does this)"},
        "meta": {"plain": "its weight is not loaded"},
        "image": {"plain": "it is a Conv2d, not a Linear"},
        "attention.out_proj": {"plain": "it is a NonDynamicallyQuantizableLinear, not a Linear"},
    }


class Wrong(Plain):
    def run(self, packed, input):  # noqa: A002
        return super().run(packed, input) + 0.01


class Nan(Plain):
    def run(self, packed, input):  # noqa: A002
        return super().run(packed, input) * torch.nan


class Short(Plain):
    def run(self, packed, input):  # noqa: A002
        return super().run(packed, input)[..., :-1]


class Blocked(Plain):
    """Forgets what is left after whole blocks of tokens."""

    def run(self, packed, input):  # noqa: A002
        found = super().run(packed, input)
        if len(found) > 64:
            found[64:] = 0
        return found


class Failing(Plain):
    def pack(self, layer):
        raise OSError("libfast.so: cannot open shared object file\nand more")


class Crashing(Plain):
    def supports(self, layer, device):
        raise ZeroDivisionError("division by zero")


class Late(Plain):
    """Fails on large inputs only."""

    def run(self, packed, input):  # noqa: A002
        if len(input) > 100:
            raise RuntimeError("out of memory")
        return super().run(packed, input)


class Coarse(Plain):
    def supports(self, layer, device):
        return Support(ok=True, exact=False)

    def run(self, packed, input):  # noqa: A002
        return super().run(packed, input) * 1.01


class Vague(Coarse):
    def run(self, packed, input):  # noqa: A002
        return super().run(packed, input) * 1.1


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Wrong, "its outputs are wrong by up to 0.01"),
        (Nan, "its outputs are wrong by up to nan"),
        (Short, r"its outputs are torch.float32 of shape \(1, 23\)"),
        (Blocked, "its outputs are wrong by up to"),
        (Failing, "it failed: OSError: libfast.so: cannot open shared object file$"),
        (Crashing, "it failed: ZeroDivisionError: division by zero"),
        (Vague, "its outputs are wrong by up to"),
    ],
)
def test_a_backend_that_is_wrong_or_fails_does_not_run(clock, cls, reason):
    clock["bad"] = 9.0
    model = small()
    expected = model(INPUTS)
    with pytest.raises(PlanError, match=f"'bad' can run none of the 2 layers; '0': {reason}"):
        accelerate_model(model, "bad", plugins=offering(bad=cls))
    stays = accelerate_model(model, plugins=offering(bad=cls)).stays
    assert list(stays) == ["0", "2"]
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(INPUTS), expected)


def test_one_that_fails_while_it_is_timed_does_not_run():
    model = small()
    verdict = accelerate_model(model, targets=["0"], plugins=offering(late=Late))["0"]
    assert verdict.reasons == {"late": "it failed: RuntimeError: out of memory"}
    assert not any(verdict.speeds.values())
    assert type(model[0]) is nn.Linear


def test_one_that_rounds_is_tried_only_where_the_model_rounds(clock):
    clock["coarse"] = 2.0
    recipe = {"stage": [{"activation": "int8", "targets": ["2"]}]}
    model = small()
    compress(model, recipe)
    verdicts = accelerate_model(model, plugins=offering(coarse=Coarse))
    assert verdicts.stays == {
        "0": {"coarse": "it rounds what the model does not round; name it to use it all the same"}
    }
    assert verdicts["2"].backend(1) == "coarse"
    assert accelerate_model(model, "coarse", plugins=offering(coarse=Coarse)).stays == {}


def test_a_plugin_that_is_broken_is_named_and_the_others_run(clock):
    clock["plain"] = 2.0
    plugins = offering(plain=Plain, broken="nowhere:Backend")
    with pytest.warns(UserWarning, match="the backend 'broken' is not tried: .*nowhere"):
        verdicts = accelerate_model(small(), plugins=plugins)
    assert verdicts["0"].backend(1) == "plain"
    with pytest.raises(PluginError, match="nowhere"):
        accelerate_model(small(), "broken", plugins=plugins)


def test_what_cannot_be_meant_is_refused():
    model = small()
    with pytest.raises(PluginError, match="no plugin offers the backend 'dens'; did you mean 'dense'"):
        accelerate_model(model, "dens")
    with pytest.raises(RecipeError, match="target 'Linea' matches no module; did you mean 'Linear'"):
        accelerate_model(model, targets=["Linea"])
    with pytest.raises(PlanError, match="example: batch 0 holds no tensor"):
        accelerate_model(model, example={"text": "words"})
    with pytest.raises(SessionError, match="example: batch 0 does not fit the model's forward"):
        accelerate_model(model, example={"ids": INPUTS})
    for unfit in (INPUTS[..., 1:], torch.tensor(1.0)):
        with pytest.raises(SessionError, match="example: the model cannot run on it: "):
            accelerate_model(model, example=unfit)
    with pytest.raises(PlanError, match="takes the name of a backend, or 'auto', not None"):
        accelerate_model(model, None)
    with pytest.raises(PlanError, match="takes a list of layers as 'exclude', not '0'"):
        accelerate_model(model, exclude="0")
    with pytest.raises(PlanError, match="takes a list of layers as 'targets', not None"):
        accelerate_model(model, targets=None)
    with pytest.raises(PlanError, match="takes a list of layers as 'targets', not <generator"):
        accelerate_model(model, targets=(name for name in "02"))
    with pytest.raises(PlanError, match=r"takes names of layers in 'exclude', not 3$"):
        accelerate_model(model, exclude=[3])
    assert type(model[0]) is nn.Linear


def test_what_excludes_nothing_is_said():
    with pytest.warns(UserWarning, match=r"'exclude' names 'clasifier', which matches no module") as said:
        verdicts = accelerate_model(small(), "plain", exclude=["0", "clasifier"], plugins=offering(plain=Plain))
    assert list(verdicts) == ["2"]
    assert said[0].filename == __file__


def test_a_run_and_a_backend_exclude_each_other():
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters())
    recipe = {"stage": [{"quantize": "int8"}]}
    with attach(model, optimizer, recipe, total_steps=1) as session:
        with pytest.raises(PlanError, match=r"'encoder.layer.0.*' belongs to a run that has not ended"):
            accelerate_model(model, "int8")
        model(**batch())[0].sum().backward()
        optimizer.step()
        assert session.step == 1
    accelerate_model(model, "int8")
    for start in (lambda: attach(model, optimizer, recipe, total_steps=1).__enter__(), lambda: compress(model, recipe)):
        with pytest.raises(
            PlanError, match=r"a backend runs 'encoder.layer.0.*'; call sparsehooks.restore_model\(model"
        ):
            start()
    restore_model(model)
    compress(model, recipe)


# ---------------------------------------------------------------------------------------------------------- the fastest


def test_verdicts_are_shown_by_kind_of_layer(clock, monkeypatch):
    monkeypatch.setattr("sparsehooks.trials.ratio", lambda *_: 1.0)
    clock["plain"] = lambda tokens: 2.0 if tokens in (1, 512) else 0.5
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 8).double(), nn.Conv2d(3, 8, 2)).eval()
    compress(model, {"stage": [{"activation": "int8", "targets": ["1"]}]})
    verdicts = accelerate_model(model, targets=["Linear", "Conv2d"], plugins=offering(plain=Plain))
    assert str(verdicts).splitlines() == [
        "2 layers of 16 x 16, float32: plain for 1 token, dense up to 511, plain for more",
        "1 layer of 16 x 16, float32, int8 inputs: plain for 1 token, dense up to 511, plain for more",
        "1 layer of 8 x 16, float64: plain for 1 token, dense up to 511, plain for more",
        "1 layer of 8 x 3 x 2 x 2, float32: dense",
    ]
    assert repr(verdicts).startswith("{'0': Verdict(")
    assert str(accelerate_model(small(), "plain", targets=["0"], plugins=offering(plain=Plain))) == (
        "1 layer of 24 x 16, float32: plain"
    )


def test_torch_wins_ties(clock):
    clock["plain"] = 1.029
    model = small()
    verdicts = accelerate_model(model, plugins=offering(plain=Plain))
    assert list(verdicts.stays) == ["0", "2"]
    assert verdicts["0"].reasons["plain"] == "it is nowhere the fastest, or not 1.03 times as fast as torch"
    assert type(model[0]) is nn.Linear
    assert verdicts["0"].speeds == {tokens: {"plain": 1.029} for tokens in (1, 16, 128, 512)}


def test_each_number_of_tokens_gets_the_fastest(clock):
    clock["one"] = lambda tokens: 3.0 if tokens == 1 else 0.5
    clock["many"] = lambda tokens: 0.5 if tokens == 1 else 1.2
    clock["huge"] = lambda tokens: 2.0 if tokens == 512 else 1.1
    model = small()
    verdict = accelerate_model(model, plugins=offering(one=Plain, many=Plain, huge=Plain))["0"]
    expected = {1: "one", 2: "huge", 15: "huge", 16: "many", 128: "many", 129: "many", 511: "many", 512: "huge"}
    assert {tokens: verdict.backend(tokens) for tokens in expected} == expected
    assert verdict.backend(10**6) == "huge"
    engine = model[0]._sparsehooks_engine
    for tokens, name in expected.items():
        model[0](torch.randn(tokens, 16))
        assert engine.backends[name].runs[-1] == tokens


def test_between_two_numbers_both_count():
    assert fastest({1: {"a": 3.0}, 16: {"a": 0.9}}) == [Lane(1, "a"), Lane(float("inf"), None)]
    assert fastest({1: {"a": 0.9}, 2: {"a": 2.0}}) == [Lane(1, None), Lane(float("inf"), "a")]
    assert fastest({8: {"a": 2.0}}) == [Lane(7, None), Lane(float("inf"), "a")], "fewer than were timed run dense"
    assert fastest({1: {}, 16: {}}) == [Lane(float("inf"), None)]
    assert fastest({}) == []
    both = fastest({1: {"a": 3.0, "b": 1.1}, 16: {"a": 1.2, "b": 4.0}})
    assert both == [Lane(15, "a"), Lane(float("inf"), "b")]


def test_an_example_says_what_to_time(clock):
    clock["plain"] = 2.0
    model = tiny_bert().eval()
    verdicts = accelerate_model(model, example=batch(9), plugins=offering(plain=Plain))
    assert set(verdicts["encoder.layer.0.output.dense"].speeds) == {27}
    assert set(verdicts["pooler.dense"].speeds) == {3}
    assert verdicts["pooler.dense"].backend(2) == "dense"
    assert verdicts["pooler.dense"].backend(3) == "plain"
    model = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
    model.forward = model[0].__call__
    verdicts = accelerate_model(model, example=INPUTS, plugins=offering(plain=Plain))
    assert verdicts.stays == {"1": {"plain": "the example does not reach the layer"}}


class Slow(Plain):
    """Does the work three times."""

    def run(self, packed, input):  # noqa: A002
        for _ in range(2):
            super().run(packed, input)
        return super().run(packed, input)


class Folded(Plain):
    """Multiplies by a low-rank form of the weight: much less work, the same numbers."""

    def pack(self, layer):
        left, values, right = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
        return (left[:, :1] * values[:1]).float(), right[:1].float(), layer.bias.detach()

    def run(self, packed, input):  # noqa: A002
        left, right, bias = packed
        return F.linear(F.linear(input, right), left, bias)


def test_what_is_faster_is_measured():
    model = nn.Sequential(nn.Linear(512, 512)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(512, 1) @ torch.linspace(-1, 1, 512)[None])
    plugins = offering(slow=Slow, folded=Folded)
    verdict = accelerate_model(model, example=torch.randn(64, 512), plugins=plugins)["0"]
    assert verdict.speeds[64]["slow"] < 1
    assert verdict.speeds[64]["folded"] > 1.5
    assert verdict.backend(64) == "folded"
    assert verdict.backend(63) == "dense"


def test_the_call_of_a_tiny_layer_costs_more_than_it_saves():
    """Through the swapped layer even the same computation is slower there."""
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    verdict = accelerate_model(model, example=torch.randn(1, 4), plugins=offering(plain=Plain))["0"]
    assert verdict.speeds[1]["plain"] < 0.97
    assert type(model[0]) is nn.Linear


def test_a_ratio_is_one_of_like_and_like():
    weight = torch.randn(256, 256)

    def once():
        return weight @ weight

    def twice():
        return once() @ weight

    device = torch.device("cpu")
    assert 0.8 < ratio(once, once, device) < 1.25
    assert ratio(twice, once, device) > 1.4


# ------------------------------------------------------------------------------------------------------------ the cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sparsehooks" / "speeds.json"


def counted(monkeypatch):
    calls = []
    monkeypatch.setattr("sparsehooks.trials.Trial._time", lambda self, key, tokens: calls.append(tokens) or 2.0)
    return calls


def test_what_was_timed_is_not_timed_again(cache, monkeypatch):
    calls = counted(monkeypatch)
    plugins = offering(plain=Plain)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    first = accelerate_model(model, plugins=plugins)
    assert calls == [1, 16, 128, 512] * 2, "layers of one shape are timed once"
    assert accelerate_model(model, plugins=plugins) == first
    assert len(calls) == 8
    with torch.no_grad():
        model[0].weight[:, :8] = 0
    accelerate_model(model, plugins=plugins)
    assert len(calls) == 12, "another sparsity is another question"
    accelerate_model(model.double(), plugins=plugins)
    assert len(calls) == 24, "so is another dtype"
    torch.set_num_threads(2)
    try:
        accelerate_model(model.float(), plugins=plugins)
    finally:
        torch.set_num_threads(1)
    assert len(calls) == 36, "and another number of threads"
    assert len(json.loads(cache.read_text())) == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"a": 1}', '{"a": {"b": "c"}}', '{"a": {"b": -1, "c": NaN}}', "\xff"]
)
def test_a_damaged_cache_costs_only_time(cache, monkeypatch, content):
    calls = counted(monkeypatch)
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content.encode("latin-1"))
    accelerate_model(small(), plugins=offering(plain=Plain))
    assert len(calls) == 8
    accelerate_model(small(), plugins=offering(plain=Plain))
    assert len(calls) == 8


def test_a_cache_that_cannot_be_written_costs_only_time(cache, monkeypatch):
    calls = counted(monkeypatch)
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the folder should be")
    for _ in range(2):
        assert accelerate_model(small(), plugins=offering(plain=Plain)).stays == {}
    assert len(calls) == 16
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert accelerate_model(small(), plugins=offering(plain=Plain)).stays == {}


def test_a_cache_that_cannot_be_replaced_leaves_nothing_behind(cache):
    (cache / "a folder in its place").mkdir(parents=True)
    accelerate_model(small(), plugins=offering(plain=Plain))
    assert list(cache.parent.iterdir()) == [cache]


def test_two_processes_add_to_one_cache(cache):
    device = torch.device("cpu")
    one, two = Speeds.load(), Speeds.load()
    assert one.of(device, "a", lambda: 1.5) == 1.5
    assert two.of(device, "b", lambda: 2.5) == 2.5
    one.save()
    two.save()
    both = Speeds.load()
    assert (both.of(device, "a", lambda: 0.0), both.of(device, "b", lambda: 0.0)) == (1.5, 2.5)
    assert Speeds().of(device, "a", lambda: 9.0) == 9.0, "without the file everything is timed anew"


# --------------------------------------------------------------------------------------------------------- the artifact


def test_an_opened_model_is_accelerated_as_its_config_says(tmp_path):
    model = tiny_bert().eval()
    compress(model, {"stage": [{"quantize": "int8"}]})
    save_pretrained(model, tmp_path / "a", backend="int8")
    saved = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert saved["backend"] == "int8"
    opened = AutoModel.from_pretrained(tmp_path / "a")
    assert isinstance(opened.encoder.layer[0].output.dense, Accelerated)
    accelerate_model(model, "int8")
    with torch.no_grad():
        assert torch.equal(opened(**batch())[0], model(**batch())[0])
    opened.save_pretrained(tmp_path / "b")
    again = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert again["backend"] == "int8"
    restore_model(opened)
    save_pretrained(opened, tmp_path / "c", backend="dense")
    assert "backend" not in json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
    assert not any(isinstance(layer, Accelerated) for layer in AutoModel.from_pretrained(tmp_path / "c").modules())
    worked_on = compress(tmp_path / "a", {"stage": [{"prune": "magnitude", "sparsity": 0.5}]})
    assert not any(isinstance(layer, Accelerated) for layer in worked_on.modules())


def test_a_model_that_was_accelerated_is_saved_as_any_other(tmp_path, clock):
    """Who runs it here says nothing about who shall run it where it is opened."""
    clock["plain"] = 2.0
    model = tiny_bert().eval()
    accelerate_model(model, plugins=offering(plain=Plain))
    assert isinstance(model.pooler.dense, Accelerated)
    save_pretrained(model, tmp_path / "a")
    opened = AutoModel.from_pretrained(tmp_path / "a")
    accelerate_model(opened, plugins=offering(plain=Plain))
    opened.save_pretrained(tmp_path / "b")
    for folder in ("a", "b"):
        assert "backend" not in json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]


def test_a_module_without_a_config_cannot_ask_for_a_backend(tmp_path):
    with pytest.raises(ArtifactError, match="no transformers model is saved without option 'backend'"):
        save_pretrained(small(), tmp_path / "a", backend="auto")
    save_pretrained(small(), tmp_path / "a")


def test_a_backend_that_is_not_here_leaves_the_layers_to_torch(tmp_path):
    model = tiny_bert().eval()
    for name, hint in (("warp", "known: dense, "), ("int9", r"did you mean 'int8'\?")):
        with pytest.raises(
            PluginError, match=f"no plugin offers the backend '{name}'; {hint}.*install the package that brings it"
        ):
            save_pretrained(model, tmp_path / "a", backend=name)
    assert not (tmp_path / "a").exists()
    save_pretrained(model, tmp_path / "a", backend="int8")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    for name, hint in (  # of plugins that are there where it was saved
        ("int9", "install the package that brings it$"),
        ("cpu_unstructured", "'pip install sparsehooks-cpu' adds it$"),
    ):
        config["quantization_config"]["backend"] = name
        (tmp_path / "a" / "config.json").write_text(json.dumps(config))
        with pytest.warns(
            UserWarning,
            match=f"asks for the backend '{name}', torch runs the layers: no plugin offers the backend .*; {hint}",
        ):
            opened = AutoModel.from_pretrained(tmp_path / "a")
        with torch.no_grad():
            assert torch.equal(opened(**batch())[0], model(**batch())[0])
    config["quantization_config"]["backend"] = ["warp"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="'backend' must be the name of one"):
        AutoModel.from_pretrained(tmp_path / "a")
