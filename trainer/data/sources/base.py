"""Base of every source of documents, in a fixed order, and its construction from a config."""

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.data.documents import DocumentEncoder, PlainText
from trainer.data.errors import ON_ERROR, ReadReport
from trainer.data.sources.readers import MOST, File, Reader, ReadRequest, documents
from trainer.data.tokenizers import Tokenizer, load, padded_to
from trainer.files.import_by_name import import_module_of

LARGEST_MULTIPLE = 1 << 16  # of data.pad_vocabulary_to


class Source:
    """Documents in a fixed order, and the settings that every source takes.

    Attributes:
        content_decides: settings that say where the data lies or how it is read. A run that goes on
            may spell them otherwise: the fingerprint of what is read tells whether it is the same
            data.
        aimed: whether examples have targets that are no tokens of the row.
        has_edges: whether tokens are nodes that come with the nodes they read.
        has_requests: whether tokens are parts of requests in several modalities, in columns.

    Args:
        tokenizer: bytes, the path of a tokenizer.json or of a folder with one, or a name on the
            Hugging Face hub.
        held_out: fraction of the documents kept from training, 0 <= held_out < 1.
        on_error: raise = a document that cannot be read ends the run; skip = it is counted and left
            out.
        max_document_bytes: of a text, a line of JSON, or a page of a Parquet file; a larger one
            cannot be read.
        pad_vocabulary_to: the tokenizer's vocabulary is rounded up to a multiple of it.
    """

    content_decides: tuple[str, ...] = ("tokenizer", "on_error", "max_document_bytes")
    aimed: bool = False
    has_edges: bool = False
    has_requests: bool = False

    def __init__(
        self,
        *,
        tokenizer: str,
        held_out: float,
        on_error: str,
        max_document_bytes: int = MOST,
        pad_vocabulary_to: int = 1,
    ):
        if (
            isinstance(max_document_bytes, bool)
            or not isinstance(max_document_bytes, int)
            or max_document_bytes < 1
        ):
            raise ValueError(
                f"data.max_document_bytes={max_document_bytes} is no number of bytes; give 1 or"
                f" more, such as {MOST}"
            )
        if (
            isinstance(pad_vocabulary_to, bool)
            or not isinstance(pad_vocabulary_to, int)
            or not 1 <= pad_vocabulary_to <= LARGEST_MULTIPLE
        ):
            raise ValueError(
                f"data.pad_vocabulary_to={pad_vocabulary_to} is no number of tokens from 1 to"
                f" {LARGEST_MULTIPLE}; give 1 for none, or a multiple such as 64"
            )
        self.pad_vocabulary_to = pad_vocabulary_to
        self.max_document_bytes = max_document_bytes
        if not isinstance(tokenizer, str) or not tokenizer:
            raise ValueError(
                f"data.tokenizer={tokenizer!r} names no tokenizer; give bytes, a path or a hub name"
            )
        if (
            isinstance(held_out, bool)
            or not isinstance(held_out, int | float)
            or not 0 <= held_out < 1
        ):
            raise ValueError(
                f"data.held_out={held_out} is no fraction of the documents; give 0 (none) up to"
                " below 1"
            )
        if on_error not in ON_ERROR:
            raise ValueError(f"data.on_error={on_error} is unknown; give raise or skip")
        self.tokenizer_name = tokenizer
        self.held_out = float(held_out)
        self.on_error = on_error

    @property
    def holds_out(self) -> bool:
        """Tells if any documents are kept for evaluation."""
        return self.held_out > 0

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer of the documents."""
        return padded_to(load(self.tokenizer_name), self.pad_vocabulary_to)

    @property
    def has_source(self) -> bool:
        """Tells if a document has a source, which only a model of two streams reads."""
        return False

    @property
    def sets_targets(self) -> bool:
        """Tells if the data says what is to be learned of it; of plain text that is every token."""
        return False


class Local(Source, ABC):
    """Finite data in files of this machine, tokenised once into a cache.

    Args:
        cache: folder for the tokens; null = longspan in the user's cache folder.
    """

    content_decides = (*Source.content_decides, "cache")
    readers: Mapping[str, Reader] = {}  # for each suffix, how such a file is read
    text_field = "text"

    def __init__(
        self,
        *,
        tokenizer: str,
        held_out: float,
        on_error: str,
        cache: str | None,
        max_document_bytes: int = MOST,
        pad_vocabulary_to: int = 1,
    ):
        super().__init__(
            pad_vocabulary_to=pad_vocabulary_to,
            tokenizer=tokenizer,
            held_out=held_out,
            on_error=on_error,
            max_document_bytes=max_document_bytes,
        )
        if cache is not None and not (isinstance(cache, str) and cache):
            raise ValueError(
                f"data.cache={cache!r} is no folder; give a path, or null for the user's cache"
                " folder"
            )
        self.cache = cache

    @property
    def holds_out(self) -> bool:
        """See Source.holds_out."""
        return self.held_out > 0 or self.apart() is not None

    def apart(self) -> "Local | None":
        """Returns the source of the held-out documents where those are files of their own.

        None = a fraction of the documents is held out.
        """
        return None

    def encoder(self, tokenizer: Tokenizer) -> DocumentEncoder:
        """Returns what makes documents of the texts: each text is one."""
        return PlainText(tokenizer)

    @abstractmethod
    def files(self) -> list[File]:
        """The files to read, in order. Raises ValueError where there are none, or one is of an
        unknown kind."""

    def documents(
        self, files: list[File], report: ReadReport, limit: int | None = None
    ) -> Iterator[tuple[str, str]]:
        """(name, text) of every document, in order; `limit` is the number of bytes after which to
        leave each file."""
        for file in files:
            yield from documents(
                file,
                ReadRequest(self.text_field, report, limit, self.max_document_bytes),
                self.readers,
            )

    def key(self, files: list[File]) -> str:
        """Changes whenever what is read from the files may change."""
        seen = hashlib.blake2b(digest_size=16)
        seen.update(
            repr(
                (type(self).__name__, self.text_field, self.on_error, self.max_document_bytes)
            ).encode()
        )
        for file in files:
            seen.update(
                repr((file.path, file.name, file.size, file.stamp)).encode("utf-8", "surrogatepass")
            )
        return seen.hexdigest()


def build_source(data: Mapping[str, Any] | Source) -> Source:
    """The source that a data node names by `_target_`, made with the node's other keys.

    Raises ValueError for a class that cannot be had, an argument it does not take, or a value it
    refuses.
    """
    if isinstance(data, Source):
        return data
    settings = dict(data)
    target = settings.pop("_target_", None)
    kind = kind_of(target)
    takes = inspect.signature(kind).parameters
    unknown = [key for key in settings if key not in takes]
    if unknown:
        raise ValueError(
            f"data.{unknown[0]} is not a setting of {target}; it takes {', '.join(takes)}"
        )
    for key, parameter in takes.items():
        named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if named and parameter.default is parameter.empty and key not in settings:
            raise ValueError(
                f"data.{key}: {kind.__name__} needs it and it is not set; write data.{key}=VALUE"
            )
    return kind(**settings)


def kind_of(target: Any) -> type[Source]:
    """The class that a data node names by `_target_`. Raises ValueError where it cannot be had, or
    is no source."""
    try:
        module, name = import_module_of(str(target))
        kind = getattr(module, name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"data._target_={target} cannot be imported: {error}; use data=stdlib, files or hub"
        ) from error
    if not (inspect.isclass(kind) and issubclass(kind, Source)):
        raise ValueError(
            f"data._target_={target} is no source of documents; use data=stdlib, data=files or"
            " data=hub"
        )
    if inspect.isabstract(kind):
        methods = ", ".join(sorted(getattr(kind, "__abstractmethods__", ())))
        raise ValueError(f"data._target_={target} does not define {methods}; write that first")
    return kind
