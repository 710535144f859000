"""No positions: the causal mask alone gives the order."""

from models.positions.base import Position


class NoPosition(Position):
    """Adds no positions (Kazemnejad et al. 2023, arXiv:2305.19466)."""
