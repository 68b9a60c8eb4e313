"""What experts spread over machines send: a model on paper of ``ktk.ops.expert_parallel``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A layer's experts in equal shares on ``ranks``; tokens choose ``top_k`` of them alike.

    hidden_bytes : of a token's hidden state. output_bytes : of an expert's output.
    """

    ranks: int
    num_experts: int
    top_k: int
    hidden_bytes: int
    output_bytes: int

    @property
    def ranks_per_token(self) -> float:
        """Other ranks that a token's hidden state goes to, on average."""
        share = self.num_experts / self.ranks
        none = 1.0  # that none of top_k distinct experts is among a rank's
        for i in range(self.top_k):
            none *= max(0.0, self.num_experts - share - i) / (self.num_experts - i)
        return (self.ranks - 1) * (1 - none)

    @property
    def bytes_per_token(self) -> float:
        """Of a layer, that other ranks get: hidden states, pairs, and outputs that come back."""
        remote = self.top_k * (1 - 1 / self.ranks)
        return self.ranks_per_token * self.hidden_bytes + remote * (8 + self.output_bytes)

    def experts_read(self, tokens: float) -> float:
        """Distinct experts of a rank's share that so many tokens of all ranks need."""
        unused = (1 - self.top_k / self.num_experts) ** tokens
        return self.num_experts / self.ranks * (1 - unused)

    def seconds(
        self, tokens: float, expert_bytes: float, memory: float, network: float, latency: float
    ) -> tuple[float, float]:
        """(reading experts, exchanging) of a layer, where each rank has ``tokens`` of its own.

        memory, network : bytes/s of a rank, the network's in each direction. latency : seconds of
        an exchange, of which a round has three.
        """
        read = self.experts_read(tokens * self.ranks) * expert_bytes / memory
        waits = 3 * latency if self.ranks > 1 else 0.0
        return read, waits + tokens * self.bytes_per_token / network
