"""``from_pretrained`` and ``save_pretrained`` of many architectures, with the options that transformers offers."""

from __future__ import annotations

import copy
import json
import shutil

import huggingface_hub
import pytest
import torch
from helpers import (
    expected_zeros,
    linear_weights,
    prune,
    same_state,
    sentences,
    tiny_bert,
    tiny_classifier,
    tiny_llama,
    zeros,
)
from safetensors.torch import load_file
from torch import distributed
from transformers import (
    AutoConfig,
    AutoModel,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    NomicBertConfig,
    NomicBertForMaskedLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2Model,
)
from transformers.distributed import DistributedConfig
from transformers.utils import hub

import sparsehooks
from sparsehooks import ArtifactError
from sparsehooks.artifact import loading
from sparsehooks.artifact.folder import installed_codecs
from sparsehooks.artifact.quantizer import SparseHooksConfig
from sparsehooks.components import LEVELS

TEXT = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
IMAGE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES = {
    # transformers merges the experts that lie in the file one by one
    "mixtral": (MixtralForCausalLM, lambda: MixtralConfig(**TEXT, **HEADS, num_local_experts=4)),
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        lambda: Qwen2MoeConfig(
            **TEXT, **HEADS, moe_intermediate_size=96, shared_expert_intermediate_size=96, num_experts=4
        ),
    ),
    "gpt2": (GPT2LMHeadModel, lambda: GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64)),
    # some weights stay float32 in a float16 model
    "t5": (
        T5ForConditionalGeneration,
        lambda: T5Config(vocab_size=128, d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4),
    ),
    "vit": (ViTForImageClassification, lambda: ViTConfig(**IMAGE, image_size=32, patch_size=8)),
    # names in the file are others than in the model, and renaming them twice would not do
    "nomic_bert": (NomicBertForMaskedLM, lambda: NomicBertConfig(**TEXT, num_attention_heads=4)),
    "clip": (CLIPVisionModel, lambda: CLIPVisionConfig(**IMAGE, image_size=32, patch_size=8)),
    # two models in one, each with conversions of its own
    "llava": (
        LlavaForConditionalGeneration,
        lambda: LlavaConfig(
            text_config=LlamaConfig(**TEXT, **HEADS),
            vision_config=CLIPVisionConfig(**IMAGE, image_size=32, patch_size=8),
            image_token_index=120,
        ),
    ),
    "wav2vec2": (
        Wav2Vec2Model,
        lambda: Wav2Vec2Config(
            **IMAGE,
            conv_dim=(32, 32),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        ),
    ),
}


