"""Rows laid out of documents, small enough to read."""

import numpy as np

from models.span import GIVEN, TEXT
from trainer.data.packing import DocumentSlice, lay_out, rows_of


def plain(row):
    return [part.tolist() for part in row]


def test_a_row_numbers_documents_from_zero_and_restarts_a_cut_one():
    pieces = [DocumentSlice(7, 5, np.array([1, 2])), DocumentSlice(8, 0, np.array([3, 4, 5]))]
    assert plain(lay_out(pieces, 7, goes_on=False)) == [
        [1, 2, 3, 4, 5, 0, 0],
        [0, 0, 1, 1, 1, -1, -1],
        [0, 1, 0, 1, 2, 0, 0],
        [TEXT] * 7,
    ]
    assert plain(lay_out(pieces, 5, goes_on=True)) == [
        [1, 2, 3, 4, 5],
        [7, 7, 8, 8, 8],
        [5, 6, 0, 1, 2],
        [TEXT] * 5,
    ]


def test_a_row_says_which_tokens_are_given():
    given = np.array([True, True, False])
    pieces = [DocumentSlice(0, 0, np.array([3, 4, 5]), given), DocumentSlice(1, 0, np.array([6]))]
    row = lay_out(pieces, 5, goes_on=False)
    assert row.role.tolist() == [GIVEN, GIVEN, TEXT, TEXT, TEXT]


def test_a_row_of_nothing_is_padding():
    assert plain(lay_out([], 3, goes_on=False)) == [[0] * 3, [-1] * 3, [0] * 3, [TEXT] * 3]


def test_rows_are_counted_by_predictions():
    assert [rows_of(tokens, 4) for tokens in (2, 5, 6, 9, 10)] == [1, 1, 2, 2, 3]
