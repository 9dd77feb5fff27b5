"""Layers that look quantized while they train.

A float layer becomes its fake-quantized class in place, keeping its parameter, its name and
its hooks; conversion replaces it by a module of `companion.qat.packed`. Built in chapter 10.
"""

from __future__ import annotations

from torch import Tensor, nn

from companion.numerics.activations import fake_quantize_inputs
from companion.qat.ranges import Absmax


class FakeQuantLinear(nn.Linear):
    """A Linear layer whose weights (and inputs, if asked) are rounded on the way.

    Parameters
    ----------
    quantizer : Absmax or another method
        Attribute set by `prepare_qat`.
    """

    quantizer: Absmax

    def forward(self, x: Tensor) -> Tensor:
        scheme = self.quantizer.scheme
        if scheme.activations is not None and self.quantizer.enabled:
            x = fake_quantize_inputs(x, scheme.activations, scheme.group_size)
        return self.quantizer.linear(x, self.matrix, self.bias)

    @property
    def matrix(self) -> Tensor:
        """The float weight, shape (out_features, in_features)."""
        return self.weight


class FakeQuantConv1D(FakeQuantLinear):
    """The same for GPT-2's Conv1D, which keeps its weight transposed."""

    @property
    def matrix(self) -> Tensor:
        """The float weight, shape (out_features, in_features)."""
        return self.weight.t().contiguous()  # the layout that a converted layer multiplies

    def extra_repr(self) -> str:
        columns, rows = self.weight.shape
        return f"{columns}, {rows}"


class FakeQuantEmbedding(nn.Embedding):
    """An embedding whose rows are rounded when they are looked up.

    Parameters
    ----------
    factor : float, optional
        Attribute set by `prepare_qat`: what the rows are multiplied by afterwards, as Gemma's are.
    """

    quantizer: Absmax
    factor: float | None = None

    def forward(self, ids: Tensor) -> Tensor:
        self.quantizer.check_rows(len(self.weight))
        rows = self.quantizer(super().forward(ids), rows=ids)
        return rows if self.factor is None else (rows.float() * self.factor).to(rows.dtype)

    @property
    def matrix(self) -> Tensor:
        """The float weight, shape (num_embeddings, embedding_dim)."""
        return self.weight
