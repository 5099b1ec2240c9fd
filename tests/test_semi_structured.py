"""2:4 on sparse tensor cores: all that can be known without a GPU, and what needs one."""

import pytest
import torch
from helpers import tiny_bert
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsehooks import PlanError, Steps, accelerate_model, compress, restore_model, safe_open
from sparsehooks.builtin.backends import semi_structured
from sparsehooks.builtin.backends.semi_structured import CUSPARSELT, CUTLASS, SemiStructured, SemiStructuredInt8
from sparsehooks.builtin.backends.two_four import cutlass_order, off_pattern, pack, unpack

GPU = torch.device("cuda")
HALVES = (torch.float16, torch.bfloat16)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with sparse tensor cores")


def matrix(rows, columns, dtype=torch.float32, seed=0):
    """2:4, with groups of one value and of none."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-100, 101, (rows, columns), generator=generator).to(dtype)
    order = torch.rand((rows, -(-columns // 4), 4), generator=generator).argsort(dim=-1)
    kept = (order < 2).flatten(1)[:, :columns]
    return torch.where(kept, whole, 0)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.int8])
def test_packing_is_exact(dtype):
    weight = matrix(96, 256, dtype)
    if dtype.is_floating_point:
        weight[7, :8] = torch.tensor([0, torch.nan, 0, torch.inf, -0.0, 0, 1, -0.0])
    values, positions = pack(weight)
    assert (values.shape, values.dtype) == ((96, 128), dtype)
    assert (positions.shape, positions.dtype) == ((96, 32), torch.uint8)
    found = unpack(values, positions)
    clean = torch.where(weight != 0, weight, 0)
    assert torch.equal(bits(found), bits(clean))


@pytest.mark.parametrize("dtype", [*HALVES, torch.int8])
def test_packing_is_torchs_own(dtype):
    weight = matrix(96, 256, dtype)
    values, positions = pack(weight)
    ours = cutlass_order(positions, dtype)
    torchs, meta = sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(values, torchs)
    assert torch.equal(ours, meta)
    assert ours.dtype == meta.dtype
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, ours), weight)


def test_a_file_holds_what_is_packed(tmp_path):
    model = nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16))
    compress(model, {"stage": [{"prune": "magnitude", "pattern": "2:4"}]}, tmp_path / "a")
    with safe_open(tmp_path / "a") as file:
        stored = file.get_semi_structured("0.weight")
    for one, other in zip(stored, pack(model[0].weight.detach()), strict=True):
        assert torch.equal(one, other)


def test_what_is_off_the_pattern_is_found():
    weight = matrix(8, 22)
    assert off_pattern(weight) is None
    weight[5, 8:12] = torch.tensor([1, 0, 1, 1])
    assert off_pattern(weight) == "row 5 has 3 nonzeros in the columns 8 to 11"
    weight[2, 20:] = 1
    assert off_pattern(weight).startswith("row 5"), "two values at the end are within the pattern"
    assert off_pattern(torch.ones(3, 7)) == "row 0 has 4 nonzeros in the columns 0 to 3"
    assert off_pattern(torch.ones(3, 7).tril(-1)[:, 4:]) is None


class Emulated:
    """Both libraries, on the CPU: they check their shapes as the GPU's do, and count their calls."""

    def __init__(self, monkeypatch, *, capability=(9, 0), cusparselt=True):
        self.algorithms, self.searched = [], 0
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt)
        for name in ("_cslt_compress", "_cslt_sparse_mm", "_cslt_sparse_mm_search"):
            monkeypatch.setattr(torch, name, getattr(self, name))
        monkeypatch.setattr(torch, "_sparse_semi_structured_mm", self._mm)
        monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", self._addmm)
        monkeypatch.setattr(semi_structured, "_unable", lambda _, real=semi_structured._unable: real(GPU))
        monkeypatch.setattr(semi_structured, "_ALGORITHMS", {})
        semi_structured._failure.cache_clear()
        self.device = torch.device("cpu")

    def _cslt_compress(self, weight):
        multiple = 32 if weight.dtype == torch.int8 else 16
        assert not weight.shape[0] % multiple
        assert not weight.shape[1] % multiple
        assert not torch.signbit(weight[weight == 0]).any(), "-0.0 was seen to give garbage"
        assert weight.is_contiguous()
        return weight

    def _cslt_sparse_mm(self, packed, columns, bias=None, out_dtype=None, transpose_result=False, alg_id=0):
        assert not columns.shape[1] % (16 if packed.dtype == torch.int8 else 8)
        assert columns.t().is_contiguous()
        self.algorithms.append(alg_id)
        found = self._dense(packed, columns, bias, out_dtype)
        return found.t().contiguous() if transpose_result else found

    def _cslt_sparse_mm_search(self, packed, columns, bias=None, out_dtype=None, transpose_result=False):
        assert transpose_result
        assert columns.shape[0] == packed.shape[1]
        assert not columns.shape[1] % (16 if packed.dtype == torch.int8 else 8)
        self.searched += 1
        return 7

    def _mm(self, packed, meta, columns, out_dtype=None):
        return self._addmm(None, packed, meta, columns, out_dtype)

    def _addmm(self, bias, packed, meta, columns, out_dtype=None):
        assert not columns.shape[1] % (16 if packed.dtype == torch.int8 else 8)
        return self._dense(sparse_semi_structured_to_dense_cutlass(packed, meta), columns, bias, out_dtype)

    def _dense(self, weight, columns, bias, out_dtype):
        assert (weight.dtype == torch.int8) == (out_dtype == torch.int32)
        found = weight.double() @ columns.double()
        found = found if bias is None else found + bias.double()[:, None]
        return found.to(out_dtype or weight.dtype)


