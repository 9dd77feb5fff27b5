"""Logits put off: who gives them up, equal losses either way, and nothing left behind."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from companion import W4, W8A8, convert, load_pretrained, prepare_qat
from companion.evaluation import logits as module
from companion.evaluation.language import document_losses
from companion.evaluation.logits import LazyLogits, LazyLoss, NeedsLogits, put_off, token_losses

WORDS, ROWS, TOKENS = 96, 3, 17
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(3, WORDS, (ROWS, TOKENS), generator=GENERATOR)
LABELS = IDS.clone()
LABELS[0, :5] = LABELS[2, 9:] = -100
BATCH = {"input_ids": IDS, "labels": LABELS, "attention_mask": torch.ones_like(IDS)}
SIZE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": WORDS, "initializer_range": 0.3}  # fmt: skip
FORMS = {
    "Llama": ("ForCausalLM", SIZE),
    "Gemma2": ("ForCausalLM", SIZE | {"head_dim": 32, "num_key_value_heads": 2,
                                      "final_logit_softcapping": 5.0}),
    "Granite": ("ForCausalLM", SIZE | {"logits_scaling": 3.0}),
    "GPTNeoX": ("ForCausalLM", SIZE),
    "Phi": ("ForCausalLM", SIZE),
    "OPT": ("ForCausalLM", {"hidden_size": 64, "ffn_dim": 64, "num_hidden_layers": 1,
                            "num_attention_heads": 2, "vocab_size": WORDS,
                            "word_embed_proj_dim": 64, "init_std": 0.3}),
    "GPT2": ("LMHeadModel", {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": WORDS,
                             "bos_token_id": 0, "eos_token_id": 0}),
    "Mixtral": ("ForCausalLM", SIZE | {"num_key_value_heads": 2, "output_router_logits": True}),
    "ModernBert": ("ForMaskedLM", SIZE | {
        f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}),
    "Bert": ("ForMaskedLM", SIZE),
    "T5": ("ForConditionalGeneration", {"d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1,
                                        "num_heads": 2, "vocab_size": WORDS,
                                        "decoder_start_token_id": 0}),
}  # fmt: skip


def make(kind: str, **more) -> nn.Module:
    """A small model of transformers, the same each time."""
    torch.manual_seed(0)
    head, size = FORMS[kind]
    config = getattr(transformers, f"{kind}Config")(**size | more)
    return getattr(transformers, kind + head)(config).eval()


class Masking(transformers.LlamaForCausalLM):
    """Writes into its logits, as Chameleon does where images cannot follow."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[:, :, :3] = -9.0
        return output


def masking() -> nn.Module:
    torch.manual_seed(0)
    return Masking(transformers.LlamaConfig(**SIZE)).eval()


def hooked() -> nn.Module:
    model = make("Llama")
    for part in model.modules():
        add_hook_to_module(part, AlignDevicesHook("cpu", io_same_device=True))
    return model


def adapted() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    return peft.get_peft_model(make("Llama"), config).eval()


def adapted_head() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    return peft.get_peft_model(make("Llama"), config).eval()


