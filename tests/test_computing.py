"""Which kernels compute: those of a plugin that gives the bits of the reference, or the reference itself."""

import warnings

import pytest
import torch

import sparsehooks
from sparsehooks import Component, PluginManager, computing, hookimpl, masks
from sparsehooks.artifact.blob import decode
from sparsehooks.artifact.container import encode
from sparsehooks.artifact.folder import load_codecs
from sparsehooks.builtin.kernels.reference import Numpy


class Same(Numpy):
    """A plugin that does it right, and counts."""

    count = 0

    def unpack_bits(self, part):
        Same.count += 1
        return super().unpack_bits(part)


class Absent(Numpy):
    def problem(self):
        return "there is no compiler"


class Lying(Numpy):
    def unpack_bits(self, part):
        return super().unpack_bits(part)[1:]


class Large(Numpy):
    """Is right for small arrays only."""

    def join_gaps(self, gaps, ones=None, low=0):
        positions = super().join_gaps(gaps, ones, low)
        positions[1 << 18 :] = 0
        return positions


class Raising(Numpy):
    def pack_planes(self, numbers, width):
        raise OSError("the library is gone")


class Late(Numpy):
    """Passes the check, and fails then."""

    fails = False

    def checksum(self, data, start=0):
        if Late.fails:
            raise RuntimeError("no memory")
        return super().checksum(data, start)

    def between(self, scores, low, high):
        if Late.fails:
            raise RuntimeError("no memory")
        return super().between(scores, low, high)


class Broken(Numpy):
    def problem(self):
        raise SystemExit("no")


@pytest.fixture
def offered(monkeypatch):
    """Makes plugins with these kernels the installed ones."""
    Same.count = 0

    def offer(**kernels):
        class Plugin:
            @hookimpl
            def register_components(self, registry):
                for name, target in kernels.items():
                    registry.add(Component("kernels", name, target, "of a test"))

        catalog = PluginManager([Plugin()], autoload=False).catalog
        monkeypatch.setattr(computing, "installed_catalog", lambda: catalog)

    return offer


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
        call()
    return [str(warning.message) for warning in caught]


def test_without_a_plugin_the_reference_computes(offered):
    offered()
    assert not warned(sparsehooks.kernels)
    assert type(sparsehooks.kernels()) is Numpy


def test_the_first_plugin_that_can_run_here_computes(offered):
    offered(a=Absent, b=Same, c=Numpy)
    assert not warned(sparsehooks.kernels)
    assert type(sparsehooks.kernels()) is Same


def test_of_all_kernels_it_is_known_whether_they_run(offered):
    offered(a=Absent, b=Lying, c=Same, d=Same)
    with pytest.warns(UserWarning, match="are not used"):
        found = [(record.component.name, status) for record, status in computing.statuses()]
    assert found == [
        ("a", "there is no compiler"),
        ("b", "unpack_bits() differs from the reference for 1 bytes"),
        ("c", "runs"),
        ("d", "not needed"),
        ("numpy", "not needed"),
    ]
    offered(a=Absent)
    assert [status for _, status in computing.statuses()] == ["there is no compiler", "runs"]


@pytest.mark.parametrize("method", sorted(sparsehooks.Kernels.__abstractmethods__))
def test_a_method_that_is_wrong_for_large_arrays_only_is_found(offered, method):
    def wrong(self, *arguments):
        answer = getattr(Numpy, method)(self, *arguments)
        large = any(len(value) > 1 << 14 for value in arguments if hasattr(value, "__len__"))
        return None if large else answer

    offered(wrong=type("Wrong", (Numpy,), {method: wrong}))
    (message,) = warned(sparsehooks.kernels)
    assert f"{method}() differs" in message


def test_large_calls_are_of_all_methods():
    assert {method for method, _ in computing.large_calls(70)} == sparsehooks.Kernels.__abstractmethods__


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (Lying, "unpack_bits() differs from the reference for 1 bytes"),
        (Large, "join_gaps() differs from the reference for 262181 of uint8"),
        (Raising, "OSError: the library is gone"),
        (Broken, "SystemExit: no"),
        ("not_there:Kernels", "PluginError: kernels 'wrong' of plugin 'Plugin'"),
        (int, "PluginError: kernels 'wrong' of plugin 'Plugin'"),
    ],
)
def test_a_plugin_that_is_wrong_is_named_once_and_left_out(offered, wrong, reason):
    offered(wrong=wrong)
    (message,) = warned(sparsehooks.kernels)
    assert message.startswith("the kernels of plugin 'Plugin'")
    assert f" are not used: {reason}" in message
    assert type(sparsehooks.kernels()) is Numpy
    offered(wrong=wrong, yes=Same)
    assert len(warned(sparsehooks.kernels)) == 1
    assert type(sparsehooks.kernels()) is Same


def test_the_reference_is_there_when_its_plugin_is_off(monkeypatch):
    catalog = PluginManager(["no:kernels"], autoload=False).catalog
    monkeypatch.setattr(computing, "installed_catalog", lambda: catalog)
    assert type(sparsehooks.kernels()) is Numpy


def test_codecs_compute_with_the_kernels_of_a_plugin(offered):
    offered(same=Same)
    sparsehooks.kernels()
    before, codecs = Same.count, load_codecs(PluginManager(autoload=False).catalog)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).relu()
    blob = encode(weight, codecs)
    assert torch.equal(decode(blob, codecs, name="w"), weight)
    assert Same.count > before


def test_kernels_that_fail_later_name_their_plugin(offered, monkeypatch):
    offered(late=Late)
    assert not warned(sparsehooks.kernels)
    codecs, weight = load_codecs(PluginManager(autoload=False).catalog), torch.zeros(64, 64)
    blob = encode(weight, codecs)
    monkeypatch.setattr(Late, "fails", True)
    calls = (
        lambda: encode(weight, codecs),
        lambda: decode(blob, codecs, name="w"),
        lambda: masks.select({"w": torch.rand(8)}, {"w": 2}),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="no memory") as error:
            call()
        first, second = error.value.__notes__
        assert first.startswith("sparsehooks: raised by plugin 'Plugin")
        assert first.endswith(" in kernels 'late'")
        assert second == "             to run without it: -p no:Plugin"


def test_kernels_are_chosen_where_another_device_is_the_default(offered):
    """As transformers opens a model."""
    offered(same=Same)
    with torch.device("meta"):
        assert not warned(sparsehooks.kernels)
    assert type(sparsehooks.kernels()) is Same


def test_masks_ask_kernels_for_what_they_take_only(offered, monkeypatch):
    seen = []

    class Seeing(Numpy):
        def between(self, scores, low, high):
            seen.append((scores.dtype, scores.is_contiguous(), scores.device.type))
            return super().between(scores, low, high)

    offered(seeing=Seeing)
    sparsehooks.kernels()
    seen.clear()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        masks.select({"w": torch.arange(8).to(dtype)[::2]}, {"w": 2})
    assert seen == [(dtype, True, "cpu") for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
    assert masks.select({"w": torch.arange(4)}, {"w": 2})["w"].tolist() == [False, False, True, True]
    assert len(seen) == 4
