"""The published conformance checks: every component of the catalog passes, a wrong one of each kind does not."""

import numpy as np
import pytest
import torch

from sparsehooks import (
    Activation,
    Allocation,
    ArtifactError,
    Backend,
    Codec,
    Component,
    Criterion,
    Distiller,
    Exporter,
    Pattern,
    PluginError,
    PluginManager,
    Quantizer,
    Regularizer,
    Schedule,
    Solver,
    Support,
    hookimpl,
    load_state_dict,
)
from sparsehooks.builtin.kernels.reference import Numpy
from sparsehooks.components import KINDS
from sparsehooks.plugins import installed_catalog
from sparsehooks.testing import check_component


def installed():
    return [(record.component.kind, record.component.name) for record in installed_catalog().records()]


@pytest.mark.parametrize(("kind", "name"), [*installed(), ("pattern", "2:4"), ("pattern", "1:3"), ("pattern", "4:8")])
def test_every_installed_component_keeps_the_contract_of_its_kind(kind, name):
    check_component(installed_catalog(), kind, name)


def test_every_kind_has_a_component_to_check():
    assert {kind for kind, _ in installed()} == set(KINDS)


class LossyWeight(Criterion):
    def score(self, view):
        return view.weight.abs_()


class Unseeded(Criterion):
    def score(self, view):
        return torch.rand(view.weight.shape)


class Flat(Criterion):
    def score(self, view):
        return view.weight.abs().sum(dim=1)


class WholeNumbers(Criterion):
    def score(self, view):
        return view.weight.abs().int()


class Reciprocal(Criterion):
    def score(self, view):
        return (view.weight * 0).reciprocal()


class Stubborn(Criterion):
    """Writes to the evidence that others read too."""

    def score(self, view):
        return view.gradient.abs_()


class Masking(Criterion):
    """What the wrong criteria in the forward are made from."""

    acts = "forward"

    def score(self, view):
        return view.weight.abs()


class Stray(Masking):
    def prepare(self, view):
        return {"scores": torch.rand(view.weight.shape)}


class Half(Masking):
    def prepare(self, view):
        return {"scores": torch.zeros(view.weight.shape, dtype=torch.bfloat16)}


class Idle(Masking):
    """Has something to learn, and no gradient for it."""

    def prepare(self, view):
        return {"scores": torch.zeros(view.weight.shape)}


class Cut(Masking):
    def effective(self, view, mask):
        return (view.weight * mask).detach()


class Unmasked(Masking):
    def effective(self, view, mask):
        return view.weight * 1


class Widening(Masking):
    def effective(self, view, mask):
        return view.weight.float() * mask


class Weighed(Masking):
    """A penalty that is no scalar."""

    def prepare(self, view):
        return {"scores": torch.zeros(view.weight.shape)}

    def penalty(self, learned, sparsity):
        return torch.stack([tensors["scores"] for tensors in learned.values()])


class Leaky(Pattern):
    """Loses the first row whatever is asked."""

    def check(self, shape):
        return None

    def units(self, scores):
        return scores

    def expand(self, keep, scores):
        return {name: mask & (torch.arange(len(mask)) > 0)[:, None] for name, mask in keep.items()}


class BytesForBools(Pattern):
    def check(self, shape):
        return None

    def units(self, scores):
        return scores

    def expand(self, keep, scores):
        return {name: mask.byte() for name, mask in keep.items()}


class Choosy(Pattern):
    def check(self, shape):
        return "no"

    def units(self, scores):
        return scores

    def expand(self, keep, scores):
        return keep


class Boastful(Pattern):
    """Says that half of a unit goes, and takes all of it."""

    def check(self, shape):
        return None

    def share(self):
        return 0.5

    def units(self, scores):
        return scores

    def expand(self, keep, scores):
        return keep


class Spendthrift(Allocation):
    def keep(self, units, shapes, sparsity):
        return {name: unit.numel() for name, unit in units.items()}


class Fractional(Allocation):
    def keep(self, units, shapes, sparsity):
        return {name: (1 - sparsity) * unit.numel() for name, unit in units.items()}


