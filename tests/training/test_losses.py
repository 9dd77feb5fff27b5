"""What training minimises, against torch and against arithmetic by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from companion import fit
from companion.errors import NothingToTrain, UnsupportedModel
from companion.training.losses import count_scored, default_loss, distillation_loss


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


def tokens(loss_type: str | None = None, width: int = 5, seed: int = 0) -> nn.Module:
    """Answers each token by itself; `loss_type` as transformers names it."""
    torch.manual_seed(seed)
    net = nn.Embedding(20, width)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, input_ids, attention_mask=None, labels=None):
            return SimpleNamespace(logits=self.net(input_ids), loss=None)

    model = Model()
    if loss_type:
        model.loss_type = loss_type
    return model


def divergence(student, teacher, ids, places):
    """KL(teacher || student), averaged over (row, column) places."""
    p, q = (m(ids).logits.log_softmax(-1) for m in (teacher, student))
    return sum((p[at].exp() * (p[at] - q[at])).sum() for at in places) / len(places)


IDS = torch.arange(12).view(2, 6)
PROMPTED = IDS.clone()
PROMPTED[0, :3] = PROMPTED[1, :5] = -100


@pytest.mark.parametrize(
    ("loss_type", "places"),
    [
        (None, [(0, 2), (0, 3), (0, 4), (1, 4)]),
        ("ForCausalLM", [(0, 2), (0, 3), (0, 4), (1, 4)]),
        ("ForTokenClassification", [(0, 3), (0, 4), (0, 5), (1, 5)]),
        ("ForMaskedLM", [(0, 3), (0, 4), (0, 5), (1, 5)]),
    ],
)
def test_prompts_are_not_imitated(loss_type, places):
    """The prediction at t is scored by the label of t + 1, or of t where nothing is shifted."""
    student, teacher = tokens(loss_type), tokens(seed=1)
    loss_fn = distillation_loss(teacher)
    batch = {"input_ids": IDS, "labels": PROMPTED, "attention_mask": torch.ones_like(IDS)}
    loss = loss_fn(student, batch)
    # means of four sums of five terms below 2: 20 * 2**-24 of their size
    assert loss.item() == pytest.approx(divergence(student, teacher, IDS, places).item(), rel=2e-6)
    loss.backward()
    moved = {
        divmod(place, 6)
        for place in student.net.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    }
    assert moved == set(places)
    assert count_scored(loss_fn, student, batch) == 4


def test_padding_that_has_labels_is_not_imitated():
    student, teacher = tokens(), tokens(seed=1)
    batch = {"input_ids": IDS, "labels": IDS, "attention_mask": (IDS < 10).long()}
    places = [(0, t) for t in range(5)] + [(1, t) for t in range(3)]
    loss = distillation_loss(teacher)(student, batch)
    assert loss.item() == pytest.approx(divergence(student, teacher, IDS, places).item(), rel=2e-6)


def test_encoder_decoders_do_not_shift_and_mask_by_their_labels():
    """Their attention mask is of other tokens, those of the encoder."""
    student, teacher = tokens("ForConditionalGeneration"), tokens(seed=1)
    student.config = SimpleNamespace(is_encoder_decoder=True)
    batch = {"input_ids": IDS, "labels": PROMPTED, "attention_mask": torch.zeros(2, 6)}
    places = [(0, 3), (0, 4), (0, 5), (1, 5)]
    loss = distillation_loss(teacher)(student, batch)
    assert loss.item() == pytest.approx(divergence(student, teacher, IDS, places).item(), rel=2e-6)


def test_without_labels_every_token_counts_that_is_no_padding():
    student, teacher = tokens(), tokens(seed=1)
    loss_fn = distillation_loss(teacher)
    batch = {"input_ids": IDS}
    places = [(row, t) for row in range(2) for t in range(6)]
    expected = divergence(student, teacher, IDS, places).item()
    assert loss_fn(student, batch).item() == pytest.approx(expected, rel=4e-6)  # 60 terms
    assert count_scored(loss_fn, student, batch) == 12
    batch["attention_mask"] = (IDS < 10).long()
    expected = divergence(student, teacher, IDS, places[:10]).item()
    assert loss_fn(student, batch).item() == pytest.approx(expected, rel=4e-6)
    assert count_scored(loss_fn, student, batch) == 10


@pytest.mark.parametrize("labels", [[0, 1], [-100, -100]])
def test_labels_do_not_matter_to_the_imitation_of_classifiers(labels):
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.int64), "labels": torch.tensor(labels)}
    teacher, student = Fixed([[1.0, 0.0], [2.0, 0.0]]), Fixed([[0.0, 0.0], [0.0, 0.0]])
    expected = distillation_loss(teacher)(student, {"input_ids": batch["input_ids"]})
    loss_fn = distillation_loss(teacher)
    assert torch.equal(loss_fn(student, batch), expected)
    assert count_scored(loss_fn, student, batch) == 2


def test_pixels_are_classified_along_the_second_dimension():
    student, teacher = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1)
    x, y = torch.randn(2, 1, 4, 4), torch.randint(3, (2, 4, 4))
    y[:, 0] = -100
    p, q = (m(x).log_softmax(1) for m in (teacher, student))
    expected = (p.exp() * (p - q)).sum(1)[y != -100].mean()
    loss_fn = distillation_loss(teacher)
    assert loss_fn(student, (x, y)).item() == pytest.approx(expected.item(), rel=6e-6)  # 72 terms
    assert count_scored(loss_fn, student, (x, y)) == 24


def test_what_cannot_be_imitated_is_said():
    teacher, student = tokens(), tokens()
    bare = {"input_ids": IDS, "labels": torch.full_like(IDS, -100)}
    with pytest.raises(NothingToTrain, match="no prediction of the batch is scored"):
        distillation_loss(teacher)(student, bare)
    with pytest.raises(NothingToTrain, match="the teacher is the model itself"):
        distillation_loss(teacher)(teacher, {"input_ids": IDS})
    with pytest.raises(NothingToTrain, match="put 'labels' into the batch"):
        distillation_loss(teacher, share=0.5)(student, {"input_ids": IDS})
    with pytest.raises(ValueError, match="give one label for each"):
        distillation_loss(teacher)(student, {"input_ids": IDS, "labels": IDS[:, 1:]})
    teacher.forward = lambda input_ids: SimpleNamespace(start_logits=None)
    with pytest.raises(UnsupportedModel, match="answers without logits"):
        distillation_loss(teacher)(student, {"input_ids": IDS})


def test_a_teacher_answers_in_eval_mode_whoever_trains_it_and_shared_layers_stay_in_train_mode():
    shared = nn.Dropout(0.5)
    teacher, student = (
        nn.Sequential(shared, linear(1.0, 0.0)),
        nn.Sequential(shared, linear(0.0, 0.0)),
    )
    loss_fn = distillation_loss(teacher)
    teacher.train()
    loss = loss_fn(student.train(), BATCH)
    assert torch.equal(loss, loss_fn(student, BATCH))
    assert shared.training


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ((torch.zeros(3, 2), torch.tensor([0, -100, 1])), 2),
        ((torch.zeros(3, 2), torch.zeros(3, 2)), 3),  # shares of classes
        ({"labels": torch.tensor([0, -100, 1])}, 2),
        ({"labels": PROMPTED}, 4),
        ({"labels": torch.zeros(3, 2)}, 3),  # several classes at once, or numbers
        ({"input_ids": IDS}, 2),
        ("nothing to count", 1),
    ],
)
def test_what_a_loss_is_a_mean_over(batch, count):
    assert count_scored(default_loss, nn.Identity(), batch) == count
