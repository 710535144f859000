"""The choice of the experts that a token visits, and of their weights.

Letters: B rows, T tokens, E experts, k experts of a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.moe.router import top_experts


@dataclass(frozen=True)
class ExpertChoice:
    """The rule by which a mixture chooses; models/moe/topk.py describes the settings.

    Raises:
        ValueError: an unknown score, or groups in which the experts do not lie.
    """

    experts: int
    top: int
    score: str = "softmax"
    normalised: bool = True
    groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"unknown score={self.score}; choose softmax or sigmoid")
        if self.groups == 1 and self.top_groups == 1:
            return
        size, rest = divmod(self.experts, self.groups)
        possible = 1 <= self.top_groups <= self.groups and self.top <= self.top_groups * size
        if rest or size < 2 or not possible:
            raise ValueError(
                f"groups={self.groups}, top_groups={self.top_groups}: {self.experts} experts must"
                f" lie in groups of the same size, two or more in each, and {self.top} experts of a"
                " token in the chosen ones; use groups=1 top_groups=1 for a choice among all"
            )

    def scores(self, logits: Tensor) -> Tensor:
        """[B, T, E] -> [B, T, E], each from 0 to 1."""
        return logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()

    def probabilities(self, scores: Tensor) -> Tensor:
        """[B, T, E] -> [B, T, E] that add up to 1, for the balancing loss."""
        if self.score == "softmax":
            return scores
        return scores / scores.sum(-1, keepdim=True)

    def choose(self, logits: Tensor, scores: Tensor, bias: Tensor | None) -> Tensor:
        """Returns the experts of each token, [B, T, k] int64.

        Args:
            bias: [E], added to the scores for the choice alone.
        """
        if self.groups > 1:
            ranked = scores if bias is None else scores + bias
            ranked = within_groups(ranked, self.groups, self.top_groups)
        else:
            ranked = logits if bias is None else scores + bias
        return top_experts(ranked, self.top)

    def weights(self, logits: Tensor, scores: Tensor, choice: Tensor) -> Tensor:
        """Returns the weights of the chosen experts, [B, T, k]."""
        if not self.normalised:
            return scores.gather(-1, choice)
        if self.score == "softmax":
            return logits.gather(-1, choice).softmax(-1)
        chosen = scores.gather(-1, choice)
        # Sigmoids of very low logits are all 0.
        return chosen / (chosen.sum(-1, keepdim=True) + 1e-20)


def within_groups(scores: Tensor, groups: int, count: int) -> Tensor:
    """Returns scores [B, T, E] with -inf outside the best `count` of equal groups of neighbours.

    A group counts as much as its best two experts together. Source: DeepSeek-AI 2024
    (arXiv:2412.19437), section 2.1.2.
    """
    grouped = scores.detach().unflatten(-1, (groups, -1))
    chosen = top_experts(grouped.topk(2, -1).values.sum(-1), count)
    outside = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=scores.device)
    outside = outside.scatter(-1, chosen, False)
    return grouped.masked_fill(outside[..., None], -torch.inf).flatten(-2)
