"""Training under rounding in Trainer and SFTTrainer: late, frozen, resumed, imitating, converted."""

import copy
from functools import partial

import pytest
import torch
import transformers as hf
import trl
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn

from companion import W2, W4A8, convert, fit, load_quantized, prepare_qat, save_quantized
from companion.errors import CheckpointError, SchemeError, UnsupportedModel, WrongStage
from companion.qat.lora import convert_base, lora_outside, lora_qat
from companion.qat.prepare import pause_rounding, start_rounding
from companion.training.losses import distillation_loss
from companion.training.teacher import store_teacher, stored_distillation_loss
from companion.training.trainer import QATCallback, QATMixin
from tests import tiny

TOKENIZER = tiny.byte_level(pad_token="[PAD]")
WORDS = len(TOKENIZER)
IDS = torch.randint(5, WORDS, (16, 10), generator=torch.Generator().manual_seed(0))
LABELS = IDS.clone()
for _row in range(
    16
):  # as many scored as a row's number says: means of means would be another loss
    LABELS[_row, : 1 + _row % 8] = -100
DATA = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": LABELS.tolist()})


class MixedTrainer(QATMixin, hf.Trainer):
    pass


class MixedSFTTrainer(QATMixin, trl.SFTTrainer):
    pass


PLAIN, MIXED = (hf.Trainer, trl.SFTTrainer), (MixedTrainer, MixedSFTTrainer)


def llama(tied: bool = True, **settings) -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.2, tie_word_embeddings=tied,
        eos_token_id=TOKENIZER.eos_token_id, pad_token_id=TOKENIZER.pad_token_id, **settings,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hf.LlamaForCausalLM(config).eval()


