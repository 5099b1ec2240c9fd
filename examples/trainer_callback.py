"""One callback on a Trainer: a classifier loses 80 % of its weights while it trains on, and keeps its accuracy.

What to see: the accuracy before and after, the sparsity of the pruned layers, a file several times smaller, and that
``AutoModelForSequenceClassification.from_pretrained`` opens it with the same accuracy. The model is made here, so that
the script needs no network; with a fine-tuned model of yours, only the lines marked (*) are new.
"""

import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

import sparsehooks  # (*)

RECIPE = {  # (*) the same as a TOML file: pass its path instead
    "stage": [
        {
            "prune": "magnitude",
            "sparsity": 0.8,
            "exclude": ["classifier", "*pooler*"],
            "schedule": {"use": "cubic", "start": 0.0, "end": 0.6, "every": 5},
        },
        # the teacher is the model as it is when the training with the callback begins
        {"distill": {"use": "kl", "temperature": 2.0}, "teacher": "self", "weight": 0.5},
    ]
}


def make_data(count):
    """Sentences of 16 tokens: those of class 0 are mostly from the lower half of the vocabulary, the others not."""
    labels = torch.randint(0, 2, (count,))
    upper = torch.rand(count, 16) < torch.where(labels == 1, 0.8, 0.2)[:, None]
    tokens = torch.randint(0, 64, (count, 16)) + 64 * upper
    return [{"input_ids": ids, "labels": label} for ids, label in zip(tokens, labels, strict=True)]


def make_trainer(model, folder, steps):
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=256,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=make_data(1024),
        eval_dataset=make_data(512),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def main():
    set_seed(0)
    config = BertConfig(
        vocab_size=128, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512
    )
    config.max_position_embeddings = 16
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainer = make_trainer(BertForSequenceClassification(config), folder / "dense", 60)
        trainer.train()
        trainer.save_model()
        before = trainer.evaluate()["eval_accuracy"]

        trainer = make_trainer(trainer.model, folder / "sparse", 60)
        trainer.add_callback(sparsehooks.CompressionCallback(RECIPE))  # (*)
        trainer.train()
        trainer.save_model()
        after = trainer.evaluate()["eval_accuracy"]

        reopened = AutoModelForSequenceClassification.from_pretrained(folder / "sparse")
        again = make_trainer(reopened, folder / "again", 1)
        again.eval_dataset = trainer.eval_dataset
        query = reopened.bert.encoder.layer[0].attention.self.query.weight
        sizes = {kind: (folder / kind / "model.safetensors").stat().st_size for kind in ("dense", "sparse")}
        print(f"accuracy: dense {before:.3f}, sparse {after:.3f}, reopened {again.evaluate()['eval_accuracy']:.3f}")
        print(f"sparsity: {(query == 0).float().mean().item():.3f} of the first query layer is zero")
        print(f"bytes: dense {sizes['dense']}, sparse {sizes['sparse']}, {sizes['dense'] / sizes['sparse']:.1f} times")


if __name__ == "__main__":
    main()
