"""Every example is short, runs without warnings, and shows what its docstring promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, folder):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SPARSEHOOKS")}
    # several threads on busy cores wait for each other longer than they work
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / name],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir()), "an example leaves files in the folder where it is run"
    return done.stdout


def numbers(line):
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", line)]


def test_trainer_callback(tmp_path):
    accuracy, sparsity, size = run("trainer_callback.py", tmp_path).splitlines()
    dense, sparse, reopened = numbers(accuracy)
    assert dense > 0.95
    assert sparse > dense - 0.03
    assert reopened == sparse
    assert numbers(sparsity)[0] == 0.8
    before, after, times = numbers(size)
    assert before / after == pytest.approx(times, abs=0.05)
    assert times > 3


def test_accelerate_loop(tmp_path):
    *epochs, outputs, group, size = run("accelerate_loop.py", tmp_path).splitlines()
    assert [numbers(line)[:2] for line in epochs] == [[0, 20], [1, 40], [2, 60]]
    sparsities = [numbers(line)[2] for line in epochs]
    assert 0 < sparsities[0] < sparsities[1] < sparsities[2] == 0.5
    assert numbers(epochs[-1])[3] > 0.9
    assert outputs == "same outputs: True"
    assert group == "most weights left in a group of four: 2"
    dense, sparse = numbers(size)
    assert sparse < 0.65 * dense


def test_third_party_criterion(tmp_path):
    *listed, magnitude, relative = run("third_party_criterion.py", tmp_path).splitlines()
    names = [line.split(":")[0] for line in listed]
    assert {"criterion magnitude", "criterion relative"} <= set(names)
    assert listed[names.index("criterion relative")].endswith("['MyPlugin' (python)]")
    assert magnitude == "magnitude: sparsity 0.800, input features gone 7 of 64"
    assert relative == "relative: sparsity 0.800, input features gone 0 of 64"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_say_what_to_see(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 100
    assert "What to see:" in text.split('"""')[1]
    assert "\ndef main():\n" in text
    assert f"def test_{path.stem}(" in Path(__file__).read_text(encoding="utf-8"), "this example is not run"
