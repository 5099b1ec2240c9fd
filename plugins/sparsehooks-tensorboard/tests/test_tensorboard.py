import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sparsehooks_tensorboard import TensorBoard, picture
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
from torch.utils.tensorboard import SummaryWriter
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

import sparsehooks

RECIPE = {
    "stage": [
        {
            "prune": "magnitude",
            "sparsity": 0.8,
            "exclude": ["pooler*"],
            "schedule": {"use": "cubic", "start": 2, "end": 8, "every": 3},
        },
        {"distill": "hidden"},
    ]
}


@pytest.fixture(autouse=True)
def no_other_plugins(monkeypatch):
    monkeypatch.setenv("SPARSEHOOKS_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("SPARSEHOOKS_PLUGINS", raising=False)


class Witness:
    """Writes down what the hooks were told, to compare the event files with."""

    def __init__(self):
        self.sparsity, self.layers, self.masks, self.stages, self.metrics, self.errors = [], [], [], [], [], []

    @sparsehooks.hookimpl
    def masks_updated(self, session, step, changes):
        self.sparsity.append((step, session.sparsity))
        self.layers.append((step, {name: 1 - change.kept / change.total for name, change in changes.items()}))
        self.masks.append((step, {name: mask.clone() for name, mask in session.masks.items()}))

    @sparsehooks.hookimpl
    def stage_changed(self, session, stage, status):
        self.stages.append((session.step, f"{stage}: {status}"))

    @sparsehooks.hookimpl
    def metrics_reported(self, session, metrics):
        self.metrics.append((session.step, dict(metrics)))


class Breaks:
    @sparsehooks.hookimpl
    def step_finished(self, session, step):
        if step == 6:
            raise RuntimeError("the sixth step")


def train(folder, plugins, *, resume=None, **options):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=64,
        max_position_embeddings=16,
    )
    model = BertModel(config)
    data = [
        {"input_ids": torch.randint(0, 64, (8,)), "attention_mask": torch.ones(8, dtype=torch.long)} for _ in range(32)
    ]
    arguments = {
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_strategy": "no",
    } | options
    args = TrainingArguments(str(folder), **arguments, report_to=[], disable_tqdm=True, use_cpu=True)
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data[:8])
    trainer.add_callback(sparsehooks.CompressionCallback(RECIPE, plugins=plugins))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model


