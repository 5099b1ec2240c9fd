"""The compiled inner loops of files and masks beside the reference, for each variant that this CPU can run."""

import contextlib
import threading

import numpy as np
import pytest
import sparsehooks_cpu
import sparsehooks_cpu.library as module
import torch
from sparsehooks_cpu import variants
from sparsehooks_cpu.routines import Cpu

import sparsehooks
from sparsehooks import PluginManager, computing, masks
from sparsehooks.artifact.blob import decode
from sparsehooks.artifact.container import encode
from sparsehooks.artifact.folder import load_codecs
from sparsehooks.testing import check_component

CATALOG = PluginManager([sparsehooks_cpu], autoload=False).catalog
BUILT_IN = PluginManager(autoload=False).catalog
CODECS = load_codecs(CATALOG)


@pytest.fixture(params=list(variants.X86))
def variant(request, monkeypatch):
    """One of the variants, in place of the best."""
    monkeypatch.setenv(module.VARIABLE, request.param)
    module.library.cache_clear()
    if problem := Cpu().problem():
        module.library.cache_clear()
        pytest.skip(problem)
    yield request.param
    module.library.cache_clear()


@pytest.fixture
def installed(monkeypatch):
    """The plugin is the one that is installed."""
    catalog = PluginManager([sparsehooks_cpu], autoload=False).catalog  # one whose kernels nobody has asked for yet
    monkeypatch.setattr(computing, "installed_catalog", lambda: catalog)


def weights():
    """Weights of all dtypes that are pruned, at several densities; of a size that no vector divides."""
    random = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        for sparsity in (0.3, 0.7, 0.97, 1.0):
            normal = torch.randn(311, 97, generator=random)
            kept = torch.where(torch.rand(311, 97, generator=random) < sparsity, -0.0, normal)
            yield (20 * kept).to(dtype)
    yield (torch.randn(64, 96, generator=random) * 8).round() / 8  # on a grid
    yield torch.where(torch.arange(96) % 4 < 2, torch.randn(64, 96, generator=random), 0.0)  # 2:4


def test_they_give_the_bits_of_the_reference(variant):
    check_component(CATALOG, "kernels", "cpu")


@pytest.mark.parametrize("name", CODECS)
def test_codecs_keep_their_contract_with_them(installed, name):
    assert isinstance(sparsehooks.kernels(), Cpu)
    check_component(CATALOG, "codec", name)


def test_files_are_the_same_with_them_and_without(variant, installed):
    assert isinstance(sparsehooks.kernels(), Cpu)
    cases = [(weight, level) for weight in weights() for level in ("fast", "balanced", "small")]
    compiled = [encode(weight, CODECS, level=level) for weight, level in cases]
    with without():
        plain = [encode(weight, CODECS, level=level) for weight, level in cases]
    assert all(torch.equal(one, other) for one, other in zip(plain, compiled, strict=True))
    for (weight, _), blob in zip(cases, compiled, strict=True):
        assert torch.equal(decode(blob, CODECS, name="w"), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_masks_are_the_same_with_them_and_without(installed, dtype):
    random = torch.Generator().manual_seed(1)
    for size in (1, 100, 5 * masks.SAMPLE):
        rounded = (3 * torch.randn(7, 9, generator=random)).round()
        scores = {"a": torch.randn(size, generator=random).to(dtype), "b": rounded.to(dtype)}
        for keep in (1, size // 10, size):
            counts = masks.top_counts(scores, keep)
            chosen = masks.select(scores, counts)
            with without():
                assert masks.top_counts(scores, keep) == counts
                assert all(torch.equal(mask, chosen[name]) for name, mask in masks.select(scores, counts).items())


def test_another_device_may_be_the_default(variant):
    scores = torch.tensor([3.0, 1.0, 2.0])
    with torch.device("meta"):
        assert Cpu().largest(scores, 1.0, 0).tolist() == [True, False, True]
        assert Cpu().between(scores, 1.0, 2.0)[0] == 1


def test_what_would_be_read_wrongly_is_refused(variant):
    for call in (
        lambda: Cpu().nonzero(np.zeros(8, np.uint8)[::2], 0),
        lambda: Cpu().join_gaps(np.frombuffer(bytes(8), np.uint8)[::2]),
        lambda: Cpu().nonzero(np.zeros(8, ">u2"), 0),
    ):
        with pytest.raises((ValueError, TypeError), match="contiguous"):
            call()
    for call in (
        lambda: Cpu().split_gaps(np.arange(3, dtype=np.int32), 1),
        lambda: Cpu().split_exponents(np.zeros(8, np.uint8), 8, np.arange(3, dtype=np.uint8), 5),
        lambda: Cpu().split_exponents(np.zeros(8, np.uint16), 8, np.arange(2, dtype=np.uint8), 7),
    ):
        with pytest.raises(ValueError, match=r"positions are int64|is not split"):
            call()
    for positions in ([4], [-1], [3, 5000]):
        with pytest.raises(IndexError, match="a position lies outside of 4 bits"):
            Cpu().pack_bits(np.array(positions), 4)


def test_bits_that_change_while_they_are_read_are_refused(variant, monkeypatch):
    """Counted first, then unpacked into memory for so many, without Python's lock."""
    bits = bytearray(1000)
    routines = module.library().routines

    def count(*given):
        found = counted(*given)
        bits[:] = b"\xff" * len(bits)
        return found

    counted = routines["count"]
    monkeypatch.setitem(routines, "count", count)
    with pytest.raises(ValueError, match="1000 bytes have changed while they were read"):
        Cpu().unpack_bits(memoryview(bits))


def test_threads_compute_at_once(variant):
    kernels, parts = Cpu(), [np.random.default_rng(seed).bytes(1 << 15) for seed in range(4)]
    expected = [computing.reference().unpack_bits(memoryview(part)) for part in parts]
    found = {}

    def work(number):
        found[number] = [kernels.unpack_bits(memoryview(parts[number])) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(one, expected[number]) for number, ones in found.items() for one in ones)


def test_where_they_were_not_compiled_the_reference_computes(monkeypatch, installed, tmp_path, caplog):
    monkeypatch.setattr(module, "_folder", lambda: tmp_path)
    module.library.cache_clear()
    assert sparsehooks.kernels() is computing.reference()
    assert "they were not compiled" in caplog.text
    module.library.cache_clear()


def test_a_cpu_without_products_of_bits_takes_zlib(monkeypatch):
    monkeypatch.setitem(module.library().routines, "checksum", lambda *_: -1)
    assert Cpu().checksum(b"sparse", 7) == computing.reference().checksum(b"sparse", 7)


@contextlib.contextmanager
def without():
    """The reference computes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(computing, "installed_catalog", lambda: BUILT_IN)
        yield
