"""A name opens whatever stands under it."""

import pytest
import torch

from companion.cli.stages import is_quantized, open_model, open_tokenizer
from companion.errors import SourceUnavailable
from companion.formats.onnx.model import OnnxModel
from companion.qat.saved import save_quantized


def test_a_saved_and_an_exported_model_answer_alike(served_docs_lm, tmp_path):
    model, path = served_docs_lm
    folder = str(save_quantized(model, tmp_path))
    assert is_quantized(folder)
    ids = torch.arange(20).view(1, 20)
    saved, served = open_model(folder), open_model(str(path))
    assert isinstance(served, OnnxModel)
    assert torch.equal(saved(input_ids=ids).logits, model(input_ids=ids).logits)
    assert (served(ids).logits - model(input_ids=ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("text", ["{}", "not json"])
def test_other_folders_are_not_taken_for_quantized_models(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert not is_quantized(str(tmp_path))
    assert not is_quantized(str(tmp_path / "no"))


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(SourceUnavailable, match=r"tokenizer\.json belongs beside"):
        open_tokenizer(str(tmp_path / "model.onnx"))
