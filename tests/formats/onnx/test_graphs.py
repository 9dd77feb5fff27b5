"""Every family of decoders counts positions by the mask, and what no file can hold is refused."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

from companion import W4, convert, export_onnx, prepare_qat
from companion.data.biencoder import BiEncoder
from companion.errors import UnsupportedModel
from companion.formats.onnx.export import write_graph
from companion.formats.onnx.graphs import graph_of, tokens
from companion.formats.onnx.model import OnnxModel

TINY = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
SHARED = TINY | {"num_key_value_heads": 2}
GPT2 = TINY | {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
BLOOM = TINY | {"n_layer": 1, "n_head": 4}
SEEING = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip

FAMILIES = {
    "learned": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "learned, offset 2": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**TINY, ffn_dim=32, word_embed_proj_dim=32)
    ),
    "alibi": lambda: tf.BloomForCausalLM(tf.BloomConfig(**BLOOM)),
    "rotary": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SHARED)),
    "sliding window, softcap": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**SHARED, head_dim=8, sliding_window=4)
    ),
    "attention sinks, experts": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(
        **SHARED, head_dim=8, sliding_window=4, num_local_experts=2, num_experts_per_tok=1
    )),
    "latent attention": lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(
        **TINY, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=16, first_k_dense_replace=1
    )),
    "inside a model that sees": lambda: tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(
        text_config=SHARED | {"head_dim": 8}, vision_config=SEEING, mm_tokens_per_image=4
    )),
}  # fmt: skip

IDS = torch.randint(3, 128, (3, 9), generator=torch.Generator().manual_seed(0))
RIGHT = torch.tensor([9, 4, 6])[:, None].gt(torch.arange(9)).long()
LEFT = RIGHT.flip(1)
# Logits of these models are below 4, where float32 steps by 2e-7; a logit is the end of a chain of
# a dozen sums of at most 32 products, each of which may move it by a few such steps.
TOLERANCE = 1e-5


@cache
def model_of(family: str) -> nn.Module:
    """Converted, with weights large enough that positions matter."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return convert(prepare_qat(model, W4, "absmax", skip=skipped(model)))


def skipped(model: nn.Module) -> list[str]:
    inside = ("vision_tower", "experts", "router")
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    return [part for part in inside if part in names]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Each family's file is written once."""

    @cache
    def open_file(family: str) -> OnnxModel:
        folder: Path = tmp_path_factory.mktemp("family")
        return OnnxModel(export_onnx(model_of(family), folder / "model.onnx"), threads=1)

    return open_file


def in_two_pieces(file: OnnxModel, mask: torch.Tensor) -> torch.Tensor:
    """Logits where the second piece goes on from the keys and values of the first.

    On the left, one text is still all padding in the first.
    """
    names, past = [node.name for node in file._session.get_outputs()], file._no_past(len(IDS))
    past, found = {name: tensor.numpy() for name, tensor in past.items()}, []
    for begin, end in ((0, 5), (5, 9)):
        feed = {"input_ids": IDS[:, begin:end].numpy(), "attention_mask": mask[:, :end].numpy()}
        logits, *present = file._session.run(names, feed | past)
        past = dict(zip(past, present, strict=True))
        found.append(torch.from_numpy(logits))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_changes_nothing(served, family):
    """Against each text alone in PyTorch, at once and in two pieces."""
    model, file = model_of(family), served(family)
    for mask in (torch.ones_like(IDS), RIGHT, LEFT):
        for logits in (file(IDS, mask).logits, in_two_pieces(file, mask)):
            for ids, kept, found in zip(IDS, mask.bool(), logits, strict=True):
                with torch.no_grad():
                    alone = model(input_ids=ids[kept][None]).logits[0]
                assert (found[kept] - alone).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_goes_on_from_its_keys_and_values_as_in_transformers(served, family):
    file, steps = served(family), 8
    expected = model_of(family).generate(
        input_ids=IDS, attention_mask=LEFT, max_new_tokens=steps, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )[:, IDS.shape[1] :]  # fmt: skip
    session, mask, ids, found = file._session, LEFT, IDS, []
    names = [node.name for node in session.get_outputs()]
    past = {name: tensor.numpy() for name, tensor in file._no_past(len(IDS)).items()}
    for _ in range(steps):
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **past}
        logits, *present = session.run(names, feed)
        ids = torch.from_numpy(logits[:, -1].argmax(-1))[:, None]
        past = dict(zip(past, present, strict=True))
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        found.append(ids)
    assert torch.equal(torch.cat(found, dim=1), expected)
    for row, ids, mask in zip(expected, IDS[:, None], LEFT[:, None], strict=True):
        assert list(file.generate(ids, mask, max_new_tokens=steps, stop=False)) == row.tolist()


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_decoders_with_a_head_for_classes_answer_as_for_each_text_alone(tmp_path, kind):
    """Rotary embeddings once failed in ONNX Runtime for any batch but that of the trace."""
    torch.manual_seed(0)
    config = getattr(tf, f"{kind}Config")(**(GPT2 if kind == "GPT2" else SHARED), num_labels=3)
    model = getattr(tf, f"{kind}ForSequenceClassification")(config).eval()
    q = convert(prepare_qat(model, W4, "absmax", skip=["score"]))
    file = OnnxModel(export_onnx(q, tmp_path / "model.onnx"))
    assert file.loss_type == "ForSequenceClassification"
    for mask in (torch.ones_like(IDS), RIGHT, LEFT):
        logits = file(IDS * mask, mask).logits
        for ids, kept, found in zip(IDS, mask.bool(), logits, strict=True):
            with torch.no_grad():
                alone = q(input_ids=ids[kept][None]).logits[0]
            assert (found - alone).abs().max() < TOLERANCE


