"""Every optimizer of torch.optim that takes dense gradients, in a plain loop."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F

import sparsehooks
from sparsehooks import SessionError

STEPS = 10
MAKE = {
    "SGD": lambda weights: optim.SGD(weights, lr=0.05),
    "SGD momentum": lambda weights: optim.SGD(weights, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "SGD fused": lambda weights: optim.SGD(weights, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda weights: optim.Adam(weights, lr=0.01, amsgrad=True),
    "Adam foreach": lambda weights: optim.Adam(weights, lr=0.01, foreach=True),
    "Adam fused": lambda weights: optim.Adam(weights, lr=0.01, fused=True),
    "AdamW": lambda weights: optim.AdamW(weights, lr=0.01, weight_decay=0.1),
    "AdamW foreach": lambda weights: optim.AdamW(weights, lr=0.01, foreach=True),
    "AdamW fused": lambda weights: optim.AdamW(weights, lr=0.01, fused=True),
    "Adagrad": lambda weights: optim.Adagrad(weights, lr=0.05, initial_accumulator_value=0.1),
    "Adadelta": lambda weights: optim.Adadelta(weights, lr=1.0),
    "Adamax": lambda weights: optim.Adamax(weights, lr=0.01),
    "NAdam": lambda weights: optim.NAdam(weights, lr=0.01),
    "RAdam": lambda weights: optim.RAdam(weights, lr=0.01),
    "ASGD": lambda weights: optim.ASGD(weights, lr=0.05, t0=2),
    "RMSprop": lambda weights: optim.RMSprop(weights, lr=0.01, momentum=0.5, centered=True),
    "Rprop": lambda weights: optim.Rprop(weights, lr=0.01),
    "Adafactor": lambda weights: optim.Adafactor(weights, lr=0.05),
    "Muon": lambda weights: optim.Muon(weights, lr=0.05),
}
LEFT_OUT = {"Optimizer", "SparseAdam", "LBFGS"}  # SparseAdam takes sparse gradients only, LBFGS is refused
BEGINNINGS = {"step_size": 0.01, "sum": 0.1}
"""The slots that do not begin at zero, with the options above."""

GRADUAL = {"prune": "magnitude", "sparsity": 0.8, "schedule": {"use": "cubic", "start": 0.0, "end": 8, "every": 2}}
RIGL = {
    "prune": "magnitude",
    "sparsity": 0.8,
    "allocation": "erk",
    "schedule": {"use": "constant", "start": 0, "end": 9, "every": 2},
    "grow": {"use": "gradient", "fraction": 0.3},
}
each_optimizer = pytest.mark.parametrize("name", MAKE)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias=False), nn.Tanh(), nn.Linear(40, 16, bias=False))


def batches():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS, 32, 24, generator=generator)
    return list(zip(inputs, inputs[..., :16].sin(), strict=True))


def steps(net, optimizer, data):
    for inputs, outputs in data:
        F.mse_loss(net(inputs), outputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def test_no_optimizer_is_forgotten():
    there = {name for name, cls in vars(optim).items() if inspect.isclass(cls) and issubclass(cls, optim.Optimizer)}
    assert there - LEFT_OUT == {name.split()[0] for name in MAKE}


@each_optimizer
def test_masks_hold_exactly_after_every_step(name):
    net = network()
    optimizer = MAKE[name](net.parameters())
    before = [weight.detach().clone() for weight in net.parameters()]
    with sparsehooks.attach(net, optimizer, {"stage": [GRADUAL]}, total_steps=STEPS) as session:
        for _ in steps(net, optimizer, batches()):
            for key, weight in net.named_parameters():
                mask = session.masks.masks[key]
                assert not (weight[~mask] != 0).any()
                assert (weight[mask] != 0).all()
    for weight, old in zip(net.parameters(), before, strict=True):
        assert int((weight == 0).sum()) == round(0.8 * weight.numel())
        assert not torch.equal(weight[weight != 0], old[weight != 0])  # it has trained


class Watch:
    """Sees the optimizer at the moment in which weights have grown and no step has used them."""

    def __init__(self, optimizer, net):
        self.optimizer, self.weights = optimizer, dict(net.named_parameters())
        self.masks, self.grown, self.slots = {}, 0, 0

    @sparsehooks.hookimpl
    def masks_updated(self, session, step, changes):
        for name, mask in session.masks.items():
            grown = mask & ~self.masks.get(name, torch.ones_like(mask))
            self.masks[name] = mask.clone()
            self.grown += int(grown.sum())
            assert (self.weights[name][grown] == 0).all()
            for key, slot in self.optimizer.state.get(self.weights[name], {}).items():
                if torch.is_tensor(slot) and slot.shape == grown.shape:
                    self.slots += 1
                    assert (slot[grown] == BEGINNINGS.get(key, 0)).all(), key


@each_optimizer
def test_what_grows_begins_with_an_optimizer_that_has_not_seen_it(name):
    net = network()
    optimizer = MAKE[name](net.parameters())
    watch = Watch(optimizer, net)
    with sparsehooks.attach(net, optimizer, {"stage": [RIGL]}, total_steps=STEPS, plugins=[watch]) as session:
        for _ in steps(net, optimizer, batches()):
            pass
        assert session.sparsity == pytest.approx(0.8, abs=1e-2)
    assert watch.grown > 50
    assert (watch.slots > 0) != (name in {"SGD", "Adafactor"})  # which remember nothing of a single weight


@each_optimizer
@pytest.mark.parametrize("stage", [GRADUAL, RIGL], ids=["gradual", "rigl"])
def test_a_run_resumes_bit_identical_from_the_state_of_its_optimizer(tmp_path, name, stage):
    def fresh():
        net = network()
        return net, MAKE[name](net.parameters())

    net, optimizer = fresh()
    with sparsehooks.attach(net, optimizer, {"stage": [stage]}, total_steps=STEPS):
        for step, _ in enumerate(steps(net, optimizer, batches()), start=1):
            if step == 5:
                torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    resumed, optimizer = fresh()
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    with sparsehooks.attach(resumed, optimizer, {"stage": [stage]}, total_steps=STEPS) as session:
        for _ in steps(resumed, optimizer, batches()[5:]):
            pass
        assert session.step == STEPS
    assert all(torch.equal(*pair) for pair in zip(net.parameters(), resumed.parameters(), strict=True))


def test_lbfgs_is_refused():
    net = network()
    optimizer = optim.LBFGS(net.parameters())
    with (
        pytest.raises(SessionError, match="LBFGS tries several weights within one step"),
        sparsehooks.attach(net, optimizer, {"stage": [GRADUAL]}, total_steps=STEPS),
    ):
        pass


@pytest.mark.parametrize("how", ["position", "keyword"])
def test_a_closure_gives_the_same_run(how):
    """The gradients that decide are those that the closure has computed."""

    def run(closed):
        net = network()
        optimizer = MAKE["AdamW"](net.parameters())
        with sparsehooks.attach(net, optimizer, {"stage": [RIGL]}, total_steps=STEPS):
            if not closed:
                for _ in steps(net, optimizer, batches()):
                    pass
                return net
            for inputs, outputs in batches():

                def closure(inputs=inputs, outputs=outputs):
                    optimizer.zero_grad()
                    loss = F.mse_loss(net(inputs), outputs)
                    loss.backward()
                    return loss

                loss = optimizer.step(closure) if how == "position" else optimizer.step(closure=closure)
                assert loss.item() > 0
        return net

    assert all(torch.equal(*pair) for pair in zip(run(False).parameters(), run(True).parameters(), strict=True))