def watched() -> nn.Module:
    """Somebody wants to see what its output layer computes."""
    model = make("Llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    return model


class Fused(torch.autograd.Function):
    """A product with a weight that is overwritten afterwards."""

    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.save_for_backward(inputs, weight)
        scratch = 2 * weight
        product = F.linear(inputs, scratch)
        scratch.zero_()
        return product

    @staticmethod
    def backward(ctx, grad):
        inputs, weight = ctx.saved_tensors
        return 2 * grad @ weight, 2 * grad.flatten(0, -2).t() @ inputs.flatten(0, -2)


class FusedLinear(nn.Linear):
    def forward(self, x):
        return Fused.apply(x, self.weight)


def fused() -> nn.Module:
    model = make("Llama")
    model.lm_head.__class__ = FusedLinear
    return model


def compiled_in_place() -> nn.Module:
    model = make("Llama")
    model.compile(backend="eager")
    return model


MODELS = {  # name: how to make it, whether it gives its logits up
    "Llama": (partial(make, "Llama"), True),
    "Llama, tied": (partial(make, "Llama", tie_word_embeddings=True), True),
    "GPT-2, tied": (partial(make, "GPT2"), True),
    "Gemma 2 caps": (partial(make, "Gemma2"), True),
    "Granite scales": (partial(make, "Granite"), True),
    "GPT-NeoX": (partial(make, "GPTNeoX"), True),
    "OPT": (partial(make, "OPT"), True),
    "Mixtral": (partial(make, "Mixtral"), True),
    "ModernBERT": (partial(make, "ModernBert"), True),
    "BERT": (partial(make, "Bert"), True),
    "T5, whose loss comes with it": (partial(make, "T5"), False),
    "bfloat16": (lambda: make("Llama").bfloat16(), True),
    "prepared": (lambda: prepare_qat(make("Llama"), W4), True),
    "prepared with tied embeddings": (
        lambda: prepare_qat(make("Llama", tie_word_embeddings=True), W4, embeddings=True), True),
    "prepared, one range for all inputs": (lambda: prepare_qat(make("Llama"), W8A8).eval(), True),
    "converted": (lambda: convert(prepare_qat(make("Llama"), W4)), True),
    "converted to a kernel of its own": (lambda: convert(prepare_qat(make("Llama"), W8A8)), False),
    "hooks of Accelerate": (hooked, True),
    "adapters": (adapted, True),
    "an adapter around the output layer": (adapted_head, False),
    "a hook on the output layer": (watched, False),
    "writes into its logits": (masking, False),
    "a product of its own": (fused, False),
    "compiled": (lambda: torch.compile(make("Llama"), backend="eager"), False),
    "compiled in place": (compiled_in_place, False),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Seven rows at a time, so that pieces end anywhere."""
    monkeypatch.setattr(module, "PIECE_BYTES", 4 * WORDS * 7)


def shifted(model: nn.Module) -> torch.Tensor:
    """The label of each prediction."""
    in_place = getattr(model, "loss_type", "") == "ForMaskedLM" or model.config.is_encoder_decoder
    return LABELS if in_place else F.pad(LABELS[:, 1:], (0, 1), value=-100)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_losses_are_those_of_all_logits_at_once(name):
    construct, lazy = MODELS[name]
    model = construct()
    given = {k: v for k, v in BATCH.items() if k != "labels" or model.config.is_encoder_decoder}
    logits = model(**given).logits.float()
    expected = F.cross_entropy(logits.flatten(0, 1), shifted(model).flatten(), reduction="none")
    found = document_losses(model, [BATCH])
    # float32: products of 64 numbers in another order, 64 * 2**-24 of logits near 5; bfloat16
    # rounds such products to 2**-9 of themselves, and neighbours fall on either side
    close = 2**-5 if name == "bfloat16" else 2e-5
    assert found.loss == pytest.approx(expected.view(ROWS, -1).sum(1).tolist(), rel=close)
    answer = put_off(model, lambda: model(**given))
    assert isinstance(answer.logits, LazyLogits) == lazy


class Largest(TorchDispatchMode):
    """The most numbers that any new tensor had."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if any(part.alias_info for part in func._schema.returns):
            return result  # a view, or written into what was there
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_all_logits_never_exist_at_once():
    model = make("Llama", vocab_size=4096)
    with Largest() as plain, torch.no_grad():
        model(input_ids=IDS)
    with Largest() as ours:
        document_losses(model, [BATCH])
    assert plain.numbers == ROWS * TOKENS * 4096
    assert ours.numbers <= max(ROWS * TOKENS * 64, 7 * 4096)


def test_of_a_large_answer_only_pieces_are_copied():
    """As where a model computes its logits itself, in half precision."""
    logits = torch.randn(4, 50, WORDS).bfloat16()
    with Largest() as seen:
        token_losses(logits, torch.zeros(4, 50, dtype=torch.int64))
    assert seen.numbers == 7 * WORDS


def test_a_model_is_left_as_it_was():
    model = make("Llama")
    before = [set(vars(part)) for part in model.modules()]
    forward = model.lm_head.forward
    put_off(model, lambda: model(**BATCH), loss=True)
    assert [set(vars(part)) for part in model.modules()] == before
    assert model.lm_head.forward == forward
    own = model.lm_head.forward = partial(type(model.lm_head).forward, model.lm_head)
    model.loss_function = kept = lambda logits, labels, **_: logits.mean()
    output = put_off(model, lambda: model(**BATCH), loss=True)
    assert isinstance(output.loss, torch.Tensor)
    assert not isinstance(output.loss, LazyLoss)  # a loss that is not known here
    assert model.lm_head.forward is own
    assert model.loss_function is kept


def test_draws_are_those_of_one_pass():
    """Its attempt fails behind a dropout, and no draw of it may count."""
    model = masking().train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    torch.manual_seed(1)
    expected, after = model(**BATCH).logits, torch.rand(1)
    for _ in range(2):  # the first tries, the second knows
        torch.manual_seed(1)
        assert torch.equal(put_off(model, lambda: model(**BATCH)).logits, expected)
        assert torch.equal(torch.rand(1), after)


def test_a_model_that_needs_its_logits_runs_once_from_then_on():
    model, calls = masking(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    document_losses(model, [BATCH, BATCH, BATCH])
    assert len(calls) == 4
    put_off(model, lambda: model(**BATCH))
    assert len(calls) == 5


def test_an_error_of_the_model_is_raised_and_says_nothing_about_its_logits():
    model = make("Llama")
    with pytest.raises(IndexError, match="out of range"):
        put_off(model, lambda: model(input_ids=IDS + WORDS))
    assert isinstance(put_off(model, lambda: model(input_ids=IDS)).logits, LazyLogits)


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x * 0.5,
        lambda x: 2 + x,
        lambda x: -x,
        lambda x: torch.tanh(x / 3) * 3,
        lambda x: x + torch.arange(5.0),
        lambda x: x + torch.arange(5.0)[None, None],
        lambda x: x.to("cpu", torch.float64).contiguous(),
    ],
)
def test_what_happens_to_each_logit_is_done_later(step):
    inputs, weight, bias = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    lazy = step(LazyLogits(inputs, weight, bias))
    expected = step(F.linear(inputs, weight, bias))
    assert isinstance(lazy, LazyLogits)
    assert (lazy.shape, lazy.dtype) == (expected.shape, expected.dtype)
    index = torch.tensor([5, 0, 1])
    # four products and sums of numbers near 1, in another order
    assert torch.allclose(lazy.rows(index), expected.flatten(0, 1)[index], atol=1e-6)
    assert torch.allclose(lazy.whole(), expected, atol=1e-6)


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.view(-1, 5),
        lambda x: x[..., :3],
        lambda x: x.mul_(2),
        lambda x: x.softmax(-1),
        lambda x: x.sum(),
        lambda x: x + x,
        lambda x: x * torch.ones(5, requires_grad=True),  # its gradient would be lost
        lambda x: torch.cat([x, x]),
        lambda x: x.__setitem__(0, 1.0),
        lambda x: float(x[0, 0, 0]),
    ],
)
def test_what_cannot_wait_is_refused(step):
    with pytest.raises(NeedsLogits):
        step(LazyLogits(torch.randn(2, 3, 4), torch.randn(5, 4)))


def test_what_differs_from_row_to_row_is_refused():
    lazy = LazyLogits(torch.randn(2, 3, 4), torch.randn(5, 4))
    with pytest.raises(RuntimeError, match="must match"):
        lazy * torch.ones(2, 3, 1)


def test_other_models_just_run():
    answer = SimpleNamespace(logits=torch.ones(1))
    assert put_off(nn.Linear(1, 1), lambda: answer) is answer


def test_docs_lm_gives_its_logits_up():
    model = load_pretrained("docs-lm")
    assert isinstance(put_off(model, lambda: model(input_ids=IDS)).logits, LazyLogits)
