"""The kernels on another architecture, which an emulator runs: NEON by the compiler's own vectors."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sparsehooks_cpu.backends import Unstructured
from torch import nn

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER} and {EMULATOR}"
)


def built(name, folder):
    """A program of one of the sources beside this file."""
    package = HERE.parent / "src" / "sparsehooks_cpu"
    command = [COMPILER, "-std=c++17", "-O3", "-static", "-I", package, HERE / f"{name}.cpp", "-o", folder / name]
    subprocess.run(command, check=True, capture_output=True)
    return folder / name


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return built("emulated_kernels", tmp_path_factory.mktemp("arm"))


def run(program, layer, inputs, folder):
    packed = Unstructured().pack(layer)
    for name in ("values", "columns", "rows", "counts", "starts", "bias"):
        (folder / name).write_bytes(getattr(packed, name).numpy().tobytes())
    (folder / "inputs").write_bytes(inputs.numpy().tobytes())
    sizes = (packed.out_features, packed.in_features, len(inputs))
    subprocess.run([EMULATOR, program, folder, *map(str, sizes)], check=True, capture_output=True)
    outputs = np.frombuffer((folder / "outputs").read_bytes(), np.float32).copy()
    return torch.from_numpy(outputs).reshape(len(inputs), packed.out_features)


@pytest.mark.parametrize("shape", [(1, 1), (7, 12), (300, 100), (257, 97), (64, 384)], ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 5, 16, 37, 64, 130])
def test_an_arm_cpu_gives_the_exact_sums(program, shape, tokens, tmp_path):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(shape[1], shape[0]).requires_grad_(requires_grad=False)
    layer.weight.copy_(torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.2))
    inputs = torch.randn(tokens, shape[1], generator=generator)
    expected = F.linear(inputs.double(), layer.weight.double(), layer.bias.double())
    # n additions and products, each rounded to 24 bits
    size = F.linear(inputs.double().abs(), layer.weight.double().abs(), layer.bias.double().abs())
    found = run(program, layer, inputs, tmp_path)
    assert bool(((found - expected).abs() <= size * shape[1] * 2**-24).all())
    # whole numbers are summed without any rounding
    layer.weight.mul_(40).round_()
    layer.bias.zero_()
    inputs = inputs.mul(20).round()
    expected = F.linear(inputs.double(), layer.weight.double()).float()
    assert torch.equal(run(program, layer, inputs, tmp_path), expected)


def test_an_arm_cpu_runs_the_loops_of_files_and_masks(tmp_path):
    done = subprocess.run([EMULATOR, built("emulated_loops", tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
