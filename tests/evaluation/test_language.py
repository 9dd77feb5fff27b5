from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from companion import perplexity, recovery
from companion.course.pretrain import new_docs_lm
from companion.errors import EmptyLoader
from companion.evaluation.language import (
    DocumentLosses,
    as_perplexity,
    document_losses,
    loss_difference,
)


class Fixed(nn.Module):
    """Gives every position the same scores."""

    def __init__(self, scores):
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.dropout(self.scores).expand(*input_ids.shape, -1))


def losses(*values, tokens=10):
    return DocumentLosses(np.array(values, float) * tokens, np.full(len(values), tokens))


def test_perplexity_is_that_of_the_formula_weighted_by_tokens():
    scores = torch.tensor([0.0, 1.0, 2.0])
    ids = torch.tensor([[0, 1, 2, 2], [0, 0, 1, 1]])
    labels = ids.clone()
    labels[1, 2:] = -100
    model = Fixed(scores).train()
    estimate = perplexity(model, [{"input_ids": ids, "labels": labels}])
    logp = scores.log_softmax(0)
    expected = torch.exp(-(logp[1] + logp[2] + logp[2] + logp[0]) / 4)
    assert estimate.value == pytest.approx(expected.item(), rel=1e-6)
    assert estimate.n == 2
    assert model.training


def test_it_is_the_loss_transformers_computes():
    model = new_docs_lm(num_hidden_layers=1).eval()
    ids = torch.randint(1, 4096, (3, 20), generator=torch.Generator().manual_seed(0))
    ours = document_losses(model, [{"input_ids": ids, "labels": ids}])
    assert ours.mean == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_rows_of_one_document_belong_together_across_batches():
    ids = torch.zeros(4, 5, dtype=torch.int64)
    batches = [
        {"input_ids": ids[:2], "labels": ids[:2], "document": torch.tensor([0, 1])},
        {"input_ids": ids[2:], "labels": ids[2:], "document": torch.tensor([1, 2])},
    ]
    found = document_losses(Fixed(torch.zeros(7)), batches)
    assert found.tokens.tolist() == [4, 8, 4]
    assert found.loss == pytest.approx(np.array([4, 8, 4]) * np.log(7))
    without = document_losses(
        Fixed(torch.zeros(7)), [{k: b[k] for k in ("input_ids", "labels")} for b in batches]
    )
    assert without.tokens.tolist() == [4, 4, 4, 4]


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        tokens = rng.integers(20, 60, 150)
        sample = DocumentLosses(tokens * rng.normal(2.0, 0.3, 150), tokens)
        estimate = as_perplexity(sample)
        covered.append(estimate.low <= np.exp(2.0) <= estimate.high)
    assert 0.9 < np.mean(covered) < 0.99


def test_pairing_cancels_what_documents_share():
    difficulty = np.random.default_rng(1).normal(3.0, 1.0, 80)
    first, second = losses(*(difficulty + 0.05)), losses(*difficulty)
    difference = loss_difference(first, second)
    assert difference.value == pytest.approx(0.05)
    assert difference.high - difference.low < 1e-9
    alone = as_perplexity(first)
    assert alone.high - alone.low > 1


def test_different_documents_are_refused():
    with pytest.raises(ValueError, match="same documents"):
        loss_difference(losses(1.0, 2.0), losses(1.0, 2.0, tokens=11))


def test_recovery_follows_its_definition():
    rng = np.random.default_rng(2)
    control = rng.normal(3.0, 0.5, 60)
    ptq, qat = control + rng.normal(0.4, 0.05, 60), control + rng.normal(0.1, 0.05, 60)
    result = recovery(losses(*control), losses(*ptq), losses(*qat))
    expected = (ptq.mean() - qat.mean()) / (ptq.mean() - control.mean())
    assert result.share.value == pytest.approx(expected)
    assert result.share.low < expected < result.share.high
    assert result.damage.value == pytest.approx((ptq - control).mean())


def test_nothing_to_recover_where_rounding_did_no_clear_damage():
    rng = np.random.default_rng(3)
    control = rng.normal(3.0, 0.5, 40)
    result = recovery(
        losses(*control), losses(*(control + rng.normal(0, 0.1, 40))), losses(*control)
    )
    assert result.share is None
    assert str(result).startswith("nothing to recover")


@pytest.mark.parametrize(
    "batches",
    [[], [{"input_ids": torch.zeros(1, 3, dtype=torch.int64), "labels": torch.full((1, 3), -100)}]],
)
def test_nothing_to_score_is_an_error(batches):
    with pytest.raises(EmptyLoader, match="no token"):
        perplexity(Fixed(torch.zeros(7)), batches)
