"""Folders of converted models opened by transformers itself, exactly and after checking."""

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from companion import W2, W3, W4, W4A8, QuantScheme, convert, fit, prepare_qat, to_torchao
from companion.errors import DamagedFile, NothingToTrain, UnsupportedModel, WrongStage
from companion.formats.hub import CONFIG, GENERATION, WEIGHTS
from tests import tiny

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(2))
SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
MODELS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, SMALL),
    "llama-tied": (hf.LlamaForCausalLM, hf.LlamaConfig, {**SMALL, "tie_word_embeddings": True}),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, GROUPED),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, GROUPED),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config,
             {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "classifier": (hf.BertForSequenceClassification, hf.BertConfig, {**SMALL, "num_labels": 3}),
    "tagger": (hf.BertForTokenClassification, hf.BertConfig, {**SMALL, "num_labels": 5}),
}  # fmt: skip
AUTO = {"classifier": hf.AutoModelForSequenceClassification,
        "tagger": hf.AutoModelForTokenClassification}  # fmt: skip


def made(name: str, dtype: torch.dtype = torch.float32) -> hf.PreTrainedModel:
    kind, config, settings = MODELS[name]
    torch.manual_seed(0)
    return kind(config(**settings)).to(dtype).eval()


def tied(scheme: QuantScheme = W4) -> hf.PreTrainedModel:
    return convert(prepare_qat(made("llama-tied"), scheme, embeddings=True))


open_ = hf.AutoModelForCausalLM.from_pretrained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_is_opened_computes_what_was_saved(tmp_path, name, embeddings, dtype):
    q = convert(prepare_qat(made(name, dtype), W4, embeddings=embeddings))
    q.save_pretrained(tmp_path)
    loaded, info = AUTO.get(name, hf.AutoModelForCausalLM).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info  # nothing missing, drawn, left over
    assert torch.equal(loaded(IDS).logits, q(IDS).logits)
    assert loaded.quantization == q.quantization
    assert loaded.config.dtype == loaded.dtype == dtype
    assert loaded.config.quantization_config.quant_method == "companion"
    assert {n: (t.dtype, t.tolist()) for n, t in loaded.state_dict().items()} == {
        n: (t.dtype, t.tolist()) for n, t in q.state_dict().items()
    }
    encoder = hf.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(encoder(IDS)[0], q.base_model(IDS)[0])
    assert {p.dtype for p in encoder.parameters()} == {dtype}  # of a pooler that is drawn, too
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "scheme", [W2, W3, W4A8, QuantScheme(5, None, torch.float32), QuantScheme(4, 64)], ids=str
)
def test_schemes_come_back_without_loss(tmp_path, scheme):
    q = tied(scheme)
    q.save_pretrained(tmp_path)
    loaded = open_(tmp_path)
    assert loaded.quantization.scheme == scheme
    assert torch.equal(loaded(IDS).logits, q(IDS).logits)


def test_a_tied_table_is_packed_once(tmp_path):
    tied().save_pretrained(tmp_path)
    names = load_file(tmp_path / WEIGHTS)
    assert "model.embed_tokens.integers" in names
    assert "lm_head.integers" not in names
    loaded = open_(tmp_path)
    assert loaded.lm_head.integers is loaded.model.embed_tokens.integers


def test_a_head_that_was_not_saved_is_tied_to_the_rounded_table(tmp_path):
    q = tied()
    q.model.save_pretrained(tmp_path)
    assert torch.equal(hf.LlamaForCausalLM.from_pretrained(tmp_path)(IDS).logits, q(IDS).logits)


