"""Tiny models and data that the tests share."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

VOCABULARY = 128


def tiny_bert(cls=BertModel, seed=0, **options):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **options,
    )
    return cls(config)


def tiny_classifier(seed=0):
    return tiny_bert(BertForSequenceClassification, seed, num_labels=3)


def tiny_llama(seed=0, tied=False, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def sentences(count=64, length=12, seed=1):
    """Unlabelled batches of an encoder."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(0, VOCABULARY, (length,), generator=generator),
            "attention_mask": (torch.arange(length) < length - index % 4).long(),
        }
        for index in range(count)
    ]


def labelled(count=64, length=12, seed=1):
    return [{**row, "labels": int(row["input_ids"][0]) % 3} for row in sentences(count, length, seed)]


def texts(count=64, length=12, seed=1):
    """Batches of a causal language model, with ragged labels."""
    rows = sentences(count, length, seed)
    for row in rows:
        row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
    return rows


def arguments(folder: Path, **options):
    defaults = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


class Ordered(Trainer):
    """A Trainer that does not shuffle."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def prune(sparsity=0.8, **options):
    """A recipe that prunes every Linear but the heads with the cubic schedule."""
    stage = {
        "prune": "magnitude",
        "sparsity": sparsity,
        "exclude": ["*pooler*", "classifier", "lm_head"],
        "schedule": {"use": "cubic", "start": 0.0, "end": 0.75, "every": 2},
        **options,
    }
    return {"stage": [stage]}


def linear_weights(model):
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(part in name for part in ("pooler", "classifier", "lm_head"))
    }


def zeros(model):
    return sum(int((weight == 0).sum()) for weight in linear_weights(model).values())


def expected_zeros(model, sparsity):
    return sum(round(sparsity * weight.numel()) for weight in linear_weights(model).values())


def same_state(first, second):
    """Whether two state dicts (or models) are equal bit for bit; the first difference is printed."""
    first = first.state_dict() if isinstance(first, torch.nn.Module) else first
    second = second.state_dict() if isinstance(second, torch.nn.Module) else second
    if first.keys() != second.keys():
        print("keys differ:", first.keys() ^ second.keys())
        return False
    for name, tensor in first.items():
        other = second[name]
        if tensor.dtype != other.dtype or not torch.equal(_bits(tensor), _bits(other)):
            print(name, "differs")
            return False
    return True


def _bits(tensor):
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().view(kinds[tensor.element_size()])


def copied(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
