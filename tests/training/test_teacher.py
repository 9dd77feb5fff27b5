"""A teacher's stored answers: the same loss as with the teacher, found by rows, refused otherwise."""

import shutil

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from companion import fit
from companion.data.text import Rows
from companion.errors import CheckpointError, EmptyLoader, NothingToTrain, UnreadableBatch
from companion.evaluation import logits as module
from companion.evaluation.logits import LazyLogits
from companion.training import teacher as stored
from companion.training.chunked import Imitation, TopK, chunked_loss
from companion.training.losses import distillation_loss
from companion.training.teacher import Answers, store_teacher, stored_distillation_loss

WORDS = 96
IDS = torch.randint(3, WORDS, (6, 9), generator=torch.Generator().manual_seed(0))
LABELS = IDS.clone()
LABELS[:, :4] = LABELS[1, 4:7] = LABELS[5] = -100
BATCH = {"input_ids": IDS, "labels": LABELS}


def llama(seed: int) -> nn.Module:
    config = hf.LlamaConfig(vocab_size=WORDS, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                            num_attention_heads=2, initializer_range=0.3)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return hf.LlamaForCausalLM(config).eval()


TEACHER = llama(0)


def rows(*numbers, batch=BATCH):
    return {name: column[list(numbers)] for name, column in batch.items()}


def store(folder, loader=(BATCH,), k=8, teacher=TEACHER, **options):
    return store_teacher(teacher, loader, folder, k, progress=False, **options)


def derived(loss_fn, batch=BATCH, seed=1):
    student = llama(seed)
    loss = loss_fn(student, batch)
    return loss.detach(), torch.autograd.grad(loss, list(student.parameters()))


def assert_same(one, other):
    assert torch.allclose(one[0], other[0], rtol=1e-6)
    for a, b in zip(one[1], other[1], strict=True):
        assert torch.allclose(a, b, atol=1e-6 * float(a.abs().max()) + 1e-9)


@pytest.fixture(params=[True, False], ids=["lazy", "whole"])
def lazy(request, monkeypatch):
    """Logits in small pieces, or all at once, as of a model that nothing can be put off in."""
    monkeypatch.setattr(module, "PIECE_BYTES", 4 * WORDS * 5)
    if not request.param:
        monkeypatch.setattr(module, "_output_layer", lambda model: None)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(("temperature", "share"), [(1.0, 1.0), (2.0, 0.4)])
def test_with_all_tokens_it_is_the_teacher_itself(tmp_path, lazy, temperature, share, reverse):
    folder = store(tmp_path, k=None, temperature=temperature)
    online = derived(distillation_loss(TEACHER, temperature, share, reverse=reverse))
    assert_same(derived(stored_distillation_loss(folder, share, reverse=reverse)), online)


def by_hand(reverse: bool, k: int, temperature: float):
    """The divergence between k + 1 outcomes, out of softmax outputs."""

    def loss(student, batch):
        with torch.no_grad():
            p = TEACHER(batch["input_ids"]).logits
        kept = F.pad(batch["labels"][:, 1:] != -100, (0, 1))
        p, q = (
            (t[kept] / temperature).softmax(-1) for t in (p, student(batch["input_ids"]).logits)
        )
        top = p.topk(k).indices
        p, q = (
            torch.cat([t.gather(1, top), 1 - t.gather(1, top).sum(1, keepdim=True)], 1)
            for t in (p, q)
        )
        p, q = (q, p) if reverse else (p, q)
        return temperature**2 * (p * (p / q).log()).sum(1).mean()

    return loss


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_the_rest_is_one_bucket(tmp_path, lazy, reverse):
    folder = store(tmp_path, k=5, temperature=1.5)
    loss, gradients = derived(stored_distillation_loss(folder, reverse=reverse))
    expected, by_autograd = derived(by_hand(reverse, 5, 1.5))
    assert torch.allclose(loss, expected, rtol=1e-4)
    for a, b in zip(gradients, by_autograd, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))
    whole = derived(distillation_loss(TEACHER, 1.5, reverse=reverse))[0]
    assert loss < whole  # a lower bound


