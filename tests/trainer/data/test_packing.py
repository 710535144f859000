"""Rows laid out of documents, small enough to read."""

import numpy as np

from trainer.data.packing import DocumentSlice, lay_out, rows_of


def plain(row):
    return [part.tolist() for part in row]


def test_a_row_numbers_documents_from_zero_and_restarts_a_cut_one():
    pieces = [DocumentSlice(7, 5, np.array([1, 2])), DocumentSlice(8, 0, np.array([3, 4, 5]))]
    assert plain(lay_out(pieces, 7, goes_on=False)) == [
        [1, 2, 3, 4, 5, 0, 0],
        [0, 0, 1, 1, 1, -1, -1],
        [0, 1, 0, 1, 2, 0, 0],
    ]
    assert plain(lay_out(pieces, 5, goes_on=True)) == [
        [1, 2, 3, 4, 5],
        [7, 7, 8, 8, 8],
        [5, 6, 0, 1, 2],
    ]


def test_a_row_of_nothing_is_padding():
    assert plain(lay_out([], 3, goes_on=False)) == [[0, 0, 0], [-1, -1, -1], [0, 0, 0]]


def test_rows_are_counted_by_predictions():
    assert [rows_of(tokens, 4) for tokens in (2, 5, 6, 9, 10)] == [1, 1, 2, 2, 3]
