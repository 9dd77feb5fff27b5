"""Training block by block: what each block is given, what it learns, and what it refuses."""

import copy

import pytest
import torch
import transformers as tf
from torch import nn

from companion import QuantScheme, convert, fit_blocks, prepare_qat
from companion.errors import EmptyLoader, UnsupportedModel, WrongStage
from companion.training.blocks import _calls, _GivenBack

W2 = QuantScheme(2)
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
         "num_attention_heads": 2, "max_position_embeddings": 32}  # fmt: skip


def of(kind: str, config) -> nn.Module:
    torch.manual_seed(0)
    return getattr(tf, kind)(config).eval()


MODELS = {
    "llama": lambda: of("LlamaForCausalLM", tf.LlamaConfig(**SIZES)),
    "gemma 3, local and global layers": lambda: of(
        "Gemma3ForCausalLM",
        tf.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=4, num_key_value_heads=1,
                            layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    "bert": lambda: of("BertForSequenceClassification", tf.BertConfig(**SIZES)),
    "gpt2": lambda: of("GPT2LMHeadModel", tf.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=3, n_head=2, n_positions=32)),
}  # fmt: skip


def batches(count: int = 2, padded: bool = False) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 96, (4, 16), generator=generator) for _ in range(count)]
    mask = torch.ones(4, 16, dtype=torch.long)
    if padded:
        mask[::2, 10:] = 0
    return [{"input_ids": ids, "attention_mask": mask, "labels": ids} for ids in rows]


def hidden(model: nn.Module, batch: dict) -> torch.Tensor:
    asked = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        return model(**asked, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("name", MODELS)
def test_every_block_learns_and_the_whole_comes_closer(name):
    model = MODELS[name]()
    before = copy.deepcopy(model.state_dict())
    untrained, qat = (prepare_qat(model, W2) for _ in range(2))
    histories = fit_blocks(qat, batches(), teacher=model, steps=40, progress=False)
    assert len(histories) == 3
    for history in histories.values():
        assert sum(history.loss[-4:]) < 0.8 * sum(history.loss[:4])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    batch = batches(3)[2]  # on text that no block was trained on
    wanted = hidden(model, batch)
    error = [(hidden(m, batch) - wanted).square().mean() for m in (qat.eval(), untrained.eval())]
    assert error[0] < 0.9 * error[1]
    assert torch.equal(hidden(convert(qat), batch), hidden(qat, batch))


def test_a_block_is_given_what_the_model_gives_it():
    """Stepping through the blocks, each called as it was seen to be, ends where the model does."""
    model, batch = MODELS["gemma 3, local and global layers"](), batches(padded=True)[0]
    layers = list(model.model.layers)
    x, calls = _calls(model, layers, batch)
    with torch.no_grad():
        for call, layer in zip(calls, layers, strict=True):
            x = call(layer, x)
        assert torch.equal(model.model.norm(x), hidden(model, batch))


def test_a_block_sees_the_errors_of_those_before_it():
    """What the second block starts from is the first one's rounded output, not the float one."""
    model, seen = MODELS["llama"](), []
    qat = prepare_qat(model, W2)
    fit_blocks(qat, batches(1), teacher=model, steps=1, lr=0.0, progress=False)
    qat.eval().model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hidden(qat, batches(1)[0])
    x, calls = _calls(model, list(model.model.layers), batches(1)[0])
    wanted = [x]
    with torch.no_grad():
        for call, layer in zip(calls, model.model.layers, strict=True):
            wanted.append(call(layer, wanted[-1]))
        expected = float(_GivenBack([seen[0]], [wanted[2]], [calls[1]])(
            qat.model.layers[1], torch.tensor([0])))  # fmt: skip
    again = fit_blocks(prepare_qat(model, W2), batches(1), teacher=model, steps=1, lr=0.0,
                       progress=False)  # fmt: skip
    assert again["model.layers.1"].loss[0] == pytest.approx(expected, rel=1e-5)


def test_what_is_masked_does_not_count():
    model = MODELS["llama"]()
    (batch,) = batches(1, padded=True)
    other = batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)}
    losses = [
        fit_blocks(prepare_qat(model, W2), [b], teacher=model, steps=3, progress=False)
        for b in (batch, other)
    ]
    for name, history in losses[0].items():
        # sums of equal numbers in another order, since attention's padding differs
        assert history.loss == pytest.approx(losses[1][name].loss, rel=1e-4)


def test_it_goes_on_where_it_was(tmp_path):
    model = MODELS["llama"]()
    whole, halted = (prepare_qat(model, W2) for _ in range(2))
    fit_blocks(whole, batches(), teacher=model, steps=4, progress=False)

    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    hook = halted.model.layers[2].mlp.register_forward_pre_hook(stop)
    settings = {"teacher": model, "steps": 4, "progress": False, "checkpoint_dir": tmp_path}
    with pytest.raises(Stopped):
        fit_blocks(halted, batches(), **settings)
    hook.remove()
    again = prepare_qat(model, W2)
    histories = fit_blocks(again, batches(), **settings, resume=True)
    assert all(len(history.loss) == 4 for history in histories.values())
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


class Twice(nn.Module):
    """Runs its blocks twice over."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return x


class Aside(Twice):
    """Adds what its first block was given to what the second is."""

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x) + x)


@pytest.mark.parametrize("kind", [Twice, Aside])
def test_blocks_that_do_not_run_in_a_row_are_refused(kind):
    model = kind()
    with pytest.raises(UnsupportedModel, match="do not run in a row"):
        fit_blocks(prepare_qat(model, W2), [(torch.randn(4, 32), None)], teacher=model)


def test_what_it_cannot_train_is_refused_in_a_sentence():
    model, loader = MODELS["llama"](), batches()
    with pytest.raises(WrongStage, match="prepare_qat"):
        fit_blocks(model, loader, teacher=model)
    qat = prepare_qat(model, W2)
    with pytest.raises(EmptyLoader, match="no batch"):
        fit_blocks(qat, [], teacher=model)
    with pytest.raises(UnsupportedModel, match=r"no block model\.layers\.0 of the same form"):
        fit_blocks(qat, loader, teacher=MODELS["bert"]())
    wider = of("LlamaForCausalLM", tf.LlamaConfig(**SIZES | {"intermediate_size": 96}))
    with pytest.raises(UnsupportedModel, match="of the same form"):
        fit_blocks(qat, loader, teacher=wider)
    flat = nn.Sequential()
    flat.add_module("only", nn.Linear(32, 32))
    with pytest.raises(UnsupportedModel, match="no numbered blocks"):
        fit_blocks(prepare_qat(flat, W2), loader, teacher=flat)