def read(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    return accumulator.Reload()


def texts(events):
    tag = "stages/text_summary"
    return [(e.step, tensor_util.make_ndarray(e.tensor_proto)[0].decode()) for e in events.Tensors(tag)]


def scalars(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_the_event_files_hold_what_the_session_said(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEHOOKS_TENSORBOARD_DIR", str(tmp_path / "events"))
    witness = Witness()
    train(tmp_path / "out", [TensorBoard(), witness], eval_strategy="steps", eval_steps=4)
    events = read(tmp_path / "events")

    assert [step for step, _ in witness.sparsity] == [5, 8]
    assert scalars(events, "sparsity") == [(step, np.float32(value)) for step, value in witness.sparsity]
    assert witness.sparsity[-1][1] == pytest.approx(0.8, abs=1e-3)

    names = set(witness.masks[-1][1])
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("sparsity/")} == {f"sparsity/{n}" for n in names}
    assert set(events.Tags()["images"]) == {f"masks/{name}" for name in names}
    for name in names:
        expected = [(step, np.float32(layers[name])) for step, layers in witness.layers]
        assert scalars(events, f"sparsity/{name}") == expected
        images = events.Images(f"masks/{name}")
        assert [image.step for image in images] == [5, 8]
        for image, (step, masks) in zip(images, witness.masks, strict=True):
            assert image.step == step
            pixels = np.array(Image.open(io.BytesIO(image.encoded_image_string)))  # (rows, columns, RGB)
            assert (pixels == masks[name].numpy()[..., None] * 255).all()

    assert texts(events) == witness.stages
    assert (2, "stage[0] prune magnitude: started") in witness.stages
    assert (8, "stage[0] prune magnitude: finished") in witness.stages

    assert [step for step, _ in witness.metrics] == [4, 8, 10]  # the Trainer adds one at the end
    for name in ("eval_runtime", "epoch"):
        assert scalars(events, f"metrics/{name}") == [(s, np.float32(metrics[name])) for s, metrics in witness.metrics]


def test_weights_are_the_same_with_and_without_it(tmp_path):
    plain = train(tmp_path / "plain", []).state_dict()
    watched = train(tmp_path / "watched", [TensorBoard(tmp_path / "events")]).state_dict()
    assert plain.keys() == watched.keys()
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())
    assert read(tmp_path / "events").Scalars("sparsity")


def test_a_failed_run_closes_the_file_and_says_why(tmp_path, monkeypatch):
    closed, close = [], SummaryWriter.close
    monkeypatch.setattr(SummaryWriter, "close", lambda writer: (closed.append(writer), close(writer)))
    board = TensorBoard(tmp_path / "events")
    with pytest.raises(RuntimeError, match="the sixth step"):
        train(tmp_path / "out", [board, Breaks()])
    assert len(closed) == 1
    events = read(tmp_path / "events")
    assert texts(events)[-1] == (6, "failed: RuntimeError: the sixth step")
    assert [step for step, _ in scalars(events, "sparsity")] == [5]


def test_a_resumed_run_takes_the_place_of_what_came_after_its_checkpoint(tmp_path):
    board, witness = TensorBoard(tmp_path / "events"), Witness()
    saving = {"save_strategy": "steps", "save_steps": 4}
    with pytest.raises(RuntimeError, match="the sixth step"):
        train(tmp_path / "out", [board, Breaks()], **saving)
    assert [step for step, _ in scalars(read(tmp_path / "events"), "sparsity")] == [5]

    train(tmp_path / "out", [board, witness], resume=tmp_path / "out" / "checkpoint-4", **saving)
    assert [step for step, _ in witness.sparsity] == [5, 8]
    events = scalars(read(tmp_path / "events"), "sparsity")
    assert [step for step, _ in events] == [5, 8]
    assert events == [(step, np.float32(value)) for step, value in witness.sparsity]


def test_only_rank_0_writes(tmp_path):
    class View:
        step = 0
        rank = 1

    view, board = View(), TensorBoard(tmp_path / "events")
    board.session_started(view)
    board.stage_changed(view, "stage[0]", "started")
    board.masks_updated(view, 1, {})
    board.metrics_reported(view, {"eval_loss": 1.0})
    board.session_finished(view, None)
    assert not (tmp_path / "events").exists()


def test_folder_defaults_to_runs_sparsehooks(tmp_path, monkeypatch):
    class View:
        step = 0
        rank = 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSEHOOKS_TENSORBOARD_DIR", raising=False)
    view, board = View(), TensorBoard()
    board.session_started(view)
    board.session_finished(view, None)
    assert list((tmp_path / "runs" / "sparsehooks").glob("events.out.tfevents.*"))


def test_metrics_that_are_no_numbers_are_left_out(tmp_path):
    class View:
        step = 3
        rank = 0

    view, board = View(), TensorBoard(tmp_path)
    board.session_started(view)
    board.metrics_reported(view, {"eval_loss": 0.5, "note": "text"})
    board.session_finished(view, None)
    events = read(tmp_path)
    assert events.Tags()["scalars"] == ["metrics/eval_loss"]


@pytest.mark.parametrize("shape", [(512, 1024), (1024, 96), (300, 257), (5, 7), (8, 4, 3, 3), (6,), ()])
def test_a_pixel_is_the_share_that_stays(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.3
    matrix = mask.reshape(shape[0], -1) if shape else mask.reshape(1, 1)
    image = picture(mask)
    height, width = (min(256, size) for size in matrix.shape)
    assert image.shape == (height, width)
    assert image.dtype == np.uint8
    rows = [round_down * matrix.shape[0] // height for round_down in range(height + 1)]
    columns = [round_down * matrix.shape[1] // width for round_down in range(width + 1)]
    for y in (0, height // 3, height - 1):
        for x in (0, width // 2, width - 1):
            block = matrix[rows[y] : rows[y + 1], columns[x] : columns[x + 1]]
            assert image[y, x] == round(block.double().mean().item() * 255)


def test_pictures_of_blocks_of_equal_size_are_mean_pooling():
    mask = torch.rand(512, 1024, generator=torch.Generator().manual_seed(2)) < 0.2
    pooled = torch.nn.functional.avg_pool2d(mask[None].float(), (2, 4))[0]
    assert (picture(mask) == torch.round(pooled * 255).to(torch.uint8).numpy()).all()


def test_importing_it_imports_neither_torch_nor_tensorboard():
    code = (
        "import sys, sparsehooks_tensorboard\n"
        "from sparsehooks import PluginManager\n"
        "manager = PluginManager([sparsehooks_tensorboard.plugin], autoload=False)\n"
        "assert not manager.broken(), manager.broken()\n"
        "print([m for m in ('torch', 'tensorboard', 'numpy') if m in sys.modules])"
    )
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=paths)
    assert run.stdout.strip() == "[]"
