"""A criterion of your own in ten lines, offered by an object in ``plugins=[...]`` and used by name in a recipe.

The criterion compares a weight with the others of its row and of its column (relative importance, Zhang et al. 2024,
"Plug-and-Play", ICLR): a feature whose weights are all small is not lost as a whole. Here every tenth input feature of
the model is scaled down to see that.

What to see: the criterion in the list beside the built-in ones, with the plugin that offers it; and that at the same
sparsity plain magnitude leaves input features without any weight while the new criterion leaves none.
"""

import tempfile

import torch
from transformers import BertConfig, BertModel, PrinterCallback, Trainer, TrainingArguments, set_seed

import sparsehooks
from sparsehooks import Component, Criterion, PluginManager, hookimpl


class Relative(Criterion):
    def score(self, view):
        size = view.weight.abs()
        return size / size.sum(dim=0, keepdim=True) + size / size.sum(dim=1, keepdim=True)


class MyPlugin:
    @hookimpl
    def register_components(self, registry):
        registry.add(Component("criterion", "relative", Relative, "keep what is large in its row and its column"))


def prune(criterion):
    """Train a small model while it is pruned; the share of zeros and the number of input features that are gone."""
    set_seed(0)
    model = BertModel(
        BertConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128)
    )
    layer = model.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        layer.weight[:, ::10] *= 0.01
    recipe = {
        "stage": [
            {
                "prune": criterion,
                "sparsity": 0.8,
                "exclude": ["pooler*"],
                "schedule": {"use": "cubic", "end": 0.8, "every": 2},
            },
            {"distill": "hidden"},  # the task: stay close to the dense model
        ]
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=20,
            learning_rate=1e-4,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        data = [{"input_ids": torch.randint(0, 128, (16,))} for _ in range(64)]
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(sparsehooks.CompressionCallback(recipe, plugins=[MyPlugin()]))
        trainer.train()
    gone = layer.weight == 0
    return gone.float().mean().item(), int(gone.all(dim=0).sum())


def main():
    manager = PluginManager(plugins=[MyPlugin()])
    for record in manager.catalog.records("criterion"):  # what `sparsehooks components criterion` prints
        print(f"criterion {record.component.name}: {record.component.summary} [{record.plugin.describe()}]")
    for criterion in ("magnitude", "relative"):
        sparsity, features = prune(criterion)
        print(f"{criterion}: sparsity {sparsity:.3f}, input features gone {features} of 64")


if __name__ == "__main__":
    main()
