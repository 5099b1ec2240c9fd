"""An Accelerate loop as it stands in the official examples, inside ``with sparsehooks.attach(...)``.

What to see: nothing in the loop changes (gradient accumulation included), the loss falls, every four weights in a row
hold at least two zeros at the end (the pattern that GPUs with sparse tensor cores take), and the saved model opens
with exactly the same outputs.
"""

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    get_linear_schedule_with_warmup,
)

import sparsehooks

RECIPE = {
    "stage": [
        {
            "prune": "magnitude",
            "pattern": "2:4",
            "exclude": ["classifier", "*pooler*"],
            "schedule": {"use": "linear", "start": 0.2, "end": 0.7, "every": 4},
        }
    ]
}
EPOCHS, BATCH_SIZE, ACCUMULATION = 3, 16, 2


def make_data(count):
    """Sentences of 16 tokens: those of class 0 are mostly from the lower half of the vocabulary, the others not."""
    labels = torch.randint(0, 2, (count,))
    upper = torch.rand(count, 16) < torch.where(labels == 1, 0.8, 0.2)[:, None]
    tokens = torch.randint(0, 64, (count, 16)) + 64 * upper
    return [{"input_ids": ids, "labels": label} for ids, label in zip(tokens, labels, strict=True)]


def main():
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    train_dataloader = DataLoader(make_data(640), shuffle=True, batch_size=BATCH_SIZE)
    eval_dataloader = DataLoader(make_data(256), batch_size=128)
    config = BertConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256
    )
    config.max_position_embeddings = 16
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    total_steps = len(train_dataloader) * EPOCHS // ACCUMULATION
    lr_scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=5, num_training_steps=total_steps)
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )

    with sparsehooks.attach(model, optimizer, RECIPE, total_steps=total_steps, accelerator=accelerator) as session:
        for epoch in range(EPOCHS):
            model.train()
            for batch in train_dataloader:
                with accelerator.accumulate(model):
                    outputs = model(**batch)
                    accelerator.backward(outputs.loss)
                    optimizer.step()
                    lr_scheduler.step()
                    optimizer.zero_grad()

            model.eval()
            right = count = 0
            for batch in eval_dataloader:
                with torch.no_grad():
                    predictions = model(**batch).logits.argmax(dim=-1)
                predictions, labels = accelerator.gather_for_metrics((predictions, batch["labels"]))
                right, count = right + int((predictions == labels).sum()), count + len(labels)
            print(f"epoch {epoch}: step {session.step}, sparsity {session.sparsity:.3f}, accuracy {right / count:.3f}")

    unwrapped = accelerator.unwrap_model(model).eval()
    with tempfile.TemporaryDirectory() as name:
        folder = sparsehooks.save_pretrained(unwrapped, Path(name) / "sparse")
        reopened = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        inspection = sparsehooks.inspect(folder)
    batch = next(iter(eval_dataloader))
    with torch.no_grad():
        print("same outputs:", torch.equal(unwrapped(**batch).logits, reopened(**batch).logits))
    weight = reopened.bert.encoder.layer[0].output.dense.weight
    print("most weights left in a group of four:", int((weight != 0).view(-1, 4).sum(dim=1).max()))
    print(f"bytes: dense {inspection.dense_bytes}, sparse {inspection.bytes}")


if __name__ == "__main__":
    main()