class Unequal(Allocation):
    """The right total, with more units than the first layer has."""

    def keep(self, units, shapes, sparsity):
        total = sum(unit.numel() for unit in units.values())
        return {**dict.fromkeys(units, 0), next(iter(units)): round((1 - sparsity) * total)}


class Short(Schedule):
    def sparsity(self, progress):
        return 0.99 * progress


class Overshooting(Schedule):
    def sparsity(self, progress):
        return progress + 4 * progress * (1 - progress)


class Restless(Schedule):
    """Asks for the same masks again and again."""

    adaptive = True

    def sparsity(self, progress):
        return 0.5

    def at(self, step, total_steps):
        return 0.5

    def due(self, step, total_steps):
        return True


class Runaway(Restless):
    def at(self, step, total_steps):
        return 1.5


class Growing(Regularizer):
    def proximal(self, weights, pattern, step_sizes):
        return {name: 2 * weight for name, weight in weights.items()}


class Inert(Regularizer):
    """Does nothing."""


class Backward(Solver):
    """Asks from right to left."""

    def solve(self, layer, choose, quantize=None):
        masks = [choose(start, start + 4, layer.weight[:, start : start + 4], torch.ones(4)) for start in (12, 8, 4, 0)]
        mask = torch.cat(masks[::-1], dim=1)
        return layer.weight * mask, mask


class Unfaithful(Solver):
    """Leaves the weights that go."""

    def solve(self, layer, choose, quantize=None):
        return layer.weight.clone(), choose(0, 16, layer.weight, torch.ones(16))


class Soft(Activation):
    """Makes values smaller, and none of them zero."""

    place = "input"
    calibrated = "sparsity"

    def apply(self, values, amount, before=None):
        return values / 2


class Rounded(Quantizer):
    """Whole numbers."""

    def grid(self, weight):
        return {}

    def quantize(self, weight, grid):
        return weight.detach().round().to(torch.int32)

    def dequantize(self, codes, grid, dtype):
        return codes.to(dtype)


class Halving(Rounded):
    """Halves the weight, so that a second application halves it again."""

    def dequantize(self, codes, grid, dtype):
        return (codes / 2).to(dtype)


class Dead(Rounded):
    """Rounds without a straight-through gradient."""

    def fake_quantize(self, weight, grid=None):
        return weight.round() + 0.0


class TwoRoundings(Rounded):
    """Trains on another grid than it stores."""

    def fake_quantize(self, weight, grid=None):
        return weight.detach().trunc() + (weight - weight.detach())


class OffsetGrid(Rounded):
    """A grid without zero."""

    def dequantize(self, codes, grid, dtype):
        return (codes + 0.5).to(dtype)


class Lost(Rounded):
    """Learns what its grid does not have."""

    learned = ("scales",)


class Mean(Distiller):
    def loss(self, student, teacher, batch, learned):
        return (student["logits"] - teacher["logits"]).square().mean().reshape(1)


class PerSample(Distiller):
    """One value a sample, where the Trainer counts tokens."""

    def loss(self, student, teacher, batch, learned):
        return (student["logits"] - teacher["logits"]).square().flatten(1).mean(dim=1)


class Detached(Distiller):
    def loss(self, student, teacher, batch, learned):
        return batch.items((student["logits"] - teacher["logits"]).detach().square().mean(dim=-1))


class Contrastive(Distiller):
    """Measures an item against the largest of its batch."""

    def loss(self, student, teacher, batch, learned):
        difference = (student["logits"] - teacher["logits"]).square()
        return batch.items((difference / difference.max()).mean(dim=-1))


class Copied(Codec):
    """Values as they are; what the wrong ones are made from."""

    role = "values"

    def bound(self, data, layout):
        return data.nbytes

    def encode(self, data, layout):
        return data.tobytes()

    def decode(self, part, layout):
        return np.frombuffer(part, layout.bits)


class Forgetful(Copied):
    def decode(self, part, layout):
        return np.zeros(layout.count, layout.bits)


class Pessimistic(Copied):
    """Promises more bytes than it writes."""

    def bound(self, data, layout):
        return data.nbytes + 1


class Reckless(Copied):
    """Lets numpy complain about wrong lengths."""


class Trusting(Copied):
    """Reads bytes without counting them."""

    def decode(self, part, layout):
        return np.frombuffer(part[: len(part) - len(part) % layout.bits.itemsize], layout.bits)


