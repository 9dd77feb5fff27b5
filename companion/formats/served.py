"""What every engine's model has in common, so that commands and metrics take one like the other.

Built in chapter 15.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from companion.formats.onnx.graphs import Description


class ServedModel(nn.Module):
    """A model that an engine of its own computes, from a file, in place of PyTorch.

    Examples
    --------
    >>> from companion.formats.onnx.model import OnnxModel
    >>> issubclass(OnnxModel, ServedModel)
    True
    """

    description: Description
    loss_type: str = ""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many tokens it knows."""

    @abstractmethod
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        stop: bool = True,
        settings: Mapping | None = None,
    ) -> Iterator[int]:
        """Go on with a text of shape (1, length), token by token, each as soon as it is known."""
