"""A whole language model under rounding, compiled without a break, trains as it does uncompiled."""

import shutil

import pytest
import torch
import transformers
from torch import nn

from companion import W4, W4A8, prepare_qat

TOKENS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
SUMMED_OTHERWISE = 1e-5
"""A compiler adds up in another order."""
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
            vocab_size=64, initializer_range=0.3, use_cache=False, pad_token_id=0,
        )
    )  # fmt: skip


def step(model: nn.Module, called: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss before a step, and the gradient that the step follows."""
    model.zero_grad()
    loss = called(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=0.02).step()
    return loss.item(), gradients


@pytest.mark.parametrize(
    ("backend", "scheme", "method"),
    [
        ("aot_eager", W4A8, "absmax"),
        ("aot_eager", W4A8, "lsq"),
        pytest.param("inductor", W4, "absmax", marks=compiler),
        pytest.param("inductor", W4, "lsq", marks=compiler),
    ],
)
def test_a_language_model_compiles_into_one_graph_and_learns_the_same(backend, scheme, method):
    torch._dynamo.reset()
    eager, other = (prepare_qat(llama(), scheme, method) for _ in range(2))
    compiled = torch.compile(other, backend=backend, fullgraph=True)
    expected, theirs = step(eager, eager)
    found, ours = step(other, compiled)
    margin = 1e-5 if scheme.activations is None else 1e-2  # an input near a tie may round otherwise
    assert found == pytest.approx(expected, rel=SUMMED_OTHERWISE)
    for name, gradient in theirs.items():
        assert gradient.any()
        assert (ours[name] - gradient).abs().max() <= margin * gradient.abs().max(), name
    assert step(other, compiled)[0] < expected - 0.01  # the weights of now, not those it compiled
