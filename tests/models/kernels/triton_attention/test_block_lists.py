"""The lists of blocks: what is visible is in one of them, and a block that is computed without a
look at the mask holds nothing that is hidden, or that lies beyond the keys."""

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as some

from models.kernels.triton_attention.block_lists import block_lists
from models.masks.algebra import Mask, visible
from models.span import TEXT
from tests.models.masks.test_algebra import ROWS, row
from tests.support.random_masks import ALL_MASKS

ONE_DOCUMENT = [(0, 0, TEXT, 9)]
SIDES = some.sampled_from([(4, 4), (8, 4), (4, 8)])


def listed(ranges, row_number, block):
    """(blocks of the other axis that are clear, those that are masked), each once."""
    first, clear, start, masked = ranges.index[row_number, block].tolist()
    blocks = [
        [each for a, b in ranges.ranges[low:high].tolist() for each in range(a, b)]
        for low, high in ((first, clear), (start, masked))
    ]
    assert len(set(blocks[0] + blocks[1])) == len(blocks[0]) + len(blocks[1])
    return blocks


@given(ALL_MASKS, ROWS, ROWS, SIDES)
@example(Mask(), ONE_DOCUMENT, ONE_DOCUMENT, (4, 4))
@settings(max_examples=200, deadline=None)
def test_a_block_is_clear_masked_or_left_out_as_its_pairs_are(mask, queries, keys, sides):
    q, k = row(queries), row(keys)
    heads = torch.tensor([1, 0])
    seen = visible(mask, q, k, heads)[0].expand(2, -1, -1).numpy()
    high, wide = sides
    blocks = -(-seen.shape[1] // high), -(-seen.shape[2] // wide)
    # Queries beyond the end are not stored; keys beyond it must be hidden.
    padded = np.zeros((2, seen.shape[1], blocks[1] * wide), dtype=bool)
    padded[:, :, : seen.shape[2]] = seen
    lists = block_lists(mask, q, k, sides)
    of_keys = [listed(lists.of_keys, 0, j) for j in range(blocks[1])]
    for i in range(blocks[0]):
        clear, masked = listed(lists.of_queries, 0, i)
        for j in range(blocks[1]):
            pairs = padded[:, i * high : (i + 1) * high, j * wide : (j + 1) * wide]
            assert pairs.all() or j not in clear
            assert not pairs.any() or j in clear + masked
            assert [i in some for some in of_keys[j]] == [j in clear, j in masked]