def sparse(model, sparsity=0.9):
    """Every matrix of a model pruned by magnitude."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                threshold = parameter.abs().flatten().kthvalue(round(sparsity * parameter.numel())).values
                parameter.masked_fill_(parameter.abs() <= threshold, 0.0)
    return model.eval()


def make(name):
    cls, config = ARCHITECTURES[name]
    torch.manual_seed(0)
    return sparse(cls(config()))


def names(folder):
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_reopens_bit_for_bit_under_its_own_names(name, tmp_path):
    model, cls = make(name), ARCHITECTURES[name][0]
    model.save_pretrained(tmp_path / "dense")
    sparsehooks.save_pretrained(model, tmp_path / "a")
    assert sparsehooks.verify(tmp_path / "a").ratio < 0.15
    opened, report = cls.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert same_state(model, opened)
    assert not any(report.values())
    opened.save_pretrained(tmp_path / "again")
    assert same_state(model, cls.from_pretrained(tmp_path / "again"))
    sparsehooks.save_pretrained(opened, tmp_path / "shards", max_shard_size="20kB")
    sparsehooks.verify(tmp_path / "shards")
    assert same_state(model, cls.from_pretrained(tmp_path / "shards"))
    assert names(tmp_path / "a") == names(tmp_path / "again") == names(tmp_path / "dense")
    opened.dequantize()
    opened.save_pretrained(tmp_path / "dequantized")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert same_state(dense, load_file(tmp_path / "dequantized" / "model.safetensors"))


@pytest.mark.parametrize("name", ["mixtral", "t5", "nomic_bert"])
def test_a_dense_model_that_was_opened_saves_both_ways(name, tmp_path):
    make(name).save_pretrained(tmp_path / "dense")
    opened = ARCHITECTURES[name][0].from_pretrained(tmp_path / "dense")
    sparsehooks.save_pretrained(opened, tmp_path / "a")
    opened.save_pretrained(tmp_path / "dense again")
    assert names(tmp_path / "a") == names(tmp_path / "dense")
    first, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("dense", "dense again"))
    assert first == again


@pytest.mark.parametrize("asked", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "t5", "gpt2"])
def test_another_dtype_gives_what_the_dense_file_would(name, asked, tmp_path):
    model, cls = make(name), ARCHITECTURES[name][0]
    for stored in (torch.float32, torch.bfloat16):
        model.to(stored).save_pretrained(tmp_path / "dense")
        sparsehooks.save_pretrained(model, tmp_path / "a")
        dense, opened = (cls.from_pretrained(tmp_path / folder, dtype=asked) for folder in ("dense", "a"))
        assert same_state(dense, opened)
        assert same_state(model, cls.from_pretrained(tmp_path / "a"))


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_opens_keeps_signed_zeros_and_trains_further(level, tmp_path):
    model = sparsehooks.compress(tiny_bert(), prune(0.8))
    with torch.no_grad():
        weights = list(linear_weights(model).values())
        weights[0].mul_(torch.where(weights[0] == 0, -1.0, 1.0))
    sparsehooks.save_pretrained(model, tmp_path / "a", level=level, signed_zeros=True)
    opened = AutoModel.from_pretrained(tmp_path / "a")
    assert same_state(model, opened)
    gone = {name: weight == 0 for name, weight in linear_weights(opened).items()}
    optimizer = torch.optim.AdamW(opened.parameters(), lr=1e-2)
    with sparsehooks.attach(opened, optimizer, prune(0.9), total_steps=4):
        for row in sentences(4):
            opened(**{key: value[None] for key, value in row.items()}).last_hidden_state.square().mean().backward()
            optimizer.step()
    assert not same_state(model, opened)
    assert not any((weight[gone[name]] != 0).any() for name, weight in linear_weights(opened).items())
    assert zeros(opened) == expected_zeros(opened, 0.9)


@pytest.mark.parametrize("name", ["mixtral", "nomic_bert", "t5"])
def test_a_base_model_opens_from_a_task_model(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "dense")
    sparsehooks.save_pretrained(model, tmp_path / "a")
    dense, opened = (AutoModel.from_pretrained(tmp_path / folder) for folder in ("dense", "a"))
    assert same_state(dense, opened)
    dense.save_pretrained(tmp_path / "dense base")
    opened.save_pretrained(tmp_path / "base")
    assert names(tmp_path / "base") == names(tmp_path / "dense base")
    assert same_state(dense, AutoModel.from_pretrained(tmp_path / "base"))


def test_a_task_model_opens_from_a_base_model(tmp_path):
    sparsehooks.save_pretrained(sparse(tiny_bert()), tmp_path / "a")
    opened, report = BertForSequenceClassification.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert same_state(sparse(tiny_bert()), opened.bert)
    assert report["missing_keys"] == {"classifier.weight", "classifier.bias"}


OFFLOADED = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
OFFLOADED |= {"model.rotary_emb": "cpu", "lm_head": "disk"}


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("kind", ["untied", "tied", "mixtral"])
def test_weights_may_stay_on_the_disk(kind, tmp_path):
    model = make("mixtral") if kind == "mixtral" else sparse(tiny_llama(tied=kind == "tied"))
    sparsehooks.save_pretrained(model, tmp_path / "a")
    opened = type(model).from_pretrained(tmp_path / "a", device_map=OFFLOADED, offload_folder=tmp_path / "offload")
    assert opened.model.layers[1].self_attn.q_proj.weight.is_meta
    tokens = sentences(1)[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(opened(tokens).logits, model(tokens).logits)
    opened.save_pretrained(tmp_path / "again")
    assert same_state(model, type(model).from_pretrained(tmp_path / "again"))


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_every_way_to_read_a_file_opens_it(name, tmp_path, monkeypatch):
    model, cls = make(name), ARCHITECTURES[name][0]
    sparsehooks.save_pretrained(model, tmp_path / "a")
    for options in ({"device_map": "auto"}, {"device_map": "cpu"}, {"device_map": {"": 0}}, {"disable_mmap": True}):
        if options == {"device_map": {"": 0}} and not torch.cuda.is_available():
            continue
        assert same_state(model, cls.from_pretrained(tmp_path / "a", **options))
    config, state = AutoConfig.from_pretrained(tmp_path / "a"), load_file(tmp_path / "a" / "model.safetensors")
    assert same_state(model, cls.from_pretrained(None, config=config, state_dict=state))
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    assert same_state(model, cls.from_pretrained(tmp_path / "a"))


def test_a_dense_model_can_be_opened_to_be_saved_sparse(tmp_path):
    model = make("mixtral")
    model.save_pretrained(tmp_path / "dense")
    opened = MixtralForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=SparseHooksConfig())
    opened.save_pretrained(tmp_path / "a")
    assert sparsehooks.inspect(tmp_path / "a").ratio < 0.15
    assert same_state(model, MixtralForCausalLM.from_pretrained(tmp_path / "a"))


def test_a_copy_of_an_opened_model_saves_like_it(tmp_path):
    model = make("mixtral")
    sparsehooks.save_pretrained(model, tmp_path / "a")
    opened = MixtralForCausalLM.from_pretrained(tmp_path / "a")
    copy.deepcopy(opened).save_pretrained(tmp_path / "b")
    torch.save(opened, tmp_path / "pickled.pt")
    torch.load(tmp_path / "pickled.pt", weights_only=False).save_pretrained(tmp_path / "c")
    for folder in "bc":
        assert sparsehooks.inspect(tmp_path / folder) == sparsehooks.inspect(tmp_path / "a")
        assert same_state(model, MixtralForCausalLM.from_pretrained(tmp_path / folder))


def test_another_size_is_reported_or_starts_afresh(tmp_path):
    model = sparse(tiny_classifier())
    sparsehooks.save_pretrained(model, tmp_path / "a")
    for name, options in (("classifier.weight", {"num_labels": 5}), ("word_embeddings.weight", {"vocab_size": 200})):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            BertForSequenceClassification.from_pretrained(tmp_path / "a", **options)
        opened, report = BertForSequenceClassification.from_pretrained(
            tmp_path / "a", ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
        afresh = {key for key, *_ in report["mismatched_keys"]}
        assert any(name in key for key in afresh)
        rest = {key: tensor for key, tensor in opened.state_dict().items() if key not in afresh}
        assert same_state(rest, {key: model.state_dict()[key] for key in rest})
        assert all(bool(tensor.isfinite().all()) for tensor in opened.state_dict().values())


def test_a_name_that_is_renamed_by_mistake_is_decoded_too(tmp_path):
    model = sparse(tiny_llama())
    sparsehooks.save_pretrained(model, tmp_path / "a")
    mapping = {"down_proj": "nowhere"}  # transformers goes back to the name in the file
    assert same_state(model, LlamaForCausalLM.from_pretrained(tmp_path / "a", key_mapping=mapping))
    half = LlamaForCausalLM.from_pretrained(tmp_path / "a", key_mapping=mapping, dtype=torch.float16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_a_codec_that_is_missing_is_one_sentence(name, tmp_path, monkeypatch):
    sparsehooks.save_pretrained(make(name), tmp_path / "a")
    codecs = {key: codec for key, codec in installed_codecs().items() if codec.role == "values"}
    monkeypatch.setattr(loading, "installed_codecs", lambda: codecs)
    with pytest.raises(ArtifactError, match=r"install the plugin that offers it$"):
        ARCHITECTURES[name][0].from_pretrained(tmp_path / "a")


def test_a_blob_that_would_decode_to_gigabytes_is_refused(tmp_path, monkeypatch):
    sparsehooks.save_pretrained(make("mixtral"), tmp_path / "a")
    monkeypatch.setattr(loading, "MAX_BYTES", 0)
    monkeypatch.setattr(loading, "MAX_EXPANSION", 2)
    with pytest.raises(ArtifactError, match="more than the limit"):
        MixtralForCausalLM.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_every_damaged_tensor_is_one_sentence(name, tmp_path):
    sparsehooks.save_pretrained(make(name), tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    entries = json.loads(whole[8:start])
    del entries["__metadata__"]
    for number, entry in enumerate(entries.values()):
        first, last = entry["data_offsets"]
        at = start + (first, (first + last) // 2, last - 1)[number % 3]
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ArtifactError, match="damaged") as raised:
            ARCHITECTURES[name][0].from_pretrained(tmp_path / "a")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("options", [{"tp_size": 1}, {"fsdp_size": 1}, {"tp_plan": "auto"}], ids=str)
def test_loading_pieces_of_tensors_is_refused(options, tmp_path):
    sparsehooks.save_pretrained(sparse(tiny_llama()), tmp_path / "a")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ArtifactError, match=r"run 'sparsehooks decompress' and load the dense folder$"):
            LlamaForCausalLM.from_pretrained(tmp_path / "a", distributed_config=DistributedConfig(**options))
    finally:
        distributed.destroy_process_group()


def test_wrong_uses_are_refused_by_transformers(tmp_path):
    sparsehooks.save_pretrained(sparse(tiny_llama()), tmp_path / "a")
    with pytest.raises(ValueError, match="SparseHooksConfig but you are passing a BitsAndBytesConfig"):
        LlamaForCausalLM.from_pretrained(tmp_path / "a", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(ValueError, match="offload_folder"):
        LlamaForCausalLM.from_pretrained(tmp_path / "a", device_map=OFFLOADED)
    with pytest.raises(OSError, match="no file named"):
        LlamaForCausalLM.from_pretrained(tmp_path / "a", use_safetensors=False)


# ------------------------------------------------------------------------------------------------------ the Hub


@pytest.fixture
def pushed(monkeypatch, tmp_path):
    """The folder that a push fills, under the name of the repository; there is no network."""

    def create_commit(self, repo_id, operations, **_):
        for operation in operations:
            target = tmp_path / "hub" / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(operation.path_or_fileobj, target)

    def create_repo(self, repo_id, **_):
        owned = repo_id if "/" in repo_id else f"me/{repo_id}"
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{owned}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    card = huggingface_hub.ModelCard("---\nlicense: mit\n---\n")
    monkeypatch.setattr(hub.ModelCard, "load", lambda *_, **__: card)
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["mixtral", "t5"])
def test_a_push_uploads_the_sparse_form_and_all_of_it(name, tmp_path, pushed):
    model, cls = make(name), ARCHITECTURES[name][0]
    sparsehooks.save_pretrained(model, tmp_path / "a")
    cls.from_pretrained(tmp_path / "a").push_to_hub("me/whole")
    cls.from_pretrained(tmp_path / "a").push_to_hub("me/shards", max_shard_size="20kB")
    sparsehooks.save_pretrained(model, tmp_path / "small", level="small", push_to_hub=True)
    sparsehooks.save_pretrained(model, tmp_path / "b", push_to_hub=True, repo_id="me/named")
    for repository in ("me/whole", "me/shards", "me/small", "me/named"):
        assert sparsehooks.verify(pushed / repository).ratio < 0.15
        assert same_state(model, cls.from_pretrained(pushed / repository))
        local = {"me/whole": "a", "me/small": "small", "me/named": "b"}.get(repository)
        if local:
            there, here = (
                {path.name for path in folder.iterdir()} for folder in (pushed / repository, tmp_path / local)
            )
            assert there == here | {"README.md"}