def trainer(kind, folder, model=None, callback=None, loss_fn=None, eval_dataset=None, **options):
    options = {
        "max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "seed": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, **options,
    }  # fmt: skip
    arguments = hf.TrainingArguments
    if issubclass(kind, trl.SFTTrainer):
        arguments = trl.SFTConfig
        options = {
            "bf16": False,
            "gradient_checkpointing": False,
            "dataset_num_proc": None,
            **options,
        }
    more = {"loss_fn": loss_fn} if loss_fn is not None else {}
    return kind(
        model=prepare_qat(llama(), W2) if model is None else model,
        args=arguments(output_dir=str(folder), **options),
        train_dataset=DATA, processing_class=TOKENIZER, eval_dataset=eval_dataset,
        callbacks=[QATCallback(start=0.5) if callback is None else callback], **more,
    )  # fmt: skip


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def losses(run) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def assert_same(one: nn.Module, other: nn.Module) -> None:
    here, there = one.state_dict(), other.state_dict()
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("kind", PLAIN)
def test_a_resumed_run_equals_an_uninterrupted_one_and_so_does_its_conversion(kind, tmp_path):
    """From before the start, from the start itself, and from after the freezing."""
    callback = partial(QATCallback, start=0.6, freeze=0.8)  # steps 4 and 5
    whole = trainer(kind, tmp_path / "whole", callback=callback(), save_steps=1)
    whole.train()
    for step in (2, 4, 5):
        resumed = trainer(kind, tmp_path / "resumed", callback=callback(), save_steps=1)
        resumed.train(str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(resumed.model, whole.model)
    converted = convert(whole.model)
    assert torch.equal(logits(converted), logits(whole.model))
    folder = save_quantized(converted, tmp_path / "saved")
    assert torch.equal(logits(load_quantized(folder)), logits(whole.model))


@pytest.mark.parametrize("kind", PLAIN)
def test_adapters_inside_the_rounding_resume_and_merge_exactly(kind, tmp_path):
    options = {"callback": QATCallback(start=0.5), "gradient_checkpointing": True}
    calibration = [{"input_ids": IDS}]

    def adapters(adapter=4):
        torch.manual_seed(1)
        return lora_qat(llama(), W2, adapter, calibration=calibration)

    whole = trainer(kind, tmp_path / "a", adapters(), **options)
    whole.train()
    for step in (2, 4):
        resumed = trainer(kind, tmp_path / "b", adapters(), **options)
        resumed.train(str(tmp_path / "a" / f"checkpoint-{step}"))
        assert_same(resumed.model, whole.model)
    whole.save_model(str(tmp_path / "end"))
    trained = logits(whole.model)
    assert torch.equal(logits(adapters(tmp_path / "end")), trained)
    converted = convert(whole.model.merge_and_unload())
    assert torch.equal(logits(converted), trained)
    assert losses(whole)[-1] != losses(whole)[0]


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("way", [convert, convert_base])
def test_a_conversion_computes_with_its_own_weights(kind, way, tmp_path):
    """TRL's forward keeps the model that it was made for; a copy has to have its own."""
    outside = way is convert_base
    model = lora_outside(llama(), W2) if outside else prepare_qat(llama(), W2)
    run = trainer(kind, tmp_path, model, QATCallback(), max_steps=1)
    run.train()
    before = logits(run.model)
    converted = way(run.model)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()
    assert torch.equal(logits(converted), before)


def test_a_float_model_from_sft_is_prepared_as_a_model_of_its_own(tmp_path):
    run = trainer(trl.SFTTrainer, tmp_path, llama(), max_steps=1, callback=hf.TrainerCallback())
    run.train()
    prepared = prepare_qat(run.model, W2)
    assert not torch.equal(logits(prepared), logits(run.model))
    with torch.no_grad():
        prepared.lm_head.weight.zero_()
    assert not logits(prepared).any()


def test_before_the_start_it_is_float_training_and_then_the_optimizer_goes_on(tmp_path):
    """By hand: the same steps in float, the ranges found then, the moments kept."""
    late = trainer(hf.Trainer, tmp_path / "late", callback=QATCallback(start=0.5))
    late.train()
    plain = trainer(hf.Trainer, tmp_path / "float", llama(), hf.TrainerCallback())
    plain.train()
    assert losses(late)[:3] == losses(plain)[:3]
    assert losses(late)[3] != losses(plain)[3]
    state = late.optimizer.state
    weight = late.model.model.layers[0].mlp.up_proj
    assert state[weight.weight]["step"] == 6
    assert state[weight.quantizer.step]["step"] == 3
    assert not torch.equal(weight.quantizer.step, torch.ones_like(weight.quantizer.step))


def test_the_ranges_are_those_of_the_weights_at_the_start(tmp_path):
    run = trainer(hf.Trainer, tmp_path, callback=QATCallback(start=0.5), learning_rate=0.1)
    run.train()
    model = prepare_qat(llama(), W2)
    model.load_state_dict(load_file(tmp_path / "checkpoint-2" / "model.safetensors"), strict=False)
    before = model.model.layers[0].mlp.up_proj.quantizer.first.clone()
    assert torch.equal(before, prepare_qat(llama(), W2).model.layers[0].mlp.up_proj.quantizer.first)
    assert not torch.equal(before, run.model.model.layers[0].mlp.up_proj.quantizer.first)


def test_steps_are_frozen(tmp_path):
    run = trainer(hf.Trainer, tmp_path, callback=QATCallback(freeze=0.5), save_steps=1)
    run.train()
    kept = [load_file(tmp_path / f"checkpoint-{n}" / "model.safetensors") for n in (2, 3, 6)]
    name = "model.layers.0.mlp.up_proj.quantizer.step"
    assert not torch.equal(kept[0][name], kept[1][name])
    assert torch.equal(kept[1][name], kept[2][name])
    assert torch.equal(run.model.state_dict()[name], kept[2][name])


def test_the_start_may_calibrate(tmp_path):
    seen = []
    callback = QATCallback(start=0.5, begin=lambda model: seen.append(1) or start_rounding(
        model, calibration=[{"input_ids": IDS}]))  # fmt: skip
    run, plain = (
        trainer(hf.Trainer, tmp_path / "a", callback=callback),
        trainer(hf.Trainer, tmp_path / "b"),
    )
    run.train()
    plain.train()
    assert seen == [1]
    name = "model.layers.0.mlp.up_proj.quantizer.first"
    assert not torch.equal(run.model.state_dict()[name], plain.model.state_dict()[name])
    assert torch.equal(logits(convert(run.model)), logits(run.model))


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_teacher_in_a_trainer_is_that_of_fit(kind, reverse, tmp_path):
    """One step of four batches of different numbers of scored tokens: the mean is over all tokens."""
    teacher, student = llama(), prepare_qat(llama(), W2)
    loss_fn = distillation_loss(teacher, reverse=reverse)
    everything = {"input_ids": IDS, "labels": LABELS}
    expected = loss_fn(copy.deepcopy(student), everything).item()
    folder = store_teacher(teacher, [everything], tmp_path / "answers", None, progress=False)
    for given in (loss_fn, stored_distillation_loss(folder, reverse=reverse)):
        run = trainer(kind, tmp_path, copy.deepcopy(student), QATCallback(), given,
                      per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=1)  # fmt: skip
        run.train()
        assert losses(run) == [pytest.approx(expected, rel=1e-3)]


@pytest.mark.parametrize("kind", MIXED)
def test_evaluation_stays_with_the_labels(kind, tmp_path):
    run = trainer(kind, tmp_path, loss_fn=distillation_loss(llama()), callback=QATCallback(),
                  eval_dataset=DATA, per_device_eval_batch_size=16)  # fmt: skip
    with torch.no_grad():
        expected = run.model(input_ids=IDS, labels=LABELS).loss.item()
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_sft_would_train_a_rounded_head_unrounded(tmp_path):
    def untied():
        return prepare_qat(llama(tied=False), W2)

    run = trainer(trl.SFTTrainer, tmp_path, untied())
    with pytest.raises(UnsupportedModel, match=r"past its rounding.*QATMixin.*skip=\['lm_head'\]"):
        run.train()
    run = trainer(MixedSFTTrainer, tmp_path / "mixed", untied(), QATCallback(), eval_dataset=DATA,
                  max_steps=1, per_device_train_batch_size=16, per_device_eval_batch_size=16)  # fmt: skip
    expected = untied()(input_ids=IDS, labels=LABELS).loss.item()
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    run.train()
    assert losses(run) == [pytest.approx(expected, rel=1e-3)]
    assert torch.equal(logits(convert(run.model)), logits(run.model))


@pytest.mark.parametrize("kind", [hf.Trainer, trl.SFTTrainer, MixedTrainer])
def test_checkpointing_changes_nothing(kind, tmp_path):
    runs = [trainer(kind, tmp_path / str(on), gradient_checkpointing=on) for on in (False, True)]
    for run in runs:
        run.train()
    assert losses(runs[0]) == losses(runs[1])
    assert_same(runs[0].model, runs[1].model)


@pytest.mark.parametrize("kind", [*PLAIN, *MIXED])
def test_mixed_precision(kind, tmp_path):
    """With checkpointing, as SFTTrainer does it unless told otherwise."""
    loss_fn = distillation_loss(llama()) if kind in MIXED else None
    run = trainer(kind, tmp_path, loss_fn=loss_fn, bf16=True, gradient_checkpointing=True)
    run.train()
    assert losses(run)[-1] < 2 * losses(run)[3]
    assert logits(run.model).dtype == torch.float32
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    converted, alone = convert(run.model), prepare_qat(llama(), W2)
    alone.load_state_dict(run.model.state_dict())
    assert torch.equal(logits(converted), logits(alone))  # outside of autocast, as it is deployed
    assert not torch.equal(logits(run.model), logits(alone))


def test_the_best_checkpoint_is_one_of_those_that_round(tmp_path):
    trained = llama()
    fit(trained, [{"input_ids": IDS, "labels": LABELS}], steps=40, lr=1e-2, progress=False)
    run = trainer(hf.Trainer, tmp_path, prepare_qat(trained, W2), eval_dataset=DATA, eval_steps=2,
                  eval_strategy="steps", load_best_model_at_end=True, learning_rate=1e-4)  # fmt: skip
    run.train()
    values = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    assert values[2] < min(values[4], values[6])  # a float model's
    best = min((4, 6), key=values.get)
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert run.evaluate()["eval_loss"] == pytest.approx(values[best], rel=1e-5)


def test_a_checkpoint_does_not_open_without_its_rounding(tmp_path):
    run = trainer(hf.Trainer, tmp_path, max_steps=2)
    run.train()
    run.save_model(str(tmp_path / "end"))
    for folder in ("checkpoint-2", "end"):
        with pytest.raises(ValueError, match="quant_method"):
            hf.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
    assert not hasattr(run.model.config, "quantization_config")
    small = convert(run.model)
    small.save_pretrained(tmp_path / "small")
    again, ids = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "small"), torch.arange(8)[None]
    assert torch.equal(again(ids).logits, small(ids).logits)


