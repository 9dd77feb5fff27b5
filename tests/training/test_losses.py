"""What training minimises, against torch and against arithmetic by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from companion import fit
from companion.training.losses import default_loss, distillation_loss


class Fixed(nn.Module):
    """Answers with given logits whatever it is asked."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return SimpleNamespace(logits=self.logits, loss=self.logits.sum() * 0 + 7.0)


BATCH = (torch.zeros(1, 2), torch.tensor([1]))


def linear(*weights):
    layer = nn.Linear(2, 2)
    layer.weight.data.zero_()
    layer.bias.data = torch.tensor(weights)
    return layer


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_distillation_by_hand(temperature, share):
    teacher, student = linear(math.log(3.0), 0.0), linear(0.0, 0.0)
    odds = 3 ** (1 / temperature)  # the flattened odds of the teacher's first class
    p = odds / (1 + odds)
    divergence = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    expected = share * temperature**2 * divergence + (1 - share) * math.log(2)
    loss = distillation_loss(teacher, temperature, share)(student, BATCH)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_divergence_is_forward_and_its_gradient_is_q_minus_p():
    teacher, student = linear(2.0, 0.0), linear(0.0, 0.5)
    distillation_loss(teacher)(student, BATCH).backward()
    p, q = torch.tensor([2.0, 0.0]).softmax(0), torch.tensor([0.0, 0.5]).softmax(0)
    assert torch.allclose(student.bias.grad, q - p, atol=1e-6)
    assert teacher.bias.grad is None


def test_padding_does_not_count():
    teacher, student = Fixed([[[1.0, 0.0], [9.0, 0.0]]]), Fixed([[[0.0, 0.0], [0.0, 9.0]]])
    batch = {"input_ids": torch.zeros(1, 2, dtype=torch.int64)}
    alone = distillation_loss(Fixed([[[1.0, 0.0]]]))(Fixed([[[0.0, 0.0]]]), batch)
    padded = batch | {"attention_mask": torch.tensor([[1, 0]])}
    assert torch.allclose(distillation_loss(teacher)(student, padded), alone)
    assert distillation_loss(teacher)(student, batch) > 2 * alone


def test_the_teacher_is_in_eval_mode_and_another_vocabulary_is_refused():
    teacher = nn.Sequential(nn.Dropout(0.5), linear(1.0, 0.0)).train()
    distillation_loss(teacher)
    assert not teacher.training
    with pytest.raises(ValueError, match=r"shape \(1, 3\), the model with \(1, 2\).*same head"):
        distillation_loss(nn.Linear(2, 3))(linear(0.0, 0.0), BATCH)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        distillation_loss(teacher, temperature=0)


def test_fit_with_a_teacher_learns_its_answers_not_the_labels():
    torch.manual_seed(0)
    teacher, student = nn.Linear(2, 3), nn.Linear(2, 3)
    x = torch.randn(32, 2)
    wrong = (x, (teacher(x).argmax(1) + 1) % 3)
    fit(student, [wrong], steps=200, lr=0.05, teacher=teacher, progress=False)
    assert torch.allclose(student(x).softmax(1), teacher(x).softmax(1), atol=0.02)
    with pytest.raises(ValueError, match="a teacher or a loss_fn, not both"):
        fit(student, [wrong], teacher=teacher, loss_fn=lambda m, b: default_loss(m, b))
