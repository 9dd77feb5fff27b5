"""Layers that look quantized while they train."""

import torch
from torch import nn

from companion import W4, prepare_qat


def test_padding_row_of_an_embedding_gets_no_gradient():
    table = nn.Embedding(6, 32, padding_idx=0)
    prepared = prepare_qat(nn.Sequential(table), W4, embeddings=True)
    prepared(torch.tensor([0, 1, 1])).sum().backward()
    grad = prepared[0].weight.grad
    assert torch.equal(grad[0], torch.zeros(32))
    assert (grad[1] == 2).sum() >= 31  # the largest may be cut
    assert torch.equal(grad[2:], torch.zeros(4, 32))