def test_an_encoder_with_rotary_positions(tmp_path):
    torch.manual_seed(0)
    config = tf.ModernBertConfig(
        **TINY, num_labels=3, cls_token_id=1, sep_token_id=2, local_attention=4
    )
    model = tf.ModernBertForTokenClassification(config).eval()
    file = OnnxModel(write_graph(model, tmp_path / "model.onnx"))
    for mask in (RIGHT, LEFT):
        with torch.no_grad():
            expected = model(input_ids=IDS, attention_mask=mask).logits[mask.bool()]
        assert (file(IDS, mask).logits[mask.bool()] - expected).abs().max() < TOLERANCE


def small(kind: str, name: str, **options) -> nn.Module:
    return getattr(tf, kind + name)(getattr(tf, kind + "Config")(**TINY | options))


BOTH = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "decoder_start_token_id": 2}  # fmt: skip
REFUSED = {
    "T5 encoder-decoder": lambda: small("T5", "ForConditionalGeneration", d_model=32, d_ff=32),
    "T5Model encoder-decoder": lambda: small("T5", "Model", d_model=32, d_ff=32),
    "Bart encoder-decoder": lambda: small("Bart", "ForConditionalGeneration", **BOTH),
    "Whisper encoder-decoder": lambda: small("Whisper", "ForConditionalGeneration", **BOTH),
    "Mamba recurrent": lambda: small("Mamba", "ForCausalLM"),
    "MambaModel recurrent": lambda: small("Mamba", "Model"),
    "Rwkv recurrent": lambda: tf.RwkvForCausalLM(tf.RwkvConfig(vocab_size=128, hidden_size=32,
                                                               num_hidden_layers=2)),
    "RecurrentGemma recurrent": lambda: small("RecurrentGemma", "ForCausalLM", lru_width=32,
                                              num_key_value_heads=1),
    "Lfm2 recurrent or other layers (conv)": lambda: small(
        "Lfm2", "ForCausalLM", num_key_value_heads=2, num_hidden_layers=2,
        layer_types=["conv", "full_attention"]),
    "OpenAIGPT gives no keys and values": lambda: small(
        "OpenAIGPT", "LMHeadModel", n_embd=32, n_layer=1, n_head=4, n_positions=64),
    "XLNet gives no keys and values": lambda: tf.XLNetLMHeadModel(
        tf.XLNetConfig(vocab_size=128, d_model=32, n_layer=1, n_head=4, d_inner=32)),
    "Llama 'dynamic'": lambda: small("Llama", "ForCausalLM",
                                     rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    "ViT 'pixel_values'": lambda: tf.ViTForImageClassification(tf.ViTConfig(**SEEING)),
    "Bert start_logits, end_logits": lambda: small("Bert", "ForQuestionAnswering"),
    "GPT2 model.config.pad_token_id = tokenizer.pad_token_id": lambda: tf.GPT2ForSequenceClassification(
        tf.GPT2Config(**GPT2 | {"pad_token_id": None})),
    "Sequential example=": lambda: nn.Sequential(nn.Linear(32, 2)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_file_can_hold_is_refused_with_its_cause_and_a_way_out(case):
    name, _, cause = case.partition(" ")
    with pytest.raises(UnsupportedModel) as caught:
        graph_of(REFUSED[case]().eval())
    message = str(caught.value)
    assert message.startswith(name)
    assert cause in message
    assert "\n" not in message
    assert any(way in message for way in ("save_quantized()", "example=", "pad_token_id ="))


def test_export_refuses_before_it_writes(tmp_path):
    model = convert(prepare_qat(REFUSED["T5 encoder-decoder"]().eval(), W4, "absmax"))
    with pytest.raises(UnsupportedModel, match="T5ForConditionalGeneration is an encoder-decoder"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_pytorch_cannot_trace_is_told_in_one_sentence(tmp_path):
    """MPT makes its mask out of lengths in a way that the exporter cannot follow."""
    model = tf.MptForCausalLM(
        tf.MptConfig(vocab_size=128, d_model=32, n_heads=4, n_layers=1, max_seq_len=64)
    )
    with pytest.raises(
        UnsupportedModel, match="MptForCausalLM cannot be traced for ONNX"
    ) as caught:
        write_graph(model.eval(), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 320


def test_kinds_of_files():
    bert = tf.BertModel(tf.BertConfig(**TINY)).eval()
    kinds = [graph_of(model, example).description.kind
             for model, example in ((bert, None), (BiEncoder(bert), None), (bert, IDS))]  # fmt: skip
    assert kinds == ["encoder", "retrieval", "module"]


def test_one_or_several_tokens():
    assert tokens(7) == (7,)
    assert tokens(np.array([9, 7, 9]).tolist()) == (7, 9)