class Unknown(Copied):
    level = "tiny"


class Picky(Copied):
    def bound(self, data, layout):
        return None


class Destructive(Copied):
    def encode(self, data, layout):
        part = data.tobytes()
        data[:] = 0
        return part


class Listed(Codec):
    """Positions as numbers; what the wrong ones are made from."""

    role = "positions"

    def bound(self, data, layout):
        return 0

    def encode(self, data, layout):
        return data.tobytes()

    def decode(self, part, layout):
        if len(part) != 8 * layout.count:
            raise ArtifactError("wrong length")
        return np.frombuffer(part, np.intp)


class Selective(Listed):
    """Loses the first position."""

    def cover(self, data, layout):
        return data[1:]


class Narrow(Listed):
    def decode(self, part, layout):
        return super().decode(part, layout).astype(np.int32)


class Disorderly(Listed):
    """Believes that whoever wrote the positions sorted them."""


class Far(Listed):
    """Believes that whoever wrote the positions stayed within the chunk."""

    def decode(self, part, layout):
        positions = super().decode(part, layout)
        if (positions[1:] <= positions[:-1]).any() or positions.min(initial=0) < 0:
            raise ArtifactError("not ascending")
        return positions


class Wrapping(Numpy):
    """Finds one position too few."""

    def nonzero(self, values, shift):
        return super().nonzero(values, shift)[:-1]


