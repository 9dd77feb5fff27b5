"""The one loop of evaluation: modes, keys, heads, and what it says where it cannot measure."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from companion import W4, QuantWrapper, accuracy, convert, perplexity, prepare_qat
from companion.data.task import Task
from companion.errors import EmptyLoader, UnreadableBatch, UnsupportedModel
from companion.evaluation.estimates import predict
from companion.evaluation.forward import device_of, evaluating, losses, outputs, run, scored
from companion.evaluation.language import document_losses
from companion.evaluation.metrics import METRICS
from companion.numerics import rounding

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "vocab_size": 64, "initializer_range": 0.3}  # fmt: skip
IDS = torch.randint(3, 64, (6, 9), generator=torch.Generator().manual_seed(0))
TYPES = torch.arange(9).expand(6, 9) // 5
CLASSES = torch.tensor([0, 1, 2, 2, 1, 0])


def bert(kind: str, **config):
    torch.manual_seed(0)
    return getattr(transformers, f"Bert{kind}")(transformers.BertConfig(**SMALL, **config)).eval()


def llama(kind: str, **config):
    torch.manual_seed(0)
    made = transformers.LlamaConfig(**SMALL, pad_token_id=0, **config)
    return getattr(transformers, f"Llama{kind}")(made).eval()


def pieces(**columns) -> list[dict]:
    """Two batches of unequal size."""
    return [{name: column[rows] for name, column in columns.items()}
            for rows in (slice(4), slice(4, 6))]  # fmt: skip


# modes


def test_each_module_has_its_own_mode_back():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4).eval(), nn.Linear(4, 3))
    model.train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    for measure in (accuracy, perplexity, predict):
        measure(model, [(torch.eye(4), torch.tensor([0, 1, 2, 0]))])
        assert [module.training for module in model.modules()] == before
    assert (model[1].running_mean == 0).all()


def test_observers_of_the_classic_road_go_on_after_a_measurement():
    wrapper = QuantWrapper(nn.Sequential(nn.Linear(4, 3))).prepare_qat()
    wrapper(torch.ones(2, 4))
    observer = wrapper.quant.activation_post_process
    seen = observer.activation_post_process.max_val.clone()
    accuracy(wrapper, [(100 * torch.eye(4), torch.tensor([0, 1, 2, 0]))])
    assert torch.equal(observer.activation_post_process.max_val, seen)
    wrapper(100 * torch.ones(2, 4))
    assert observer.activation_post_process.max_val > seen


def test_modes_come_back_where_a_measurement_breaks_off():
    model = nn.Sequential(nn.Dropout(), nn.Linear(4, 3)).train()
    kept = []
    with pytest.raises(UnsupportedModel) as caught:  # holds the frames of the loop
        accuracy(model, [(torch.eye(4), torch.full((4,), 7))])
    kept.append(caught)
    assert model.training
    assert model[0].training
    with pytest.raises(RuntimeError), evaluating(model):
        model(torch.eye(9))
    assert model[0].training
    for _ in outputs(model, [(torch.eye(4), CLASSES)]):
        assert model.training  # between two batches as well
        assert torch.is_grad_enabled()


# what reaches the model


class Spy(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = {}

    def forward(self, input_ids, token_type_ids=None, pixel_values=None):
        self.seen = {"token_type_ids": token_type_ids, "pixel_values": pixel_values}
        return SimpleNamespace(logits=nn.functional.one_hot(input_ids[:, 0], 64).float())


@pytest.mark.parametrize("measure", [accuracy, document_losses, predict, perplexity])
def test_every_key_reaches_the_model(measure):
    spy = Spy()
    measure(
        spy, [{"input_ids": IDS, "token_type_ids": TYPES, "pixel_values": IDS, "labels": CLASSES}]
    )
    assert torch.equal(spy.seen["token_type_ids"], TYPES)
    assert torch.equal(spy.seen["pixel_values"], IDS)


def test_token_types_change_what_bert_answers():
    model = bert("ForSequenceClassification", num_labels=3)
    with_types, without = (
        document_losses(model, pieces(input_ids=IDS, labels=CLASSES, **more)).loss
        for more in ({"token_type_ids": TYPES}, {})
    )
    assert abs(with_types - without).max() > 1e-4
    expected = model(input_ids=IDS, token_type_ids=TYPES, labels=CLASSES).loss.item()
    # one mean in float32 over six losses near 1: a few units in the last place
    assert with_types.mean() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("make", [Spy, lambda: bert("ForSequenceClassification", num_labels=3),
                                  lambda: llama("ForSequenceClassification", num_labels=3)])  # fmt: skip
@pytest.mark.parametrize("measure", [accuracy, document_losses])
def test_a_key_that_no_forward_takes_is_named(make, measure):
    model = make()
    with pytest.raises(UnreadableBatch, match=f"'idx', which {type(model).__name__} does not take"):
        measure(model, [{"input_ids": IDS, "idx": torch.arange(6), "labels": CLASSES}])


def test_token_types_that_say_nothing_are_no_matter_and_others_are():
    model = llama("ForSequenceClassification", num_labels=3)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": CLASSES}
    plain = accuracy(model, [batch])
    assert accuracy(model, [batch | {"token_type_ids": torch.zeros_like(IDS)}]) == plain
    with pytest.raises(UnreadableBatch, match="'token_type_ids'"):
        accuracy(model, [batch | {"token_type_ids": TYPES}])


def test_a_forward_that_takes_anything_gets_everything():
    class Anything(nn.Module):
        def forward(self, **batch):
            return nn.functional.one_hot(batch["answer"], 3).float()

    assert accuracy(Anything(), [{"answer": CLASSES, "labels": CLASSES}]).value == 1


def test_inputs_of_every_form_of_batch():
    assert torch.equal(run(nn.Identity(), IDS), IDS)  # not its first row
    assert torch.equal(run(nn.Identity(), [IDS]), IDS)
    assert torch.equal(run(nn.Identity(), (IDS, None)), IDS)
    with pytest.raises(UnreadableBatch, match="3 parts"):
        run(nn.Identity(), (IDS, IDS, CLASSES))


def test_a_converted_model_of_nothing_but_buffers_has_a_device():
    model = convert(prepare_qat(nn.Sequential(nn.Linear(32, 3, bias=False)), W4))
    assert not list(model.parameters())
    assert device_of(model.to("meta")).type == "meta"


# accuracy of what transformers answers


def test_accuracy_of_a_classifier_of_transformers():
    model = bert("ForSequenceClassification", num_labels=3)
    loader = [transformers.BatchEncoding(batch) for batch in pieces(input_ids=IDS, labels=CLASSES)]
    predictions, labels = predict(model, loader)
    assert predictions.tolist() == model(input_ids=IDS).logits.argmax(-1).tolist()
    assert labels.tolist() == CLASSES.tolist()
    found = accuracy(model, loader)
    assert (found.value, found.n) == ((predictions == labels).mean(), 6)
    for other in (prepare_qat(model, W4), convert(prepare_qat(model, W4))):
        assert accuracy(other, loader).n == 6


def test_answers_as_plain_tuples_and_dictionaries():
    class As(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.wrap = wrap

        def forward(self, input_ids):
            return self.wrap(nn.functional.one_hot(input_ids, 3).float())

    for wrap in (lambda x: x, lambda x: (x, None), lambda x: {"logits": x}):
        assert accuracy(As(wrap), [{"input_ids": CLASSES, "labels": CLASSES}]).value == 1


def test_unscored_examples_do_not_count():
    scores = torch.eye(3)
    assert accuracy(nn.Identity(), [(scores, torch.tensor([0, -100, 0]))]).n == 2
    with pytest.raises(EmptyLoader, match="other than -100"):
        accuracy(nn.Identity(), [(scores, torch.full((3,), -100))])


def test_tokens_with_labels_count_within_their_example():
    """The tokens of one text go together, so the interval comes from the texts."""
    model = bert("ForTokenClassification", num_labels=3)
    labels = torch.randint(0, 3, IDS.shape, generator=torch.Generator().manual_seed(1))
    labels[:, 6:] = -100
    right = (model(input_ids=IDS).logits.argmax(-1) == labels)[:, :6].float().mean()
    found = accuracy(model, pieces(input_ids=IDS, labels=labels))
    assert found.value == pytest.approx(right.item())
    assert (found.n, found.method) == (6, "bootstrap")


def test_a_language_model_answers_with_the_next_token():
    model = llama("ForCausalLM")
    right = (model(input_ids=IDS).logits.argmax(-1)[:, :-1] == IDS[:, 1:]).float().mean()
    assert accuracy(model, pieces(input_ids=IDS, labels=IDS)).value == pytest.approx(right.item())


@pytest.mark.parametrize("kind", ["ForMaskedLM", "ForTokenClassification"])
def test_losses_at_their_own_place_are_those_of_transformers(kind):
    model = bert(kind, num_labels=64)
    labels = IDS.where(IDS % 3 == 0, -100)
    expected = model(input_ids=IDS, labels=labels).loss.item()
    # a mean of some twenty float32 losses near 4, summed in another order
    assert document_losses(model, [{"input_ids": IDS, "labels": labels}]).mean == pytest.approx(
        expected, rel=1e-6
    )


def test_loss_of_an_encoder_decoder_is_that_of_transformers():
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=64,
        decoder_start_token_id=0)).eval()  # fmt: skip
    batch = {"input_ids": IDS, "labels": IDS.flip(1)}
    expected = model(**batch).loss.item()
    # a mean of 54 float32 losses near 5, summed in another order
    assert document_losses(model, [batch]).mean == pytest.approx(expected, rel=1e-6)


# models and batches that cannot be measured


@pytest.mark.parametrize("measure", [accuracy, predict, perplexity, document_losses])
@pytest.mark.parametrize("make", [lambda: bert("Model"), lambda: llama("Model")])
def test_an_encoder_without_a_head_is_told_to_get_one(make, measure):
    model = make()
    with pytest.raises(UnsupportedModel, match=f"{type(model).__name__} gives no scores"):
        measure(model, [{"input_ids": IDS, "labels": CLASSES}])


def task(metric: str, labels: torch.Tensor = CLASSES) -> Task:
    test = [{"input_ids": IDS, "labels": labels}]
    return Task("topics", [], [], test, ("a", "b", "c"), "", metric)


@pytest.mark.parametrize("metric", ["accuracy", "span F1", "loss", "right choices"])
def test_every_metric_says_that_an_encoder_needs_a_head(metric):
    with pytest.raises(UnsupportedModel, match="gives no scores"):
        METRICS[metric].measure(bert("Model"), task(metric))


def test_recall_says_that_it_needs_an_embedding():
    with pytest.raises(UnsupportedModel, match='head="retrieval"'):
        METRICS["recall@1"].measure(bert("Model"), task("recall@1"))


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_a_language_model_is_no_classifier(metric):
    with pytest.raises(UnsupportedModel, match=r"scores of shape \(6, 9, 64\)"):
        METRICS[metric].measure(llama("ForCausalLM"), task(metric))


def test_a_classifier_of_other_classes_is_refused():
    model = bert("ForSequenceClassification", num_labels=2)
    batch = {"input_ids": IDS, "labels": CLASSES}
    for measure in (accuracy, document_losses):
        with pytest.raises(UnsupportedModel, match="knows 2 classes, and the labels go up to 2"):
            measure(model, [batch])
    with pytest.raises(UnsupportedModel, match="knows 2 classes, and topics has 3"):
        METRICS["accuracy"].measure(model, task("accuracy", CLASSES.clamp(max=1)))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": IDS}, "no labels"),
        (IDS, "no labels"),
        ((IDS,), "no labels"),
        ({"input_ids": IDS, "labels": nn.functional.one_hot(CLASSES, 64).float()}, "argmax"),
    ],
)
def test_batches_without_class_numbers_are_refused(batch, message):
    for measure in (accuracy, document_losses):
        with pytest.raises(UnreadableBatch, match=message):
            measure(nn.Embedding(64, 64) if not isinstance(batch, dict) else Spy(), [batch])


def test_scores_and_labels_stand_place_by_place():
    _, logits, labels = next(scored(llama("ForCausalLM"), [{"input_ids": IDS, "labels": IDS}]))
    assert logits.shape == (6, 8, 64)
    assert torch.equal(labels, IDS[:, 1:])


@pytest.mark.parametrize("loop", [outputs, losses])
def test_weights_are_rounded_once_for_all_batches_until_they_change(loop, monkeypatch):
    seen, really = [], rounding._forward
    monkeypatch.setattr(rounding, "_forward", lambda *a: (seen.append(1), really(*a))[1])
    model = prepare_qat(llama("ForCausalLM", tie_word_embeddings=True), W4, "absmax")
    layers = sum(hasattr(m, "quantizer") for m in model.modules())
    batches = pieces(input_ids=IDS, labels=IDS)
    found = [item[1] for item in loop(model, batches)]
    assert len(seen) == layers
    apart = [next(iter(loop(model, [batch])))[1] for batch in batches]
    assert all(torch.equal(a, b) for a, b in zip(found, apart, strict=True))
    seen.clear()
    for _ in loop(model, batches):
        with torch.no_grad():
            next(m for m in model.modules() if hasattr(m, "quantizer")).weight.mul_(2)
    assert len(seen) == layers + 1
