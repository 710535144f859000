"""No positions: the causal mask alone tells order."""

from models.positions.base import Position


class NoPosition(Position):
    """Source: Kazemnejad et al. 2023 (arXiv:2305.19466)."""
