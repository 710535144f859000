"""Recalling: a store over ranks. Queries visit the shards; what they chose is fetched once from
wherever it lies.

Every rank holds a share of the store. Queries go round the ring together with the best that they
found so far (score, position, and where it lies), so that memory does not grow with the number of
ranks; then each rank asks for the distinct entries that its queries chose. The store itself never
travels. P rotations and three exchanges; in backward nothing is sent.

Letters: B rows, T local queries, P ranks, H heads, K found, U entries brought.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.kernels.knn import KeyValueStore, Neighbors, no_neighbors, search
from models.primitives.knn import KNN, distinct, taken
from models.span import Span
from parallel.collectives import Communicator


class ShardedKNN(KNN):
    """Stands in for a Recall whose queries and stores lie over the ranks of `wire`; a store is as
    large on every rank."""

    def __init__(self, core: KNN, communicator: Communicator):
        super().__init__(core.mask, core.count)
        self.core = core
        self.communicator = communicator

    def search(self, q: Tensor, stores: Sequence[KeyValueStore], span: Span) -> Neighbors:
        """As Recall.search; entries are numbered rank by rank, end to end."""
        size = self.communicator.size
        rank = self.communicator.rank
        first = rank * sum(store.entries for store in stores)
        best = no_neighbors(q, self.count)
        for step in range(size):
            source = span.sharding.spans[(rank - step) % size]
            best = search(q, stores, self.mask, source, best, first)
            q, *found = self.communicator.ring_shift([q, *best], "recall").wait()
            best = Neighbors(*found)
        return best

    def bring(
        self, entry: Tensor, stores: Sequence[KeyValueStore], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As Recall.bring, each entry from the rank that has it."""
        wanted, index = distinct(entry)
        each = sum(store.entries for store in stores)
        edges = torch.arange(self.communicator.size + 1, device=wanted.device) * each
        asks = torch.searchsorted(wanted, edges).diff()
        asked = torch.cat(
            self.communicator.all_to_all(
                list(asks.split(1)), [1] * self.communicator.size, "recall asks"
            )
        )
        given = asked.tolist()
        got = asks.tolist()
        named = self.communicator.all_to_all(
            list((wanted % max(1, each)).split(got)), given, "recall asks"
        )
        key, value = taken(stores, torch.cat(named), device)
        width = key.shape[1]
        packed = torch.cat([key, value], 1)
        sizes = [n * packed.shape[1] for n in got]
        came = torch.cat(
            self.communicator.all_to_all(list(packed.split(given)), sizes, "recall entries")
        ).view(-1, packed.shape[1])
        return came[:, :width], came[:, width:], index