class Lenient(Numpy):
    """Takes any number of bytes."""

    def unpack_planes(self, part, width, count):
        return super().unpack_planes(part[: width * -(-count // 8)], width, count)


class Overwriting(Numpy):
    """Adds gaps up where they are."""

    def join_gaps(self, gaps, ones=None, low=0):
        found = super().join_gaps(gaps, ones, low)
        gaps[:] = 0
        return found


class Speechless(Numpy):
    def problem(self):
        return ""


class Silent(Backend):
    def supports(self, layer, device):
        return Support(ok=False)

    def pack(self, layer):
        return (layer.weight, layer.bias)

    def run(self, packed, input):  # noqa: A002
        return torch.nn.functional.linear(input, *packed)


class Rounding(Silent):
    def supports(self, layer, device):
        return Support(ok=True)

    def run(self, packed, input):  # noqa: A002
        return super().run(packed, input).relu()


class Coarse(Rounding):
    """Says that it rounds, and rounds too much."""

    def supports(self, layer, device):
        return Support(ok=True, exact=False)

    def run(self, packed, input):  # noqa: A002
        return (Silent.run(self, packed, input) / 4).round() * 4


class Scaled(Rounding):
    def run(self, packed, input):  # noqa: A002
        return 1.5 * Silent.run(self, packed, input)


class Flattened(Rounding):
    def run(self, packed, input):  # noqa: A002
        return Silent.run(self, packed, input.reshape(-1, input.shape[-1]))


class Single(Rounding):
    def run(self, packed, input):  # noqa: A002
        return Silent.run(self, packed, input).float()


class Tidy(Rounding):
    """Leaves the layer tidier than it was."""

    def pack(self, layer):
        layer.weight.data[layer.weight == 0] = -0.0
        return super().pack(layer)

    def run(self, packed, input):  # noqa: A002
        return Silent.run(self, packed, input)


class Greedy(Rounding):
    def run(self, packed, input):  # noqa: A002
        found = Silent.run(self, packed, input)
        input.zero_()
        return found


class Wordless(Exporter):
    files = ("model.txt",)

    def export(self, folder, out):
        (out / "model.txt").write_text("model")
        return ""


class Talkative(Wordless):
    def export(self, folder, out):
        super().export(folder, out)
        return "one line\nand another"


class Nameless(Wordless):
    files = ()


class Absent(Wordless):
    files = ("*.onnx",)

    def export(self, folder, out):
        return "nothing"


class Meddling(Wordless):
    def export(self, folder, out):
        (folder / "mine.txt").write_text("mine")
        return super().export(folder, out) or "written"


class Untidy(Wordless):
    def export(self, folder, out):
        (out / ".part").mkdir()
        return super().export(folder, out) or "written"


class Gullible(Wordless):
    """Takes a damaged folder."""

    def export(self, folder, out):
        return super().export(folder, out) or "written"


class Crashing(Gullible):
    """Refuses a damaged folder with an error of its own kind."""

    def export(self, folder, out):
        if not load_state_dict_of(folder):
            raise ValueError("damaged")
        return super().export(folder, out)


def load_state_dict_of(folder):
    try:
        return load_state_dict(folder)
    except ArtifactError:
        return {}


WRONG = {
    LossyWeight: "leave the weight",
    Unseeded: "same view",
    Flat: "shape",
    WholeNumbers: "floating point",
    Reciprocal: "finite",
    Stubborn: "leave view.gradient",
    Stray: "draw from view.generator",
    Half: "float32",
    Idle: "must learn",
    Cut: "pass a gradient",
    Unmasked: "zero where masked",
    Widening: "keep the dtype torch.bfloat16",
    Weighed: "must be a scalar",
    Leaky: "all weights stay",
    BytesForBools: "bool masks",
    Choosy: "accept one of the shapes",
    Boastful: "where all units go",
    Spendthrift: "misses the budget",
    Fractional: "whole numbers",
    Unequal: "of 48 units",
    Short: "exactly 1",
    Overshooting: "outside",
    Restless: "nothing must be due",
    Runaway: "outside",
    Growing: "make weights larger",
    Inert: "do something",
    Backward: "left to right",
    Unfaithful: "zero what the mask takes",
    Soft: "up to the threshold",
    Halving: "twice",
    Dead: "gradient that is not zero",
    TwoRoundings: "bit for bit",
    OffsetGrid: "zero must stay zero",
    Lost: "'learned' names",
    Mean: "unreduced",
    PerSample: "one value for each of 18 items",
    Detached: "pass a gradient",
    Contrastive: "other samples",
    Forgetful: "every bit",
    Pessimistic: "bound\\(\\) says",
    Reckless: "with ArtifactError, not ValueError",
    Trusting: "bytes that lie must give the shape",
    Unknown: "level must be one of fast, balanced, small",
    Picky: "accept one of the arrays",
    Destructive: "leave the data",
    Selective: "keep every position",
    Narrow: "must give int64, got int32",
    Disorderly: "must give ascending positions",
    Far: "within the chunk",
    Wrapping: r"nonzero\(\) differs from the reference for 1 of uint8, 0",
    Lenient: r"unpack_planes\(\) differs from the reference for 1 bytes, 0, 0",
    Overwriting: r"join_gaps\(\) differs from the reference for 1 of uint8",
    Speechless: "reason in words",
    Silent: "reason for a no",
    Rounding: r"run\(\) of tokens must compute what the layer does: it gives 0 and not -",
    Scaled: r"it gives -?[\d.]+ and not -?[\d.]+, \S+e-0\d is allowed",
    Coarse: "of tokens must compute what the layer does",
    Flattened: "run\\(\\) of a batch must have the shape",
    Single: "keep the dtype",
    Tidy: "must leave the layer as it is",
    Greedy: "leave its inputs as they are",
    Wordless: "say what it has written",
    Talkative: "one line",
    Nameless: "files must name",
    Absent: "there is no \\*.onnx",
    Meddling: "leave the folder",
    Untidy: "clear up",
    Gullible: "refuse a damaged folder: read it",
    Crashing: "with ArtifactError, not ValueError",
}


class Wrong:
    @hookimpl
    def register_components(self, registry):
        for cls in WRONG:
            registry.add(Component(cls.kind, cls.__name__, cls, "wrong"))


@pytest.mark.parametrize("cls", WRONG)
def test_a_component_that_breaks_its_contract_is_told_so(cls):
    catalog = PluginManager([Wrong()], autoload=False).catalog
    with pytest.raises(AssertionError, match=WRONG[cls]):
        check_component(catalog, cls.kind, cls.__name__)


def test_every_kind_has_a_wrong_component_that_fails():
    assert {cls.kind for cls in WRONG} == set(KINDS)


def test_a_component_that_does_not_exist_is_no_failure_of_the_contract():
    with pytest.raises(PluginError, match="no plugin offers the criterion 'magnitud'; did you mean 'magnitude'"):
        check_component(installed_catalog(), "criterion", "magnitud")
