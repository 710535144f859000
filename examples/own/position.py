"""A position of one's own:

python -m trainer position._target_=examples.own.position.PartialRope position.share=0.25
"""

import torch
from torch import Tensor

from models.positions.base import Position
from models.positions.rope import Rope
from models.ranges import Share
from models.span import Span


class PartialRope(Position):
    """Rotates a share of the channels of a head and leaves the others without positions.

    Source: GPT-NeoX-20B (Black et al. 2022, arXiv:2204.06745), which rotates a quarter of them.

    Args:
        share: of the channels.
        theta: as in Rope.
    """

    def __init__(self, share: Share = 0.25, theta: float = 10000.0):
        self.share = share
        self.rope = Rope(theta)

    def rotate(self, hidden: Tensor, span: Span) -> Tensor:
        """Turns the first channels of queries or keys [B, T, H, D] by the tokens' positions."""
        # Channels are turned in pairs.
        turned = max(2, int(hidden.shape[-1] * self.share) // 2 * 2)
        first = self.rope.rotate(hidden[..., :turned], span)
        return torch.cat([first, hidden[..., turned:]], -1)
