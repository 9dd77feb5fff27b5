"""Two texts that belong together: an encoder, used on both sides, that learns to match them.

Built in chapter 12.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F


class Match(NamedTuple):
    """Scores of every query with every text of a batch, and the cross-entropy of the right ones."""

    logits: Tensor
    loss: Tensor | None


class BiEncoder(nn.Module):
    """One encoder for queries and texts; what belongs together is drawn together.

    Trained by in-batch negatives: the texts of the other queries are the wrong answers.

    Parameters
    ----------
    encoder : nn.Module
        Answers with ``last_hidden_state`` of shape (batch, tokens, width). Its ``config``, if it
        has one, is also this model's.
    temperature : float
        Divides the cosines; 0.05 is what MiniLM was trained with.

    References
    ----------
    Henderson et al., "Efficient natural language response suggestion for Smart Reply", 2017.
    Reimers and Gurevych, "Sentence-BERT", EMNLP 2019.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> import torch
    >>> class Letters(nn.Module):
    ...     def forward(self, input_ids, attention_mask):
    ...         return SimpleNamespace(last_hidden_state=F.one_hot(input_ids, 4).float())
    >>> ids, mask = torch.tensor([[1], [2]]), torch.ones(2, 1)
    >>> match = BiEncoder(Letters(), temperature=1.0)(ids, mask, ids, mask)
    >>> match.logits
    tensor([[1., 0.],
            [0., 1.]])
    """

    def __init__(self, encoder: nn.Module, temperature: float = 0.05) -> None:
        super().__init__()
        self.encoder = encoder
        self.temperature = temperature
        if hasattr(encoder, "config"):
            self.config = encoder.config  # what a saved model is rebuilt from

    def embed(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> Tensor:
        """Mean over the tokens, of length one: shape (batch, width).

        Parameters
        ----------
        input_ids, attention_mask : Tensor, int64, shape (batch, length)
        **more : Tensor
            What else the tokenizer makes for the encoder, such as ``token_type_ids``.
        """
        hidden = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, **more
        ).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        body_input_ids: Tensor,
        body_attention_mask: Tensor,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        body_token_type_ids: Tensor | None = None,
    ) -> Match:
        """Score each query with each text; `labels` say which text is the query's own."""
        queries, texts = (
            self.embed(ids, mask, **({} if types is None else {"token_type_ids": types}))
            for ids, mask, types in (
                (input_ids, attention_mask, token_type_ids),
                (body_input_ids, body_attention_mask, body_token_type_ids),
            )
        )
        logits = queries @ texts.T / self.temperature
        return Match(logits, None if labels is None else F.cross_entropy(logits, labels))
