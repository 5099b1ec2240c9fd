"""The backends as a user meets them."""

import copy
import logging
import os
import subprocess
import sys

import pytest
import sparsehooks_cpu as plugin
import sparsehooks_cpu.library as module
import torch
from sparsehooks_cpu import variants
from sparsehooks_cpu.backends import Pair, Quad, Unstructured
from torch import nn
from transformers import BertConfig, BertModel

import sparsehooks
from sparsehooks.testing import check_component

CPU = torch.device("cpu")
PLUGINS = [plugin]


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No other plugins, and no library or speed that was found before."""
    monkeypatch.setenv("SPARSEHOOKS_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("SPARSEHOOKS_PLUGINS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module.library.cache_clear()
    yield
    module.library.cache_clear()


def able(backend):
    return module.problem(backend.kernel, backend.feature) is None


def bert(block=4, *, bits=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = BertModel(BertConfig(vocab_size=128, max_position_embeddings=32, **sizes)).eval()
    pattern = {"use": "block", "height": 1, "width": block} if block > 1 else "unstructured"
    stages = [{"prune": "magnitude", "sparsity": 0.8, "pattern": pattern}]
    if bits:
        stages += [{"quantize": "int8"}, {"activation": {"use": "int8", "symmetric": False}}]
    sparsehooks.compress(model, {"stage": stages})
    return model


def batch():
    return {"input_ids": torch.randint(1, 128, (3, 12), generator=torch.Generator().manual_seed(0))}


def test_components_are_offered():
    records = sparsehooks.PluginManager(PLUGINS).catalog.records("backend")
    found = {record.component.name: record.load() for record in records if record.component.name.startswith("cpu_")}
    assert found == {"cpu_unstructured": Unstructured, "cpu_pair": Pair, "cpu_quad": Quad}


@pytest.mark.parametrize("name", ["cpu_unstructured", "cpu_pair", "cpu_quad"])
def test_conformance(name):
    check_component(sparsehooks.PluginManager(PLUGINS).catalog, "backend", name)


@torch.no_grad()
def test_a_model_runs_the_same():
    model = bert(1)
    expected = model(**batch())[0]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    verdicts = sparsehooks.accelerate_model(model, "cpu_unstructured", plugins=PLUGINS)
    assert all(verdict.backend(36) == "cpu_unstructured" for verdict in verdicts.values())
    torch.testing.assert_close(model(**batch())[0], expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.skipif(not able(Pair), reason="no bfloat16")
@torch.no_grad()
def test_pairs_in_bfloat16():
    model = bert(2).bfloat16()
    expected = model(**batch())[0]
    support = Pair().supports(model.encoder.layer[0].output.dense, CPU)
    assert support == sparsehooks.Support(ok=True, exact=True, depends=f"{module.library().variant}, 80 % zero blocks")
    verdicts = sparsehooks.accelerate_model(model, "cpu_pair", plugins=PLUGINS)
    assert all(verdict.backend(36) == "cpu_pair" for verdict in verdicts.values())
    found = model(**batch())[0]
    assert found.dtype == torch.bfloat16
    assert float((found - expected).abs().max()) < 0.1


@pytest.mark.skipif(not able(Quad), reason="no VNNI")
@torch.no_grad()
def test_quads_take_the_place_of_the_models_own_grid():
    model = bert(4, bits=True)
    expected = model(**batch())[0]
    verdicts = sparsehooks.accelerate_model(model, "cpu_quad", plugins=PLUGINS)
    assert all(verdict.backend(36) == "cpu_quad" for verdict in verdicts.values())
    # what it rounds is what the model rounded, but for codes at the edge of two
    torch.testing.assert_close(model(**batch())[0], expected, rtol=0, atol=2e-2)


@torch.no_grad()
def test_auto_times_the_exact_one():
    model = nn.Sequential(nn.Linear(768, 768))
    sparsehooks.compress(model, {"stage": [{"prune": "magnitude", "sparsity": 0.95}]})
    inputs = torch.randn(64, 768, generator=torch.Generator().manual_seed(0))
    verdicts = sparsehooks.accelerate_model(model, example=(inputs,), plugins=PLUGINS)
    assert verdicts["0"].speeds[64]["cpu_unstructured"] > 1
    assert "it rounds what the model does not round" in verdicts["0"].reasons["cpu_pair"] or not able(Pair)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 4, 40])
@pytest.mark.parametrize(("backend", "block"), [(Unstructured, 1), (Pair, 2), (Quad, 4)])
def test_what_is_not_a_number_stays_none(backend, block, tokens):
    if not able(backend):
        pytest.skip(f"no {backend.feature}")
    layer = bert(block, bits=block == 4).encoder.layer[0].output.dense
    packed, used = backend().pack(layer), layer.weight[:, 5] != 0
    for value in (torch.nan, torch.inf, -torch.inf):
        inputs = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(0))
        inputs[0, 5] = value
        found = backend().run(packed, inputs)
        assert used.any()
        assert not found[0, used].isfinite().any()
        assert found[1:].isfinite().all()
        if backend is Quad:  # the token has no grid
            assert found[0].isnan().all()


@pytest.mark.skipif(not able(Quad), reason="no VNNI")
@torch.no_grad()
def test_a_weight_that_is_no_number_stays_none():
    model = bert(4, bits=True)
    sparsehooks.accelerate_model(model, "cpu_quad", plugins=PLUGINS)
    layer = model.encoder.layer[0].output.dense
    layer.weight[3, 5] = torch.nan
    with pytest.warns(UserWarning, match="runs dense, no longer by 'cpu_quad': its weight lies on no int8 grid"):
        assert layer(torch.ones(1, 128))[:, 3].isnan().all()


@torch.no_grad()
def test_compiled_and_exported():
    model = nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 8)).eval()
    sparsehooks.compress(model, {"stage": [{"prune": "magnitude", "sparsity": 0.7}]})
    sparsehooks.accelerate_model(model, "cpu_unstructured", plugins=PLUGINS)
    inputs = torch.randn(20, 48, generator=torch.Generator().manual_seed(0))
    expected, restored = model(inputs), copy.deepcopy(model)
    sparsehooks.restore_model(restored)
    for backend in ("eager", "aot_eager"):
        assert torch.equal(torch.compile(model, fullgraph=True, backend=backend)(inputs), expected)
        torch._dynamo.reset()
    exported = torch.export.export(model, (inputs,)).module()
    assert torch.equal(exported(inputs), restored(inputs)), "torch's layers go into the program"


def test_what_it_does_not_take():
    def reason(backend, layer, device=CPU):
        support = backend.supports(layer, device)
        assert not support.ok
        return support.reason

    layer = nn.Linear(8, 8)
    assert reason(Unstructured(), layer, torch.device("meta")) == "its kernels run on CPUs, not on meta"
    assert reason(Unstructured(), layer.half()) == "its weight is torch.float16, not torch.float32"
    assert reason(Unstructured(), nn.Linear(8, 8)) == "only 0% of its weights are zero, of which 25% or more pay"
    if able(Pair):
        assert reason(Pair(), layer) == "its weight is torch.float16, not torch.bfloat16 or torch.float32"
        scattered = nn.Linear(8, 8)
        scattered.weight.data[:, ::2] = 0
        assert reason(Pair(), scattered).startswith("only 0% of its blocks of 1x2 weights are zero")
        scattered.weight.data[:4] = 0
        support = Pair().supports(scattered, CPU)
        assert support == sparsehooks.Support(
            ok=True, exact=False, depends=f"{module.library().variant}, 50 % zero blocks"
        )
    if able(Quad):
        assert reason(Quad(), nn.Linear(8, 8)) == "its weight lies on no int8 grid of rows; quantize it by int8"
        assert "65537 input features are more than 65536" in reason(Quad(), nn.Linear(65537, 1))


class TestLibrary:
    """Which variant is loaded, and what is said where none is."""

    def test_the_best_that_the_cpu_can_run(self, monkeypatch):
        capabilities = dict(torch.cpu.get_capabilities())
        for name, variant in variants.of(module.platform.machine()).items():
            if not all(capabilities[need] for need in variant.needs):
                break
            assert (module._folder() / variants.file(name)).is_file(), "this compiler knows all variants"
            best = name
        assert module.library().variant == best
        for need, expected in (("avx512_vnni", "avx512"), ("avx512_vl", "avx2"), ("fma3", "generic")):
            capabilities[need] = False
            with monkeypatch.context() as patch:
                patch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
                module.library.cache_clear()
                assert module.library().variant in {expected, best}
                if best == "avx512_bf16":
                    assert module.library().variant == expected
                support = Quad().supports(nn.Linear(8, 8), CPU)
                assert support.reason.startswith("it needs avx512_vnni, and the kernels for "), support.reason

    def refused(self, caplog):
        module.library.cache_clear()
        with caplog.at_level(logging.WARNING):
            first = Unstructured().supports(nn.Linear(8, 8), CPU)
            assert Unstructured().supports(nn.Linear(8, 8), CPU) == first
        assert not first.ok
        (record,) = caplog.records
        assert record.getMessage().startswith("the kernels of sparsehooks-cpu are off: ")
        assert first.reason == "the kernels are off: " + record.getMessage().partition(" off: ")[2]
        return first.reason

    def test_a_variant_that_is_not_there(self, monkeypatch, caplog):
        monkeypatch.setenv(module.VARIABLE, "avx1024")
        assert "SPARSEHOOKS_CPU_VARIANT is 'avx1024', and this CPU or package has only" in self.refused(caplog)

    def test_installed_without_a_compiler(self, monkeypatch, caplog, tmp_path):
        monkeypatch.setattr(module, "_folder", lambda: tmp_path)
        assert "they were not compiled; install a C++ compiler" in self.refused(caplog)
        with pytest.raises(sparsehooks.PlanError, match="'cpu_unstructured' can run none of the 1 layers"):
            sparsehooks.accelerate_model(nn.Sequential(nn.Linear(8, 8)), "cpu_unstructured", plugins=PLUGINS)

    def test_a_file_that_is_no_library(self, monkeypatch, caplog, tmp_path):
        (tmp_path / variants.file("generic")).write_bytes(b"no library")
        monkeypatch.setattr(module, "_folder", lambda: tmp_path)
        assert "cannot be loaded: " in self.refused(caplog)

    def test_a_library_that_was_compiled_before(self, monkeypatch, caplog):
        monkeypatch.setitem(module.AGREED, "sparsehooks_layout", (0, 0, 0, 0))
        assert "is of another version; install sparsehooks-cpu again" in self.refused(caplog)

    def test_no_memory(self, monkeypatch):
        layer = nn.Linear(8, 8)
        nn.init.zeros_(layer.weight)
        backend = Unstructured()
        packed = backend.pack(layer)
        monkeypatch.setitem(module.library().kernels["float32"], torch.float32, lambda *_: 0)
        with pytest.raises(MemoryError, match="there is no memory for the inputs of 3 tokens"):
            backend.run(packed, torch.zeros(3, 8))


def test_importing_the_plugin_is_light():
    code = "import sys, sparsehooks_cpu; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    environment = {"PYTHONPATH": os.pathsep.join([str(module._folder().parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == "[]", done.stderr
