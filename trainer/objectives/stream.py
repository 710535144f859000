"""Opens the rows of a run: a stream of text with the objective applied to it."""

import hashlib

import torch

from trainer.config.instantiate import instantiate
from trainer.config.node_checks import as_node
from trainer.config.schema import Config
from trainer.data.batch import Batch
from trainer.data.open import open_stream
from trainer.data.sources.base import build_source
from trainer.data.streams.base import Cursor, OwnRows, Stream
from trainer.errors import BAD_RUN, UserError
from trainer.objectives.base import Objective, Symbols


class ObjectiveStream(Stream):
    """Applies an objective to every batch of a stream of text.

    Args:
        text: rows of `objective.reads(context_length)` tokens.
        objective: makes inputs and targets of them.
        context_length: tokens in a row as the model reads it.
        seed: of the objective's choices; held-out data has the same one under every seed of a run.
    """

    def __init__(self, text: Stream, objective: Objective, *, context_length: int, seed: int):
        self.text = text
        self.objective = objective
        self.context_length = context_length
        self.seed = seed
        self.tokenizer = text.tokenizer
        self.symbols: Symbols = objective.symbols(text.tokenizer, context_length)
        self.vocabulary = self.symbols.vocabulary
        self.batches = text.batches
        self.rows = text.rows
        self.by_source = {
            name: ObjectiveStream(part, objective, context_length=context_length, seed=seed)
            for name, part in text.by_source.items()
        }
        # Everything that the rows depend on, so that a resume under other settings is refused.
        settings = f"{type(objective).__name__} {sorted(vars(objective).items())}"
        identity = f"{text.fingerprint} {settings} {context_length} {seed} {self.symbols}"
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()

    def start(self) -> Cursor:
        """Returns the cursor of the text, with a fingerprint that includes the objective."""
        return self.text.start() | {"fingerprint": self.fingerprint}

    def read(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        """See Stream.read."""
        rows = self.read_rows(cursor, 0, self.rows)
        return rows.batch, rows.cursor

    def read_rows(self, cursor: Cursor, first: int, last: int) -> OwnRows:
        """See Stream.read_rows; the objective makes each row by itself."""
        self.admit(cursor)
        at = cursor | {"fingerprint": self.text.fingerprint}
        text = self.text.read_rows(at, first, last)
        # Numbers go on over the epochs, so that a text is masked anew each time it is read.
        numbers = cursor["rows"] + torch.arange(first, last)
        batch = self.objective.apply(
            text.batch, numbers, self.seed, self.symbols, self.context_length
        )
        following = text.cursor | {"fingerprint": self.fingerprint}
        return text._replace(batch=batch, cursor=following)

    def follow(self, cursor: Cursor) -> Cursor:
        """See Stream.follow."""
        return self.text.follow(cursor) | {"fingerprint": self.fingerprint}

    def progress(self, cursor: Cursor) -> str:
        """See Stream.progress."""
        return self.text.progress(cursor)

    def describe(self, steps: int | None = None) -> str:
        """See Stream.describe."""
        objective = self.objective.describe(self.symbols, self.context_length)
        return f"{self.text.describe(steps)}; {objective}"


def objective_of(config: Config) -> Objective:
    """Builds the objective that a config names.

    Raises:
        UserError: an unknown class or setting.
    """
    return instantiate(config.objective, {}, "objective")


def vocabulary_of(config: Config) -> int:
    """Returns the number of tokens of the data and the objective together."""
    tokenizer = build_source(as_node(config.data)).tokenizer()
    return objective_of(config).symbols(tokenizer, config.context_length).vocabulary


def open_rows(config: Config, split: str) -> Stream:
    """Opens the batches that the model of a config is trained on, or its held-out ones.

    Args:
        config: of the run.
        split: train or held_out.

    Raises:
        UserError: settings or data that cannot be read.
    """
    objective = objective_of(config)
    try:
        text = open_stream(
            as_node(config.data),
            context_length=objective.reads(config.context_length),
            rows=config.rows,
            seed=config.seed,
            split=split,
            lanes=config.memory.carries,
        )
    except ValueError as error:
        raise UserError(str(error), BAD_RUN) from error
    if not objective.rewrites:
        return text
    # Held-out losses of runs with different seeds must be over the same targets.
    seed = config.seed if split == "train" else 0
    return ObjectiveStream(text, objective, context_length=config.context_length, seed=seed)