def test_shards_settings_tokenizer_and_attention(tmp_path):
    tokenizer = tiny.byte_level()
    start = tiny.llama(tokenizer, attn_implementation="eager")
    start.generation_config = hf.GenerationConfig(max_new_tokens=3, eos_token_id=7, top_k=5)
    q = convert(prepare_qat(start, W4))
    q.save_pretrained(tmp_path, max_shard_size="5KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = open_(tmp_path)
    assert torch.equal(loaded(IDS).logits, q(IDS).logits)
    assert loaded.generation_config.to_dict() == start.generation_config.to_dict()
    assert loaded.config._attn_implementation == "eager"
    assert open_(tmp_path, attn_implementation="sdpa").config._attn_implementation == "sdpa"
    write = hf.pipeline("text-generation", model=str(tmp_path), tokenizer=str(tmp_path))
    assert write("the road")[0]["generated_text"].startswith("the road")


class Api:
    """Stands for the Hub: keeps what would be uploaded."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, repo_id, **options):
        self.repo_id = repo_id
        return self

    def create_branch(self, **options):
        raise AssertionError("none was asked for")

    def create_commit(self, *, operations, **options):
        for operation in operations:
            with operation.as_file() as file:
                (self.folder / operation.path_in_repo).write_bytes(file.read())


@pytest.mark.parametrize("call", ["push_to_hub", "save_pretrained"])
def test_what_is_uploaded_opens(tmp_path, monkeypatch, call):
    (tmp_path / "hub").mkdir()
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: Api(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    q = tied()
    if call == "push_to_hub":
        q.push_to_hub("owner/model")
    else:
        q.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="owner/model")
        assert torch.equal(open_(tmp_path / "local")(IDS).logits, q(IDS).logits)
    assert {CONFIG, GENERATION, WEIGHTS} <= {path.name for path in (tmp_path / "hub").iterdir()}
    assert torch.equal(open_(tmp_path / "hub")(IDS).logits, q(IDS).logits)


def test_the_trainer_writes_a_folder_that_opens_and_does_not_train(tmp_path):
    q = tied()
    q.save_pretrained(tmp_path / "start")
    data = [{"input_ids": row, "labels": row} for row in IDS]
    for model in (q, open_(tmp_path / "start")):
        arguments = hf.TrainingArguments(output_dir=str(tmp_path / "t"), report_to=[], use_cpu=True)
        trainer = hf.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
        assert trainer.evaluate()["eval_loss"] > 0
        trainer.save_model(str(tmp_path / "out"))
        assert torch.equal(open_(tmp_path / "out")(IDS).logits, q(IDS).logits)
        with pytest.raises(RuntimeError, match="does not require grad"):
            trainer.train()
        with pytest.raises(NothingToTrain):
            fit(model, [{"input_ids": IDS, "labels": IDS}], steps=1)
        with pytest.raises(WrongStage, match="converted already"):
            prepare_qat(model, W4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_type_is_what_to_gives(tmp_path, dtype):
    q = tied()
    q.save_pretrained(tmp_path)
    loaded = open_(tmp_path, dtype=dtype)
    assert loaded.dtype == loaded.config.dtype == dtype
    assert torch.equal(loaded(IDS).logits, q.to(dtype)(IDS).logits)


def test_devices_copies_and_pickles(tmp_path):
    q = tied()
    q.save_pretrained(tmp_path)
    expected = q(IDS).logits
    with pytest.raises(UnsupportedModel, match="offloaded to disk"):
        open_(tmp_path, device_map={"": "disk"})
    loaded = open_(tmp_path, device_map="cpu")
    assert torch.equal(open_(tmp_path, config=loaded.config)(IDS).logits, expected)
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(twin(IDS).logits, expected)
        twin.model.norm.weight.mul_(2)
        twin.save_pretrained(tmp_path / "twin")  # its own weights, not those it was copied from
        assert torch.equal(open_(tmp_path / "twin")(IDS).logits, twin(IDS).logits)
        assert not torch.equal(twin(IDS).logits, expected)
    assert not hasattr(to_torchao(loaded).config, "quantization_config")


def edit(folder, change):
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "weights": lambda f: flip(f / WEIGHTS),
    "weights truncated": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]),
    "settings": lambda f: edit(f, lambda c: c.update(rms_norm_eps=1e-3)),
    "scheme": lambda f: edit(f, lambda c: c["quantization_config"]["scheme"].update(weight_bits=3)),
    "generation missing": lambda f: (f / GENERATION).unlink(),
    "generation edited": lambda f: (f / GENERATION).write_text("{}"),
    "other file": lambda f: ((f / WEIGHTS).rename(f / "old") and tied(W2).save_pretrained(
        f / "other")) or (f / "other" / WEIGHTS).rename(f / WEIGHTS),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_from_pretrained_too(tmp_path, damage):
    tied().save_pretrained(tmp_path)
    DAMAGE[damage](tmp_path)
    with pytest.raises(DamagedFile, match=r"[Cc]opy"):
        open_(tmp_path)


def test_without_its_entry_the_folder_is_refused(tmp_path):
    tied().save_pretrained(tmp_path)
    edit(tmp_path, lambda config: config.pop("quantization_config"))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        open_(tmp_path)


def test_a_float_model_is_not_rounded_on_the_way(tmp_path):
    from companion.formats.quantizer import CompanionConfig

    made("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        open_(tmp_path, quantization_config=CompanionConfig())


def test_arguments_that_would_be_ignored_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither variant"):
        tied().save_pretrained(tmp_path, variant="fp16")
    tied().save_pretrained(tmp_path / "not", is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_a_model_is_freed_with_its_last_name(tmp_path):
    tied().save_pretrained(tmp_path)
    kept = []
    gc.disable()
    try:
        for model in (tied(), open_(tmp_path)):
            kept.append(weakref.ref(model.lm_head))
        del model
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()


def test_a_float_model_is_saved_as_ever(tmp_path):
    tied()  # the class is extended now
    made("llama").save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / CONFIG).read_text())
    assert torch.equal(open_(tmp_path)(IDS).logits, made("llama")(IDS).logits)
