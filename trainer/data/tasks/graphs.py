"""Graphs: nodes with a feature and edges, and classes of the nodes as targets."""

from typing import Any, NamedTuple

import networkx
import numpy as np

from models.loss import IGNORE
from models.primitives.neighbors import NO_NEIGHBOR
from models.ranges import Many, Share
from trainer.data.errors import DataError
from trainer.data.split import digest
from trainer.data.tasks.base import Example, SyntheticTask, bounds, whole
from trainer.files.limited_reader import Unreadable, contents, json_value

LARGEST_FILE = 256 << 20
LARGEST_NUMBER = 1 << 20  # of a feature or a class of a file: a table of as many vectors is built


class Graph(NamedTuple):
    """A graph of n nodes.

    Attributes:
        features: [n] number of each node's feature.
        labels: [n] class of each node, None where it is not known.
        edges: (source, destination) of each edge; the destination reads the source.
    """

    features: list[int]
    labels: list[int | None]
    edges: list[tuple[int, int]]


class Graphs(SyntheticTask):
    """A document is a graph; a token is a node, with its feature and the nodes that it reads.

    Several graphs are trained on inductively: some are held out whole. A single one is trained on
    transductively: all of its nodes are always read, and some of their classes are held out.

    Args:
        graph: trust: graphs are generated. Of each node, a feature names a class and says whether
            it is to be trusted; those that are not name a wrong one, and theirs is asked for. A
            node can be told apart by its neighbours, if it reads those that are to be trusted.
            karate: the 34 members of a karate club and the side that each took (Zachary 1977, as
            networkx has it); a feature is the number of the node. A path: a file of graphs, see
            `read_graphs`.
        min_nodes, max_nodes, classes, degree, same_class, false_features: of graph=trust: nodes of
            a graph, classes of nodes, nodes that each reads, the share of these that are of its
            own class, and the share of nodes that are not to be trusted.
        held_out, per_row: as in SyntheticTask; of a single graph a share of the nodes.
    """

    aimed = True
    has_edges = True
    content_decides = (*SyntheticTask.content_decides, "graph")

    def __init__(
        self,
        *,
        graph: str = "trust",
        min_nodes: Many = 24,
        max_nodes: Many = 48,
        classes: Many = 4,
        degree: Many = 6,
        same_class: Share = 0.7,
        false_features: Share = 0.6,
        held_out: float = 0.1,
        per_row: int | None = None,
    ):
        super().__init__(held_out=held_out, per_row=per_row)
        self.graphs: list[Graph] = []
        if graph == "trust":
            self._describe(min_nodes, max_nodes, classes, degree)
            self.same_class = same_class
            self.false_features = false_features
            return
        self.graphs = [karate()] if graph == "karate" else read_graphs(graph)
        self.longest = max(len(each.features) for each in self.graphs)
        self.degree = max(1, *(most_sources(each) for each in self.graphs))
        self.vocabulary = 1 + max(largest_number(each) for each in self.graphs)
        if len(self.graphs) == 1:
            nodes = len(self.graphs[0].features)
            self.hidden = held_out_nodes(nodes, self.held_out)
        self.columns = (1 + self.degree,)

    def _describe(self, min_nodes: int, max_nodes: int, classes: int, degree: int) -> None:
        """Takes over the sizes of generated graphs."""
        self.sizes = bounds(min_nodes, max_nodes, 2, names=("min_nodes", "max_nodes"))
        self.classes = whole("classes", classes, 2)
        self.degree = whole("degree", degree, 1)
        if self.degree >= min_nodes:
            raise DataError(
                f"data.degree={degree}: a graph of data.min_nodes={min_nodes} nodes has too few"
                f" others to read; use data.degree={min_nodes - 1} or less"
            )
        self.longest = max_nodes
        self.vocabulary = 2 * self.classes
        self.columns = (1 + self.degree,)

    def drawn(self, random: np.random.Generator, split: str) -> Example | None:
        """See SyntheticTask; of a single graph, all nodes and the classes of the split."""
        if len(self.graphs) != 1:
            return super().drawn(random, split)
        example = self._example(self.graphs[0])
        asked = np.zeros(len(example.tokens), bool)
        asked[self.hidden] = True
        if split == "train":
            asked = ~asked
        assert example.targets is not None, "a graph has classes"
        return example._replace(targets=np.where(asked, example.targets, IGNORE))

    def example(self, random: np.random.Generator) -> Example:
        if self.graphs:
            return self._example(self.graphs[int(random.integers(len(self.graphs)))])
        return self._example(self._generated(random))

    def _example(self, graph: Graph) -> Example:
        """Returns a graph as tokens [n, 1 + K]: features, and the lists of neighbours."""
        nodes = len(graph.features)
        tokens = np.full((nodes, *self.columns), NO_NEIGHBOR, np.int64)
        tokens[:, 0] = graph.features
        filled = np.ones(nodes, np.int64)
        for source, destination in graph.edges:
            tokens[destination, filled[destination]] = source
            filled[destination] += 1
        targets = np.array([IGNORE if label is None else label for label in graph.labels], np.int64)
        return Example(tokens, np.ones(nodes, bool), targets)

    def _generated(self, random: np.random.Generator) -> Graph:
        nodes = int(random.integers(*self.sizes, endpoint=True))
        classes = random.integers(self.classes, size=nodes)
        trusted = random.random(nodes) >= self.false_features
        other = (classes + random.integers(1, self.classes, nodes)) % self.classes
        named = np.where(trusted, classes, other)
        same = classes[:, None] == classes
        unlike = ~same
        np.fill_diagonal(same, False)
        # A node is chosen as often as the others of its kind, and never the reader itself.
        weight = same * (self.same_class / np.maximum(1, same.sum(1, keepdims=True)))
        weight += unlike * ((1 - self.same_class) / np.maximum(1, unlike.sum(1, keepdims=True)))
        weight += 1e-9
        np.fill_diagonal(weight, 1e-300)
        # The first of exponential times of these rates: draws without replacement, all at once.
        times = random.exponential(size=weight.shape) / weight
        sources = np.argpartition(times, self.degree - 1, axis=1)[:, : self.degree]
        edges = []
        for node, chosen in enumerate(sources.tolist()):
            edges += [(source, node) for source in chosen]
        labels = [None if sure else int(label) for sure, label in zip(trusted, classes)]
        return Graph((2 * named + trusted).tolist(), labels, edges)


