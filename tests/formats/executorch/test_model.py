"""`ExecuTorchModel` answers as the model that the file was made from, and refuses what it cannot do."""

import pytest

reason = "there is no wheel of ExecuTorch for this machine"
pytest.importorskip("executorch.runtime", reason=reason)

import torch  # noqa: E402
from torch import nn  # noqa: E402

from companion import QuantScheme, convert, export_executorch, prepare_qat  # noqa: E402
from companion.errors import DamagedFile, UnreadableBatch, UnsupportedModel  # noqa: E402
from companion.formats.executorch.export import as_served  # noqa: E402
from companion.formats.executorch.model import ExecuTorchModel  # noqa: E402
from tests import tiny  # noqa: E402

GROUPS = QuantScheme(4, 32, torch.bfloat16)
IDS = torch.tensor([[5, 9, 40, 7, 12, 100], [8, 3, 77, 21, 4, 6]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model of one layer, the one with inputs rounded as served, and the file.

    Its embedding is not rounded. In a rounded row the largest and the smallest value may be exactly opposite;
    then the zero point lies between two integers, and a last bit decides for the whole token.
    """
    q = convert(prepare_qat(tiny.llama(tiny.byte_level()), GROUPS, "absmax"))
    file = export_executorch(q, tmp_path_factory.mktemp("pte") / "llama.pte", max_length=16)
    return q, as_served(q), ExecuTorchModel(file), file


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(llama):
    """Float sums in another order are far below what rounding the inputs changes."""
    q, alike, served, _ = llama
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    found = served(input_ids=IDS, attention_mask=mask).logits
    margin = 0.1 * (q(IDS).logits - alike(IDS).logits).abs().mean()
    for row in range(2):
        kept = mask[row].bool()
        wanted = alike(IDS[row : row + 1, kept]).logits[0]
        assert (found[row, kept] - wanted).abs().mean() < margin
    assert served.vocabulary == found.shape[-1] == q.config.vocab_size


def test_it_goes_on_greedily_and_by_drawing(llama):
    _, alike, served, _ = llama
    prompt = IDS[:1]
    told = list(served.generate(prompt, max_new_tokens=8, stop=False))
    whole = alike.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert told == whole[0, 6:].tolist()
    drawn = [list(served.generate(prompt, max_new_tokens=8, temperature=2.0, seed=seed, stop=False))
             for seed in (0, 0, 1)]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(list(served.generate(prompt, max_new_tokens=99, stop=False))) == 10  # context of 16


def test_reading_something_else_in_between_is_not_remembered(llama):
    *_, served, _ = llama
    alone = list(served.generate(IDS[:1], max_new_tokens=6, stop=False))
    mixed = []
    for token in served.generate(IDS[:1], max_new_tokens=6, stop=False):
        mixed.append(token)
        served(IDS[1:])
    assert mixed == alone


def test_what_it_cannot_do_is_refused_in_a_sentence(llama, tmp_path):
    *_, served, file = llama
    with pytest.raises(UnreadableBatch, match="a text has 17 tokens, and the file takes 16"):
        served(torch.ones(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match="the prompt has 16 tokens"):
        served.generate(torch.ones(1, 16, dtype=torch.int64))
    with pytest.raises(UnreadableBatch, match="'token_type_ids', which ExecuTorchModel does not"):
        served(IDS, token_type_ids=torch.ones_like(IDS))
    with pytest.raises(UnsupportedModel, match="'decoder', and 'retrieval' is needed"):
        served.embed(IDS)
    with pytest.raises(DamagedFile, match="is missing: give the file"):
        ExecuTorchModel(tmp_path / "no.pte")
    half = tmp_path / "half.pte"
    half.write_bytes(file.read_bytes()[:900])
    with pytest.raises(DamagedFile, match=r"cannot be read .*: export it again"):
        ExecuTorchModel(half)


@torch.no_grad()
def test_a_plain_module_takes_the_shape_it_was_exported_for(tmp_path):
    torch.manual_seed(0)
    q = convert(prepare_qat(nn.Sequential(nn.Linear(64, 8)), GROUPS, "absmax"))
    x = torch.randn(3, 64)
    served = ExecuTorchModel(export_executorch(q, tmp_path / "layer.pte", example=x))
    assert torch.allclose(served(x), as_served(q)(x), atol=1e-5)
    with pytest.raises(UnreadableBatch, match=r"inputs of shape \(4, 64\).*exported for"):
        served(torch.randn(4, 64))
