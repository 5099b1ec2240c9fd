from __future__ import annotations

import logging

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import sparsehooks
from sparsehooks import PlanError, SessionError

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
from sparsehooks_lightning import Compression, compressed  # noqa: E402 - it needs lightning

pytestmark = [  # what lightning says about the machine and about torch
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*not have many workers"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

PRUNE = {
    "prune": "magnitude",
    "sparsity": 0.8,
    "exclude": ["classifier", "*pooler*"],
    "schedule": {"use": "cubic", "start": 0.0, "end": 0.75, "every": 2},
}
INT8 = {"quantize": "int8", "exclude": ["classifier"]}
RECIPE = {"stage": [PRUNE, {"distill": "kl", "teacher": "self", "weight": 0.5}, INT8]}


@pytest.fixture(autouse=True)
def no_other_plugins(monkeypatch):
    monkeypatch.setenv("SPARSEHOOKS_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("SPARSEHOOKS_PLUGINS", raising=False)


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = bert()

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def validation_step(self, batch, index):
        self.log("loss", self.model(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Plain(lightning.LightningModule):
    def __init__(self, optimizers=1):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
        self.count = optimizers

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch["inputs"]), batch["labels"])

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9) for _ in range(self.count)]


def loader(size=4, count=32):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        ids = torch.randint(0, 64, (8,), generator=generator)
        rows.append({"input_ids": ids, "labels": ids[0] % 3})
    return DataLoader(rows, batch_size=size)


def vectors(size=4, count=32):
    generator = torch.Generator().manual_seed(1)
    return DataLoader(
        [{"inputs": torch.randn(16, generator=generator), "labels": index % 3} for index in range(count)],
        batch_size=size,
    )


def fit(module, folder, data, recipe, *callbacks, resume=None, plugins=(), validate=None, **options):
    trainer = lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[Compression(recipe, plugins=plugins), *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_steps": 8, "max_epochs": 1, "enable_checkpointing": bool(callbacks), **options},
    )
    trainer.fit(module, data, validate, ckpt_path=resume, **({"weights_only": False} if resume else {}))
    return trainer


def weights(model):
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "classifier" not in name and "pooler" not in name
    }


def zeros_are_exact(model):
    return all(int((weight == 0).sum()) == round(0.8 * weight.numel()) for weight in weights(model).values())


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_transformers_model_is_saved_in_the_sparse_form(tmp_path, precision):
    module = Classifier()
    trainer = fit(module, tmp_path, loader(), RECIPE, precision=precision)
    assert zeros_are_exact(module.model)
    assert float(trainer.callback_metrics["sparsity"]) == pytest.approx(0.8, abs=1e-3)
    module.model.save_pretrained(tmp_path / "a")
    assert sparsehooks.inspect(tmp_path / "a").ratio < 0.6
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    assert same(module.model, opened)
    batch = next(iter(loader()))
    with torch.no_grad():
        assert torch.equal(module.model.eval()(**batch).logits, opened.eval()(**batch).logits)


def test_a_plain_module_is_compressed(tmp_path):
    module = Plain()
    assert compressed(module) is module.net
    fit(module, tmp_path, vectors(), {"stage": [PRUNE | {"targets": ["0"], "exclude": []}]})
    assert int((module.net[0].weight == 0).sum()) == round(0.8 * 16 * 64)
    assert (module.net[2].weight != 0).all()
    sparsehooks.save_pretrained(module.net, tmp_path / "a")
    state = sparsehooks.load_state_dict(tmp_path / "a")
    assert all(torch.equal(value, state[name]) for name, value in module.net.state_dict().items())


def test_it_is_the_run_of_a_plain_loop(tmp_path):
    module, twin = Plain(), Plain()
    recipe = {"stage": [PRUNE | {"grow": {"use": "gradient", "fraction": 0.3}, "exclude": []}]}
    fit(module, tmp_path, vectors(), recipe)
    (optimizer,) = twin.configure_optimizers()
    with sparsehooks.attach(twin.net, optimizer, recipe, total_steps=8):
        for index, batch in enumerate(vectors()):
            optimizer.zero_grad()
            twin.training_step(batch, index).backward()
            optimizer.step()
    assert same(module, twin)


def test_accumulated_batches_equal_whole_ones(tmp_path):
    whole, parts = Classifier(), Classifier()
    for module in (whole, parts):
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=0.1)
    recipe = {"stage": RECIPE["stage"][:2]}
    fit(whole, tmp_path, loader(8), recipe, max_steps=4)
    fit(parts, tmp_path, loader(2), recipe, max_steps=4, accumulate_grad_batches=4)
    assert zeros_are_exact(whole.model)
    assert zeros_are_exact(parts.model)
    for name, weight in whole.state_dict().items():
        assert torch.allclose(weight, parts.state_dict()[name], atol=1e-5), name


def test_a_checkpoint_resumes_bit_identical(tmp_path):
    """At the end of an epoch: within one, Lightning begins the data anew, with or without sparsehooks."""
    saving = lightning.callbacks.ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1)
    options = {"max_epochs": 3, "max_steps": -1}
    whole = Classifier()
    fit(whole, tmp_path, loader(count=16), RECIPE, saving, **options)
    for step in (4, 8):
        resumed = Classifier()
        path = tmp_path / "saved" / f"step={step}.ckpt"
        fit(resumed, tmp_path, loader(count=16), RECIPE, resume=path, **options)
        assert same(whole, resumed)


def test_an_exception_detaches_and_the_plugins_hear_of_it(tmp_path):
    heard = []

    class Hears:
        @sparsehooks.hookimpl
        def session_finished(self, session, error):
            heard.append((session.step, type(error)))

    class Breaks(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if index == 2:
                raise RuntimeError("the third batch")

    module = Classifier()
    classes = [type(part) for part in module.modules()]
    with pytest.raises(RuntimeError, match="the third batch"):
        fit(module, tmp_path, loader(), RECIPE, Breaks(), plugins=[Hears()])
    assert heard == [(3, RuntimeError)]
    assert classes == [type(part) for part in module.modules()]
    assert not module.model._forward_hooks
    fit(module, tmp_path, loader(), RECIPE)
    assert zeros_are_exact(module.model)


def test_evaluations_reach_the_session(tmp_path):
    heard = []

    class Hears:
        @sparsehooks.hookimpl
        def metrics_reported(self, session, metrics):
            heard.append((session.step, "loss" in metrics))

    fit(
        Classifier(), tmp_path, loader(), {"stage": [PRUNE]}, plugins=[Hears()], validate=loader(), val_check_interval=4
    )
    assert heard == [(4, True), (8, True)]


def test_what_does_not_fit_is_refused_before_training(tmp_path):
    module = Plain()
    with pytest.raises(PlanError, match="matches no module"):
        fit(module, tmp_path, vectors(), {"stage": [PRUNE | {"targets": ["Conv2d"]}]})
    with pytest.raises(SessionError, match="how long the run is"):
        fit(module, tmp_path, vectors(), {"stage": [PRUNE]}, max_steps=-1, max_epochs=-1)
    assert same(module, Plain())
    several = Plain(optimizers=2)
    several.automatic_optimization = False
    with pytest.raises(SessionError, match="2 optimizers"):
        fit(several, tmp_path, vectors(), {"stage": [PRUNE]})


def test_the_rest_of_a_module_is_compressed_with_it():
    module = Classifier()
    assert compressed(module) is module.model
    module.head = torch.nn.Linear(3, 3)
    assert compressed(module) is module