def layer_of(weight, *, bias=True):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


@pytest.mark.parametrize("library", [CUSPARSELT, CUTLASS])
@pytest.mark.parametrize("shape", [(32, 64), (100, 90), (7, 13)])
@pytest.mark.parametrize("dtype", HALVES)
@torch.no_grad()
def test_every_shape_is_padded_and_cut(monkeypatch, library, shape, dtype):
    emulated = Emulated(monkeypatch, capability=(8, 6), cusparselt=library is CUSPARSELT)
    weight = matrix(*shape, dtype) / 16
    weight[2] *= -0.0
    for bias in (True, False):
        layer = layer_of(weight, bias=bias)
        backend = SemiStructured()
        support = backend.supports(layer, emulated.device)
        assert support.ok, support.reason
        packed = backend.pack(layer)
        assert packed.library is library
        for tokens in ((5, shape[1]), (shape[1],), (2, 3, shape[1]), (0, shape[1]), (8, shape[1])):
            inputs = torch.randn(tokens, generator=torch.Generator().manual_seed(1)).to(dtype)
            found = backend.run(packed, inputs)
            assert found.dtype == dtype
            torch.testing.assert_close(found, layer(inputs), atol=0.5, rtol=1e-2)
    assert set(emulated.algorithms) == ({0, 7} if library is CUSPARSELT else set())
    assert emulated.searched == (2 if library is CUSPARSELT else 0)


