"""A name opens whatever stands under it."""

import pytest
import torch
import transformers as tf

from companion import save_quantized
from companion.cli.stages import open_model, open_tokenizer
from companion.errors import SourceUnavailable
from companion.formats.hub import is_saved
from companion.formats.onnx.model import OnnxModel
from tests import tiny


def test_a_saved_and_an_exported_model_answer_alike(served_docs_lm, tmp_path):
    model, path = served_docs_lm
    folder = str(save_quantized(model, tmp_path))
    assert is_saved(folder)
    ids = torch.arange(20).view(1, 20)
    saved, served = open_model(folder), open_model(str(path))
    assert isinstance(served, OnnxModel)
    assert torch.equal(saved(input_ids=ids).logits, model(input_ids=ids).logits)
    assert (served(ids).logits - model(input_ids=ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("text", ["{}", "not json"])
def test_other_folders_are_not_taken_for_quantized_models(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert not is_saved(str(tmp_path))
    assert not is_saved(str(tmp_path / "no"))


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(SourceUnavailable, match=r"tokenizer\.json belongs beside"):
        open_tokenizer(str(tmp_path / "model.onnx"))
    with pytest.raises(SourceUnavailable, match="which is missing, too"):
        open_tokenizer(str(tmp_path / "no" / "model.onnx"))


def test_a_damaged_tokenizer_is_named(tmp_path):
    tokenizer = tiny.byte_level()
    folder = tiny.saved(tmp_path, tiny.llama(tokenizer), tokenizer)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(SourceUnavailable, match=r"tokenizer\.json belongs beside"):
        open_tokenizer(folder)


@pytest.mark.parametrize(("context", "most"), [(40, 40), (None, 64)])
def test_a_tokenizer_takes_no_more_than_its_model(tmp_path, context, most):
    tokenizer = tiny.byte_level()  # 64 tokens
    config = tf.RobertaConfig if context else tf.GPT2Config
    settings = {"max_position_embeddings": 42} if context else {"n_positions": 128}
    # RoBERTa counts positions from 2
    config(vocab_size=len(tokenizer), pad_token_id=1, **settings).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert open_tokenizer(str(tmp_path)).model_max_length == most
