"""Driver of KNN: searches a store that is sharded over ranks and fetches only the chosen entries.

Every rank holds a share of the store. Queries go round the ring together with their best matches so
far (score, position and entry number), so that memory does not grow with the number of ranks; then
each rank asks for the distinct entries that its queries chose. The store itself never travels. P
rotations and three exchanges; nothing is sent in backward.

Letters: B rows, T local queries, P ranks, H heads, K neighbours, U distinct entries fetched.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.kernels.knn import KeyValueStore, NearestKeys, no_neighbors, search
from models.primitives.knn import KNN, distinct, taken
from models.scores import Tensors
from models.span import Span
from parallel.collectives import Communicator


class ShardedKNN(KNN):
    """Replaces a KNN whose queries and stores are sharded over the ranks of `communicator`.

    A store has the same number of entries on every rank.
    """

    def __init__(self, core: KNN, communicator: Communicator):
        super().__init__(core.mask, core.count)
        self.core = core
        self.place = core.place
        self.communicator = communicator

    def forward(
        self, query: Tensors, stores: Sequence[KeyValueStore], params: Tensors, *, span: Span
    ) -> tuple[Tensor, Tensor]:
        """Runs KNN.forward over every rank's store."""
        if span.sharding is None:  # every rank has these queries and all entries
            return self.core(query, stores, params, span=span)
        return super().forward(query, stores, params, span=span)

    def search(self, q: Tensor, stores: Sequence[KeyValueStore], span: Span) -> NearestKeys:
        """Runs KNN.search over every rank's store; entries are numbered rank by rank."""
        size = self.communicator.size
        rank = self.communicator.rank
        first_entry = rank * sum(store.entries for store in stores)
        best = no_neighbors(q, self.count)
        for step in range(size):
            source = span.sharding.spans[(rank - step) % size]
            best = search(q, stores, self.mask, source, best, first_entry)
            # After the last step this brings every query and its matches home.
            q, *matches = self.communicator.ring_shift([q, *best], "recall").wait()
            best = NearestKeys(*matches)
        return best

    def bring(
        self, entry: Tensor, stores: Sequence[KeyValueStore], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs KNN.bring, each entry from the rank that holds it."""
        ranks = self.communicator.size
        wanted, index = distinct(entry)
        local_entries = sum(store.entries for store in stores)
        # Entries are sorted, so the wanted ones of each rank are neighbours.
        rank_starts = torch.arange(ranks + 1, device=wanted.device) * local_entries
        wanted_counts = torch.searchsorted(wanted, rank_starts).diff()
        received_counts = self.communicator.all_to_all(
            list(wanted_counts.split(1)), [1] * ranks, "recall asks"
        )
        given = torch.cat(received_counts).tolist()
        taken_counts = wanted_counts.tolist()
        local_numbers = wanted % max(1, local_entries)
        requests = self.communicator.all_to_all(
            list(local_numbers.split(taken_counts)), given, "recall asks"
        )
        key, value = taken(stores, torch.cat(requests), device)
        key_width = key.shape[1]
        packed = torch.cat([key, value], 1)
        packed_width = packed.shape[1]
        sizes = [count * packed_width for count in taken_counts]
        parts = self.communicator.all_to_all(list(packed.split(given)), sizes, "recall entries")
        entries = torch.cat(parts).view(-1, packed_width)
        return entries[:, :key_width], entries[:, key_width:], index
