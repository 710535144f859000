"""objective=next_token: every token predicts the one after it in its document."""

from trainer.objectives.base import Objective


class NextToken(Objective):
    """Language modelling (Radford et al. 2018), with the data's own targets where it has any.

    Meant for layers that see nothing after a token, or nothing but a prefix: tokens of a prefix
    that is seen at once are never targets.
    """
