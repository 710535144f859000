"""What a batch promises."""

import torch

from models.loss import IGNORE
from trainer.data.batch import Batch


def small():
    return Batch(
        tokens=torch.tensor([[5, 6, 9, 7, 9], [1, 2, 3, 9, 0]]),
        doc=torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, -1]]),
        pos=torch.tensor([[3, 4, 5, 0, 1], [0, 1, 2, 3, 0]]),
        role=torch.zeros(2, 5, dtype=torch.int64),
    )


def test_a_target_is_the_next_token_of_the_same_document():
    assert small().targets().tolist() == [[6, 9, IGNORE, 9], [2, 3, 9, IGNORE]]
    assert small().predictions() == 6


def test_padding_predicts_nothing_even_behind_padding():
    batch = small()
    batch.doc[1] = -1
    assert (batch.targets()[1] == IGNORE).all()


def test_inputs_and_addresses_leave_out_the_last_token():
    assert small().inputs().tolist() == [[5, 6, 9, 7], [1, 2, 3, 9]]
    assert small().span().pos.tolist() == [[3, 4, 5, 0], [0, 1, 2, 3]]
    assert small().span().doc.shape == small().span().role.shape == (2, 4)


def test_a_part_behind_the_last_row_is_filled_with_padding():
    part = small().part(1, 4)
    assert part.tokens.shape == (3, 5) and part.tokens[0].tolist() == [1, 2, 3, 9, 0]
    assert (part.doc[1:] == -1).all() and part.predictions() == 3
