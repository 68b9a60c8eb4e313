"""The loss of a batch, whose logits are never all in memory: those of 64 tokens at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ktk.integration.transformers.names import head_of
from ktk.train.data import Example

ROWS = 64  # tokens whose logits are in memory at once; 13 MB of a vocabulary of 49,152
IGNORED = -100


def collate(examples: Sequence[Example], pad: int) -> tuple[torch.Tensor, ...]:
    """ids, mask and labels, int64 (examples, longest); labels of what is no target are IGNORED."""
    longest = max(len(one.ids) for one in examples)
    ids = torch.full((len(examples), longest), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, one in enumerate(examples):
        length = len(one.ids)
        own = torch.tensor(one.ids)
        ids[row, :length], mask[row, :length] = own, 1
        labels[row, :length] = own.where(torch.tensor(one.is_target), IGNORED)
    return ids, mask, labels


class _HeadLoss(torch.autograd.Function):
    """Sum of the cross entropies of rows, given a frozen head: the gradient of the rows is taken
    while their logits are there.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: Any) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grads = []
        for at in range(0, len(hidden), ROWS):
            with torch.enable_grad():
                rows = hidden[at : at + ROWS].detach().requires_grad_()
                part = torch.nn.functional.cross_entropy(
                    head(rows).float(), labels[at : at + ROWS], reduction="sum"
                )
            if hidden.requires_grad:
                grads.append(torch.autograd.grad(part, rows)[0])
            total += part.detach()
        if grads:
            ctx.save_for_backward(torch.cat(grads))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (saved,) = ctx.saved_tensors
        return saved * grads[0], None, None


class BatchLoss:
    """A model's loss.

    Where its logits are its head's of its last hidden states, which is found out by trying, they
    are computed in parts; else all at once.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._pad = _pad_token(model)
        self.is_in_parts = self._try()

    def __call__(self, examples: Sequence[Example]) -> tuple[torch.Tensor, int]:
        """Sum of the targets' cross entropies in nats, float32, and the number of targets."""
        ids, mask, labels = collate(examples, self._pad)
        after = labels[:, 1:].reshape(-1)
        is_target = after != IGNORED
        targets = after[is_target]
        if not self.is_in_parts:
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            rows = logits[:, :-1].reshape(-1, logits.shape[-1])[is_target].float()
            loss = torch.nn.functional.cross_entropy(rows, targets, reduction="sum")
            return loss, len(targets)
        hidden = self._hidden(ids, mask)
        rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])[is_target]  # (targets, H)
        head = head_of(self._model)
        return _HeadLoss.apply(rows, targets, head), len(targets)

    def _hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        decoder = self._model.get_decoder()
        found: torch.Tensor = decoder(
            input_ids=ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
        return found

    @torch.no_grad()
    def _try(self) -> bool:
        head = head_of(self._model)
        if head is None or any(p.requires_grad for p in head.parameters()):
            return False
        was_training = self._model.training
        self._model.eval()
        try:
            ids = torch.tensor([[0, 1, 2]])
            mask = torch.ones_like(ids)
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return torch.equal(logits, head(self._hidden(ids, mask)))
        except (AttributeError, TypeError):  # no decoder that is called so
            return False
        finally:
            self._model.train(was_training)


def _pad_token(model: Any) -> int:
    """Any token: the mask hides it."""
    pad = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    return 0 if pad is None or pad < 0 else int(pad)