def test_both_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    inputs, weight, target = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 5, 4), (WORDS, 4), (2, 5, 4))
    )
    counted = torch.arange(10).view(2, 5) > 2
    lazy = LazyLogits(target.detach(), weight.detach().flip(0))
    log_probs, tokens = lazy.whole()[counted].log_softmax(-1).topk(3)
    rest = torch.log1p(-log_probs.exp().sum(1))
    places = (counted.flatten().cumsum(0) - 1).clamp(min=0)
    top = TopK(tokens, log_probs, rest, places, (2, 5, WORDS))
    for teacher, temperature, reverse in ((lazy, 2.0, True), (top, 1.0, False), (top, 1.0, True)):
        imitation = Imitation(teacher, counted, temperature, 0.7, reverse)
        assert torch.autograd.gradcheck(
            lambda x, w, given=imitation: chunked_loss(LazyLogits(x, w), imitation=given),
            (inputs, weight),
        )


def test_the_reverse_divergence_by_hand():
    teacher, student = (nn.Linear(2, 2, bias=False) for _ in range(2))
    batch = (torch.eye(2), torch.tensor([0, 1]))
    p, q = (m(batch[0]).softmax(1) for m in (teacher, student))
    loss = distillation_loss(teacher, reverse=True)(student, batch)
    assert torch.allclose(loss, (q * (q / p).log()).sum(1).mean())
    loss.backward()
    assert student.weight.grad.any()
    assert teacher.weight.grad is None


def padded(batch, left, right):
    fill = {"input_ids": 0, "labels": -100}
    wide = {n: F.pad(c, (left, right), value=fill[n]) for n, c in batch.items()}
    return wide | {"attention_mask": F.pad(torch.ones_like(batch["input_ids"]), (left, right))}


def test_rows_are_found_in_any_order_batch_and_padding(tmp_path):
    folder = store(tmp_path, [rows(0, 1), rows(2, 3), rows(4, 5)], k=None)
    for batch in (rows(4, 1, 0), padded(rows(3, 5, 2), 0, 3), padded(rows(2, 0), 2, 1)):
        online = derived(distillation_loss(TEACHER), batch)
        stored_too = derived(stored_distillation_loss(folder), batch)
        assert torch.allclose(stored_too[0], online[0], rtol=1e-5)


def test_training_without_the_teacher_goes_the_same_way(tmp_path):
    loader = DataLoader(Rows(**rows(0, 1, 2, 3)), batch_size=2, shuffle=True)
    folder = store(tmp_path, loader, k=None)
    online, offline = llama(1), llama(1)
    options = {"steps": 5, "lr": 1e-3, "progress": False}
    one = fit(online, loader, teacher=TEACHER, **options)
    other = fit(offline, loader, loss_fn=stored_distillation_loss(folder), accumulate=1, **options)
    assert other.loss == pytest.approx(one.loss, rel=1e-5)
    assert one.loss[-1] < one.loss[0]


def test_what_was_not_stored_is_refused(tmp_path):
    loss = stored_distillation_loss(store(tmp_path, [rows(0, 1)]))
    masked = rows(1) | {"labels": IDS[[1]]}
    changed = rows(0) | {"input_ids": IDS[[0]].clone().fill_(7)}
    for batch in (rows(2), masked, changed):
        with pytest.raises(
            CheckpointError, match=r"knows no answers to row 0 of this batch.*store_teacher"
        ):
            loss(TEACHER, batch)
    with pytest.raises(CheckpointError, match="row 1 of this batch"):
        loss(TEACHER, rows(0, 5))
    with pytest.raises(UnreadableBatch, match="no input_ids"):
        loss(nn.Linear(2, 2), (torch.ones(1, 2), torch.tensor([0])))
    with pytest.raises(NothingToTrain, match="all its labels are -100"):
        stored_distillation_loss(store(tmp_path, [rows(5)]))(TEACHER, rows(5))
    small = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=100, hidden_size=8, intermediate_size=8,
                                               num_hidden_layers=1, num_attention_heads=1))  # fmt: skip
    with pytest.raises(ValueError, match="same head and vocabulary"):
        loss(small, rows(0))


