"""objective=next_token: every token predicts the one after it in its document."""

from trainer.objectives.base import Objective


class NextToken(Objective):
    """The rows as they are (Radford et al. 2018), with the data's own targets where it has any.

    Goes with layers that see nothing ahead of a token; and with a prefix that is seen from before
    it, whose tokens are then nobody's targets.
    """