def test_learned_steps_do_not_decay(tmp_path):
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 would pull.*QATMixin"):
        trainer(hf.Trainer, tmp_path, weight_decay=0.1).train()
    run = trainer(MixedTrainer, tmp_path, weight_decay=0.1, max_steps=1, callback=QATCallback())
    run.train()
    decayed = {id(p) for p in run.optimizer.param_groups[0]["params"]}
    assert {n for n, p in run.model.named_parameters() if id(p) in decayed} == {
        n for n in dict(llama().named_parameters()) if "norm" not in n
    }


def test_a_run_stopped_early_rounds_in_the_end(tmp_path):
    class Stop(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    run = trainer(hf.Trainer, tmp_path)
    run.add_callback(Stop())
    run.train()
    assert run.state.global_step == 1
    assert torch.equal(logits(convert(run.model)), logits(run.model))


def test_what_cannot_be_meant_is_refused(tmp_path):
    for start, freeze in ((1, None), (-0.1, None), (0.5, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="shares of the steps"):
            QATCallback(start, freeze)
    with pytest.raises(WrongStage, match="finds no layer that rounds"):
        trainer(hf.Trainer, tmp_path / "float", llama()).train()
    trainer(hf.Trainer, tmp_path / "half", max_steps=2).train()
    last = str(tmp_path / "half" / "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"start: 0\.5 there, 0\.25 here"):
        trainer(hf.Trainer, tmp_path / "x", callback=QATCallback(0.25)).train(last)
    with pytest.raises(CheckpointError, match="begins_by_function: False there, True here"):
        trainer(hf.Trainer, tmp_path / "x", callback=QATCallback(0.5, begin=print)).train(last)
    trainer(hf.Trainer, tmp_path / "bare", max_steps=2, callback=hf.TrainerCallback()).train()
    with pytest.raises(CheckpointError, match="had no QATCallback"):
        trainer(hf.Trainer, tmp_path / "x").train(str(tmp_path / "bare" / "checkpoint-2"))


def test_a_paused_model_rounds_neither_weights_nor_inputs_and_is_not_converted():
    model = prepare_qat(llama(), W4A8, embeddings=True)
    pause_rounding(model)
    assert torch.equal(logits(model), logits(llama()))
    with pytest.raises(WrongStage, match=r"is paused.*start_rounding"):
        convert(model)
    start_rounding(model)
    assert torch.equal(logits(model), logits(prepare_qat(llama(), W4A8, embeddings=True)))
    with pytest.raises(WrongStage, match="no layer of this model rounds"):
        pause_rounding(llama())


def test_frozen_weights_keep_their_ranges_and_calibration_is_not_ignored():
    batches = [{"input_ids": IDS}]
    model = lora_qat(llama(), W2, 4, calibration=batches)
    before = logits(model)
    assert not torch.equal(before, logits(lora_qat(llama(), W2, 4)))
    pause_rounding(model)
    start_rounding(model)
    assert torch.equal(logits(model), before)
    with pytest.raises(WrongStage, match="give calibration to lora_qat"):
        start_rounding(model, batches)
    with pytest.raises(SchemeError, match="leave calibration out"):
        start_rounding(prepare_qat(llama(), W2, "absmax"), batches)


def test_fit_starts_late_and_resumes_exactly(tmp_path):
    batch = {"input_ids": IDS, "labels": LABELS}
    broken = []

    def validate(model):
        if broken and broken.pop() == "now":
            raise InterruptedError
        return 0.0

    def late(folder, **options):
        model = prepare_qat(llama(), W2)
        pause_rounding(model)
        return model, fit(
            model, [batch], steps=6, lr=1e-2, at={3: partial(start_rounding, model)}, progress=False,
            validate=validate, validate_every=2, checkpoint_dir=folder, **options,
        )  # fmt: skip

    whole, history = late(tmp_path / "whole")
    broken[:] = ["now", "", ""]  # in the third validation, after four steps
    with pytest.raises(InterruptedError):
        late(tmp_path / "cut")
    resumed, again = late(tmp_path / "cut", resume=True)
    assert again.loss == history.loss
    assert_same(resumed, whole)
    assert history.loss[:3] == fit(llama(), [batch], steps=6, lr=1e-2, progress=False).loss[:3]