def karate() -> Graph:
    """Returns Zachary's karate club; an edge is read from both ends."""
    club = networkx.karate_club_graph()
    edges = [*club.edges, *((b, a) for a, b in club.edges)]
    sides = {"Mr. Hi": 0, "Officer": 1}
    labels: list[int | None] = [sides[club.nodes[node]["club"]] for node in club.nodes]
    return Graph(list(club.nodes), labels, edges)


def held_out_nodes(nodes: int, share: float) -> list[int]:
    """Chooses the nodes of a single graph whose classes are held out, the same in every run."""
    order = sorted(range(nodes), key=lambda node: digest(f"node {node}"))
    return sorted(order[: round(share * nodes)])


def most_sources(graph: Graph) -> int:
    """Counts the edges into the node that has most."""
    counts = np.zeros(len(graph.features), np.int64)
    for _, destination in graph.edges:
        counts[destination] += 1
    return int(counts.max())


def largest_number(graph: Graph) -> int:
    """Returns the largest number of a feature or a class."""
    return max(*graph.features, *(label for label in graph.labels if label is not None), 0)


def read_graphs(path: str) -> list[Graph]:
    """Reads a file of graphs, one a line.

    A line is a JSON object: `features` [n], a number for each node; `labels` [n], its class, or
    null where that is not known; `edges`, pairs [source, destination] of nodes from 0 to n - 1.

    Raises:
        DataError: no such file, or a line that is no graph.
    """
    where = f"data.graph={path}"
    try:
        text = contents(path, LARGEST_FILE).decode("utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{where}: there is no such file; use trust, karate or a path") from error
    except (OSError, UnicodeDecodeError, Unreadable) as error:
        raise DataError(f"{where} cannot be read ({error}); give a file of JSON lines") from error
    graphs = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            graphs.append(_graph(line, f"{where}, line {number}"))
    if not graphs:
        raise DataError(f"{where} holds no graph; give one a line")
    return graphs


def _graph(line: str, where: str) -> Graph:
    """Reads a line; raises DataError, which begins with `where`."""
    try:
        value = json_value(line, where)
    except Unreadable as error:
        raise DataError(f"{error}; give a JSON object a line") from error
    if not isinstance(value, dict) or not {"features", "labels", "edges"} <= value.keys():
        raise DataError(f"{where}: a graph is an object of features, labels and edges")
    features, labels, edges = value["features"], value["labels"], value["edges"]
    if not (isinstance(features, list) and isinstance(labels, list) and isinstance(edges, list)):
        raise DataError(f"{where}: features, labels and edges are lists")
    if not features:
        raise DataError(f"{where}: a graph of no nodes has nothing to learn; leave the line out")
    if len(labels) != len(features):
        raise DataError(
            f"{where}: {len(features)} features and {len(labels)} labels; give one of each a node,"
            " null for a label that is not known"
        )
    for number in [*features, *(label for label in labels if label is not None)]:
        if not _is_number(number, LARGEST_NUMBER):
            raise DataError(
                f"{where}: {number!r} is no feature or label; use whole numbers from 0 to"
                f" {LARGEST_NUMBER - 1}"
            )
    nodes = len(features)
    for edge in edges:
        if not (isinstance(edge, list) and len(edge) == 2):
            raise DataError(f"{where}: edge {edge!r} is no pair [source, destination]")
        for node in edge:
            if not _is_number(node, nodes):
                raise DataError(
                    f"{where}: edge {edge} is to node {node!r}, which is not there; nodes are 0 to"
                    f" {nodes - 1}"
                )
    return Graph(features, labels, [(source, destination) for source, destination in edges])


def _is_number(value: Any, above: int) -> bool:
    # Python counts True as the number 1.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < above
