"""Trainers and wrappers of other packages: real runs on tiny models, saved, opened again, compared."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers import (
    VOCABULARY,
    arguments,
    copied,
    labelled,
    linear_weights,
    prune,
    same_state,
    sentences,
    texts,
    tiny_bert,
    tiny_classifier,
    tiny_llama,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

import sparsehooks
from sparsehooks import CompressionCallback, PlanError, SessionError, attach_trainer

pytestmark = [  # what other packages say about each other
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

KL = {"distill": "kl", "teacher": "self", "weight": 0.5}
HIDDEN = {"distill": "hidden", "teacher": "self"}
INT8 = {"quantize": "int8", "exclude": ["lm_head", "classifier"]}
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
OPTIONS = {
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
}
WORDS = [f"w{number}" for number in range(VOCABULARY - 3)]


def tokenizer():
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, **names)


def phrases(count=32, length=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, len(WORDS), (count, length), generator=generator)
    return [" ".join(WORDS[index] for index in row) for row in rows]


def exact_zeros(model, sparsity=0.8):
    """Whether every pruned layer has exactly the zeros that the recipe asks for."""
    counts = {name: (int((w == 0).sum()), round(sparsity * w.numel())) for name, w in linear_weights(model).items()}
    return len(counts) > 0 and all(found == asked for found, asked in counts.values())


def is_sparse(folder):
    inspection = sparsehooks.inspect(folder)
    sparsehooks.verify(folder)
    return inspection.bytes < 0.6 * inspection.dense_bytes


def test_seq2seq_trainer(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    )
    rows = [{**row, "labels": row["input_ids"].flip(0)[:6]} for row in sentences(32)]
    args = Seq2SeqTrainingArguments(
        **{**arguments(tmp_path).to_dict(), "predict_with_generate": True, "generation_max_length": 4, "report_to": []}
    )
    trainer = Seq2SeqTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:4])
    trainer.add_callback(CompressionCallback({"stage": [*prune()["stage"], KL, INT8]}))
    trainer.train()
    assert exact_zeros(model)
    trainer.save_model()
    opened = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert same_state(model, opened)
    assert is_sparse(tmp_path)
    batch = torch.stack([row["input_ids"] for row in rows[:4]])
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.eval().generate(batch, **options), opened.generate(batch, **options))


@pytest.fixture
def encoder(tmp_path):
    """A tiny SentenceTransformer, not from the Hub."""
    package = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    tiny_bert().save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    transformer = modules.Transformer(str(tmp_path / "bert"))
    return package.SentenceTransformer(modules=[transformer, modules.Pooling(64)], device="cpu")


def train_encoder(model, folder, recipe, attach=True, **options):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    args = SentenceTransformerTrainingArguments(
        str(folder), **{"max_steps": 8, "logging_steps": 1, **OPTIONS, **options}
    )
    data = Dataset.from_dict({"anchor": phrases(seed=1), "positive": phrases(seed=2)})
    loss = MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)
    if attach:
        attach_trainer(trainer, recipe)
    else:
        trainer.add_callback(CompressionCallback(recipe))
    trainer.train()
    return trainer


@pytest.mark.parametrize("door", ["callback", "attach"])
def test_sentence_transformers(encoder, tmp_path, door):
    distil = [HIDDEN] if door == "attach" else []
    recipe = {"stage": [*prune()["stage"], *distil, INT8]}
    options = {"save_strategy": "steps", "save_steps": 4} if door == "callback" else {}
    trainer = train_encoder(encoder, tmp_path / "run", recipe, attach=door == "attach", **options)
    inner = encoder.transformers_model
    assert exact_zeros(inner)
    if door == "callback":
        checkpoint = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
        assert {tensor.dtype for tensor in checkpoint.values()} == {torch.float32}
    trainer.save_model(tmp_path / "saved")
    encoder.save(str(tmp_path / "too"))
    texts = phrases(4, seed=3)
    for folder in (tmp_path / "saved", tmp_path / "too"):
        assert is_sparse(folder)
        opened = type(encoder)(str(folder), device="cpu")
        assert same_state(inner, opened.transformers_model)
        assert (opened.encode(texts) == encoder.encode(texts)).all()


def test_sentence_transformers_distil_by_the_second_door_only(encoder, tmp_path):
    """The callback alone never reaches the loss; the second door adds the mean of the terms of the two forwards."""
    tiny_bert(seed=5).save_pretrained(tmp_path / "teacher")
    recipe = {"stage": [{"distill": "hidden", "teacher": str(tmp_path / "teacher")}]}
    with pytest.raises(SessionError, match="attach_trainer"):
        train_encoder(copy.deepcopy(encoder), tmp_path / "run", recipe, attach=False)

    def first_loss(recipe):
        options = {"max_steps": 1, "per_device_train_batch_size": 32}
        return train_encoder(copy.deepcopy(encoder), tmp_path / "run", recipe, **options).state.log_history[0]["loss"]

    def term(texts):
        batch = encoder.tokenizer(texts, padding=True, return_tensors="pt")
        rows = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(*batch.values(), strict=False)]
        options = {"max_steps": 1, "per_device_train_batch_size": 32, "logging_steps": 1}
        trainer = Trainer(
            model=copy.deepcopy(encoder.transformers_model), args=arguments(tmp_path, **options), train_dataset=rows
        )
        trainer.add_callback(CompressionCallback(recipe))
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    added = first_loss(recipe) - first_loss(prune(0.0))
    assert added == pytest.approx((term(phrases(seed=1)) + term(phrases(seed=2))) / 2, rel=1e-4)


@pytest.mark.parametrize("door", ["callback", "attach"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_trl_sft(tmp_path, door, adapters):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    model = tiny_llama()
    args = trl.SFTConfig(
        str(tmp_path / "run"), **OPTIONS, max_steps=8, max_length=16, bf16=False, gradient_accumulation_steps=2
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"text": phrases()}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(**LORA) if adapters else None,
    )
    if door == "attach":
        attach_trainer(trainer, {"stage": [*prune()["stage"], KL, INT8]})
    else:
        trainer.add_callback(CompressionCallback({"stage": [*prune()["stage"], INT8]}))
    trainer.train()
    if adapters:
        model = trainer.model.merge_and_unload()
        model.save_pretrained(tmp_path / "saved")
    else:
        trainer.save_model(tmp_path / "saved")
    assert exact_zeros(model)
    assert is_sparse(tmp_path / "saved")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same_state(model, opened)
    batch = torch.stack([row["input_ids"] for row in sentences(4)])
    with torch.no_grad():
        assert torch.equal(model.eval()(batch).logits, opened.eval()(batch).logits)


def test_trl_adds_what_a_plain_trainer_adds(tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    tiny_llama(seed=4).save_pretrained(tmp_path / "teacher")
    recipe = {"stage": [KL | {"teacher": str(tmp_path / "teacher")}]}
    rows = [{"input_ids": tokenizer()(text)["input_ids"] + [2]} for text in phrases(8)]
    options = OPTIONS | {"max_steps": 1, "logging_steps": 1}

    def sft(attach):
        args = trl.SFTConfig(str(tmp_path / "run"), **options, bf16=False)
        trainer = trl.SFTTrainer(
            model=tiny_llama(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
        )
        attach(trainer)
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    plain = Trainer(
        model=tiny_llama(),
        args=arguments(tmp_path, **options),
        train_dataset=[{**row, "labels": row["input_ids"]} for row in rows],
    )
    attach_trainer(plain, recipe)
    plain.train()
    assert sft(lambda trainer: attach_trainer(trainer, recipe)) == pytest.approx(
        plain.state.log_history[0]["loss"], rel=1e-5
    )
    with pytest.raises(SessionError, match="attach_trainer"):
        sft(lambda trainer: trainer.add_callback(CompressionCallback(recipe)))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_on_a_base_that_is_pruned_while_they_train(tmp_path, kind):
    adapted = get_peft_model(tiny_llama(), LoraConfig(**LORA, use_dora=kind == "dora"))
    trainer = Trainer(model=adapted, args=arguments(tmp_path / "run"), train_dataset=texts())
    trainer.add_callback(CompressionCallback({"stage": [*prune()["stage"], KL, INT8]}))
    trainer.train()
    factors = [weight for name, weight in adapted.named_parameters() if "lora_" in name]
    assert factors
    assert all((weight != 0).all() for weight in factors)
    kept = copy.deepcopy(adapted)
    for safe in (False, True):
        merged = copy.deepcopy(kept).merge_and_unload(safe_merge=safe)
        assert exact_zeros(merged)
        q = merged.model.layers[0].self_attn.q_proj.weight
        assert not torch.equal(q, kept.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight)
    merged.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert set(config["pruned"]) == set(linear_weights(merged))
    assert is_sparse(tmp_path / "saved")
    assert same_state(merged, LlamaForCausalLM.from_pretrained(tmp_path / "saved"))
    # merged in place and taken out again, the zeros stay as well
    before = copied(kept)
    kept.merge_adapter()
    kept.unmerge_adapter()
    for name, weight in kept.state_dict().items():
        if "base_layer" in name:
            assert torch.equal(weight == 0, before[name] == 0)
    base = kept.unload()
    base.save_pretrained(tmp_path / "base")
    assert is_sparse(tmp_path / "base")


def test_a_run_with_adapters_resumes_bit_identical(tmp_path):
    """Its checkpoints hold the adapters only, and the masks beside the optimizer."""

    def run(resume=None):
        adapted = get_peft_model(tiny_llama(), LoraConfig(**LORA))
        args = arguments(tmp_path / "run", save_strategy="steps", save_steps=5)
        trainer = Trainer(model=adapted, args=args, train_dataset=texts())
        trainer.add_callback(CompressionCallback({"stage": [*prune()["stage"], KL, INT8]}))
        trainer.train(resume_from_checkpoint=resume)
        return adapted

    whole = run()
    assert same_state(whole, run(str(tmp_path / "run" / "checkpoint-5")))


def test_an_opened_artifact_under_adapters_keeps_its_zeros_when_they_are_merged(tmp_path):
    sparsehooks.compress(tiny_llama(), prune(), out=tmp_path / "a")
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "a"), LoraConfig(**LORA))
    trainer = Trainer(model=adapted, args=arguments(tmp_path / "run"), train_dataset=texts())
    trainer.add_callback(CompressionCallback({"stage": [KL]}))
    trainer.train()
    assert exact_zeros(adapted.merge_and_unload())


def test_recipes_name_the_layers_of_the_model_under_the_adapters(tmp_path):
    adapted = get_peft_model(tiny_classifier(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    recipe = prune(0.5, targets=["bert.encoder.layer.*.attention.self.query", "*.output.dense"], exclude=[])
    trainer = Trainer(model=adapted, args=arguments(tmp_path), train_dataset=labelled())
    trainer.add_callback(CompressionCallback(recipe))
    trainer.train()
    merged = adapted.merge_and_unload()
    for name, weight in linear_weights(merged).items():
        pruned = "query" in name or "output.dense" in name
        assert int((weight == 0).sum()) == (weight.numel() // 2 if pruned else 0)
    assert not (merged.classifier.weight == 0).any()


def test_a_criterion_that_reads_gradients_refuses_frozen_weights(tmp_path):
    adapted = get_peft_model(tiny_llama(), LoraConfig(**LORA))
    trainer = Trainer(model=adapted, args=arguments(tmp_path), train_dataset=texts())
    trainer.add_callback(CompressionCallback(prune(prune="taylor")))
    with pytest.raises(PlanError, match=r"'taylor' decides by gradients, and none reaches .*q_proj.* frozen"):
        trainer.train()