@torch.no_grad()
def test_rows_that_do_not_follow_one_another_are_copied(monkeypatch):
    """``_cslt_sparse_mm`` reads rows or columns that do, and asks for no strides."""
    Emulated(monkeypatch)
    layer, backend = layer_of(matrix(32, 64, torch.bfloat16) / 16), SemiStructured()
    packed = backend.pack(layer)
    wide = torch.randn(8, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    for inputs in (wide[:, ::2], wide[:, 64:], wide[:1, :64].expand(8, 64), wide.t()[:64].t()):
        torch.testing.assert_close(backend.run(packed, inputs), layer(inputs), atol=0.5, rtol=1e-2)
    turned = layer_of(matrix(64, 32, torch.bfloat16).t().contiguous())
    turned.weight.data = turned.weight.t().contiguous().t()
    assert backend.pack(turned).values.is_contiguous()


@pytest.mark.parametrize("library", [CUSPARSELT, CUTLASS])
@torch.no_grad()
def test_int8_is_exact_in_whole_numbers(monkeypatch, library):
    emulated = Emulated(monkeypatch, capability=(8, 6), cusparselt=library is CUSPARSELT)
    weight = matrix(24, 90)
    weight[:, 0] = 127  # so that the grid is the whole numbers
    weight[:, 1:4] = 0
    layer = layer_of(weight)
    backend = SemiStructuredInt8()
    support = backend.supports(layer, emulated.device)
    assert (support.ok, support.exact) == (True, False)
    inputs = torch.randint(-127, 128, (2, 5, 90), generator=torch.Generator().manual_seed(1)).float()
    inputs[..., 0] = 127
    assert torch.equal(backend.run(backend.pack(layer), inputs), layer(inputs))
    inputs[1, 2] = 0
    assert torch.equal(backend.run(backend.pack(layer), inputs)[1, 2], layer.bias)
    assert backend.run(backend.pack(layer), inputs[:0]).shape == (0, 5, 24)
    assert Steps(8).most == 127


def test_what_it_does_not_take_has_a_reason(monkeypatch):
    weight = matrix(32, 64, torch.bfloat16)
    backend = SemiStructured()
    assert "not on cpu" in backend.supports(layer_of(weight), torch.device("cpu")).reason

    def reason(weight, **able):
        emulated = Emulated(monkeypatch, **able)
        return backend.supports(layer_of(weight), emulated.device).reason

    assert reason(weight) == ""
    assert reason(weight, capability=(7, 5)) == "2:4 needs compute capability 8.0, this GPU has 7.5"
    assert "9.0 needs cuSPARSELt" in reason(weight, cusparselt=False)
    assert reason(weight, capability=(8, 0), cusparselt=False) == ""
    assert "torch.float32; load it as float16 or bfloat16" in reason(weight.float())
    assert "torch.float64" in reason(weight.double())
    weight[3, 4:8] = 1
    assert reason(weight) == (
        "its weight is not 2:4: row 3 has 4 nonzeros in the columns 4 to 7; prune it with pattern = '2:4'"
    )
    rocm = Emulated(monkeypatch)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "NVIDIA" in backend.supports(layer_of(weight), rocm.device).reason


def test_a_library_that_fails_at_its_first_use_is_a_reason(monkeypatch):
    weight = matrix(32, 64, torch.bfloat16)
    emulated = Emulated(monkeypatch)
    calls = []

    def broken(*_, **__):
        calls.append(1)
        raise RuntimeError("cuSPARSELt initialization failed\nin a long story")

    monkeypatch.setattr(torch, "_cslt_compress", broken)
    for _ in range(2):
        support = SemiStructured().supports(layer_of(weight), emulated.device)
        assert support.reason == "cuSPARSELt does not work here: cuSPARSELt initialization failed"
    assert len(calls) == 1, "one failure is enough"
    Emulated(monkeypatch)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda packed, columns, **_: (packed @ columns).t() + 1)
    support = SemiStructured().supports(layer_of(weight), emulated.device)
    assert support.reason == "cuSPARSELt gives wrong numbers here"
    semi_structured._failure.cache_clear()


def test_without_a_search_it_runs_all_the_same(monkeypatch):
    Emulated(monkeypatch)

    def missing(*_, **__):
        raise RuntimeError("not compiled with cuSPARSELt")

    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", missing)
    assert SemiStructured().pack(layer_of(matrix(32, 64, torch.bfloat16))).algorithm == 0
    monkeypatch.delattr(torch, "_cslt_sparse_mm_search")
    assert SemiStructured().pack(layer_of(matrix(32, 64, torch.bfloat16))).algorithm == 0