class Interrupted(RuntimeError):
    pass


def broken(*batches):
    yield from batches
    raise Interrupted


def test_an_interrupted_call_goes_on(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        stored, "_answers", lambda *a, real=stored._answers: asked.append(1) or real(*a)
    )
    with pytest.raises(Interrupted):
        store(tmp_path, broken(rows(0, 1), rows(2)))
    assert len(asked) == 2
    store(tmp_path, [rows(1, 0), rows(2, 3), rows(4)])
    assert len(asked) == 4  # the first batch was known
    answers = Answers(tmp_path)
    assert len(answers.rows) == 5
    assert answers.predictions == int((rows(0, 1, 2, 3, 4)["labels"][:, 1:] != -100).sum())
    store(tmp_path, [BATCH])
    store(tmp_path, [BATCH])
    assert len(asked) == 5
    assert len(list(tmp_path.iterdir())) == 3
    at_once = derived(stored_distillation_loss(store(tmp_path / "at once")))
    assert_same(derived(stored_distillation_loss(tmp_path)), at_once)


def test_full_files_are_written_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "_FILE_BYTES", 100)
    with pytest.raises(Interrupted):
        store(tmp_path, broken(rows(0), rows(1), rows(2)), k=2)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # the second row has two predictions only
    assert len(Answers(tmp_path).rows) == 3


def test_other_answers_are_refused(tmp_path):
    store(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"holds other answers \(k: 8 there, 4 here\).*new folder"
    ):
        store(tmp_path, k=4)
    with pytest.raises(CheckpointError, match=r"temperature: 1.0 there, 2.0 here"):
        store(tmp_path, temperature=2.0)
    with pytest.raises(CheckpointError, match=r"teacher\.weights: \w+ there, \w+ here"):
        store(tmp_path, teacher=llama(2))
    store(tmp_path / "other", k=4)
    shutil.copy(tmp_path / "other" / "00000.safetensors", tmp_path / "00007.safetensors")
    with pytest.raises(
        CheckpointError, match=r"00007\.safetensors holds other answers than the rest"
    ):
        stored_distillation_loss(tmp_path)
    shutil.copy(tmp_path / "00000.safetensors", tmp_path / "00007.safetensors")
    store(tmp_path, [padded(rows(0, 1), 1, 0) | {"labels": F.pad(IDS[:2], (1, 0))}])
    assert (tmp_path / "00008.safetensors").exists()  # no file is written over
    shutil.copy(__file__, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors holds no teacher's answers"):
        stored_distillation_loss(tmp_path)


def test_nothing_is_stored_of_nothing(tmp_path):
    with pytest.raises(EmptyLoader, match="no batch"):
        store(tmp_path / "a", [])
    with pytest.raises(UnreadableBatch, match="no input_ids"):
        store(tmp_path / "b", [(torch.ones(1, 2), torch.tensor([0]))])
    with pytest.raises(ValueError, match="k at least 1"):
        store(tmp_path / "c", k=0)
    with pytest.raises(ValueError, match="share above 0"):
        stored_distillation_loss(store(tmp_path / "d"), share=0)


def test_storing_disturbs_neither_modes_nor_random_numbers(tmp_path):
    teacher = llama(0).train()
    torch.manual_seed(0)
    store(tmp_path, DataLoader(Rows(**BATCH), batch_size=2, shuffle=True), teacher=teacher)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))
    assert teacher.training
    with safe_open(tmp_path / "00000.safetensors", "pt") as file:
        assert str(tmp_path) not in str(file.metadata())