def test_a_model_runs_by_it_and_the_layer_that_cannot_is_named(monkeypatch):
    Emulated(monkeypatch)
    model = tiny_bert().eval().to(torch.bfloat16)
    compress(model, {"stage": [{"prune": "magnitude", "pattern": "2:4", "exclude": ["*pooler*"]}]})
    inputs = {"input_ids": torch.randint(1, 128, (3, 12), generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        before = model(**inputs)[0]
        verdicts = accelerate_model(model, "semi_structured")
        torch.testing.assert_close(model(**inputs)[0], before, atol=0.1, rtol=0.1)
    assert list(verdicts.stays) == ["pooler.dense"]
    assert "row 0 has 4 nonzeros in the columns 0 to 3" in verdicts.stays["pooler.dense"]["semi_structured"]
    restore_model(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], before)
    with pytest.raises(
        PlanError, match=r"'semi_structured' can run none of the 1 layers; 'pooler.dense': its weight is"
    ):
        accelerate_model(model, "semi_structured", targets=["*pooler*"])


@pytest.mark.parametrize("cusparselt", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_torchs_own_operations_take_these_shapes(monkeypatch, cusparselt, tokens):
    """On tensors without numbers: torch computes shapes and refuses wrong ones."""
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt)
    # the one operation whose shape torch cannot tell: half of the values, and two bits for each of them
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight[:, : weight.shape[1] * 9 // 16].contiguous())
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda *_, **__: 3)
    with FakeTensorMode(), torch.no_grad():
        backend, layer = SemiStructured(), nn.Linear(90, 100, dtype=torch.bfloat16)
        packed = backend.pack(layer)
        found = backend.run(packed, torch.empty(2, tokens, 90, dtype=torch.bfloat16))
        assert (found.shape, found.dtype) == ((2, tokens, 100), torch.bfloat16)
        assert found.is_contiguous()
        codes = semi_structured._pack(torch.empty(100, 90, dtype=torch.int8), packed.library)
        found = semi_structured._multiply(codes, torch.empty(tokens, 90, dtype=torch.int8))
        assert (found.shape, found.dtype) == ((tokens, 100), torch.int32)


@needs_gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(64, 64), (100, 90), (3072, 768)])
@torch.no_grad()
def test_a_gpu_computes_the_same(dtype, shape):
    layer = layer_of(matrix(*shape, dtype) / 100).to("cuda")
    layer.weight[5] *= -0.0
    backend = SemiStructured()
    support = backend.supports(layer, layer.weight.device)
    if not support.ok:
        pytest.skip(support.reason)
    packed = backend.pack(layer)
    for tokens in (1, 5, 64, 513):
        inputs = torch.randn(tokens, shape[1], dtype=dtype, device="cuda")
        found, expected = backend.run(packed, inputs), layer(inputs)
        torch.testing.assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0.02)


@needs_gpu
@torch.no_grad()
def test_a_gpu_multiplies_whole_numbers():
    weight = matrix(100, 90)
    weight[:, 0], weight[:, 1:4] = 127, 0
    layer = layer_of(weight).to("cuda")
    backend = SemiStructuredInt8()
    support = backend.supports(layer, layer.weight.device)
    if not support.ok:
        pytest.skip(support.reason)
    inputs = torch.randint(-127, 128, (37, 90), device="cuda").float()
    inputs[:, 0] = 127
    expected = (inputs.double() @ layer.weight.double().t() + layer.bias.double()).float()
    torch.testing.assert_close(backend.run(backend.pack(layer), inputs), expected, atol=1, rtol=1e-5)


@needs_gpu
@torch.no_grad()
def test_a_gpu_is_timed():
    model = nn.Sequential(layer_of(matrix(512, 512, torch.bfloat16) / 100)).to("cuda").eval()
    verdict = accelerate_model(model)["0"]
    assert set(verdict.speeds) == {1, 16, 128, 512}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = torch.randn(128, 512, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(compiled(inputs), model(inputs))
