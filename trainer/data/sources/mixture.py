"""Several sources as one, mixed by tokens."""

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from trainer.data.apportion import Weights
from trainer.data.errors import DataError
from trainer.data.sources.base import Local, Source, build_source, kind_of
from trainer.data.tasks.base import SyntheticTask
from trainer.data.tokenizers import Tokenizer

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
EXAMPLE = "+data@data.sources.code=files data.sources.code.path='code/*.jsonl'"


class Mixture(Source):
    """Named sources, each of which gives its share of the tokens.

    Args:
        sources: {name: node of a source}.
        weights: {name: weight by tokens, or [[step, weight], ...]}, for every source.
        epochs: {name: times that a source may be read}; one without is read again without end. The
            others take over the share of a source that is used up.
        tokenizer: of every source; None = their own, which must be the same.
    """

    def __init__(
        self,
        *,
        sources: Mapping[str, Any] | None = None,
        weights: Mapping[str, Any] | None = None,
        epochs: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
    ):
        super().__init__(
            tokenizer="bytes" if tokenizer is None else tokenizer, held_out=0.0, on_error="raise"
        )
        if not sources or not isinstance(sources, Mapping):
            raise ValueError(f"data=mixture needs data.sources; name one as {EXAMPLE}")
        self.shared_tokenizer = tokenizer
        self.sources = {name: self._built(str(name), node) for name, node in sources.items()}
        self.weights = Weights(self._by_source("weights", weights or {}))
        missing = [name for name in self.sources if name not in self.weights.points]
        if missing:
            raise ValueError(
                f"data.weights.{missing[0]}: the source has no weight; write"
                f" data.weights.{missing[0]}=1"
            )
        self.epochs: dict[str, float] = {}
        for name, times in self._by_source("epochs", epochs or {}).items():
            self.epochs[name] = self._epochs(name, times)
        aimed = [name for name, source in self.sources.items() if source.aimed]
        if aimed and len(aimed) < len(self.sources):
            others = [name for name in self.sources if name not in aimed]
            raise ValueError(
                f"data.sources.{aimed[0]}: its targets are no next tokens, and those of"
                f" data.sources.{others[0]} are; mix sources of one kind"
            )

    @property
    def aimed(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See Source.aimed."""
        return all(source.aimed for source in self.sources.values())

    @property
    def sets_targets(self) -> bool:
        """See Source.sets_targets."""
        return any(source.sets_targets for source in self.sources.values())

    @property
    def holds_out(self) -> bool:
        """See Source.holds_out."""
        return any(source.holds_out for source in self.sources.values())

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer that all sources have.

        Raises:
            ValueError: two have different ones.
        """
        first: tuple[str, Tokenizer] | None = None
        for name, source in self.sources.items():
            try:
                tokenizer = source.tokenizer()
            except ValueError as error:
                raise DataError(placed(str(error), name, source)) from error
            if first is None:
                first = (name, tokenizer)
                continue
            own = (tokenizer.fingerprint, tokenizer.vocabulary)
            if own != (first[1].fingerprint, first[1].vocabulary):
                raise ValueError(
                    f"data.sources.{name}: its tokens are others than those of"
                    f" data.sources.{first[0]}; give all one tokenizer (and pad_vocabulary_to), as"
                    " data.tokenizer=PATH"
                )
        assert first is not None, "there is a source"
        return first[1]

    def _built(self, name: str, node: Any) -> Source:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"data.sources.{name[:64]}: a name has letters, digits, - and _; name it so"
            )
        if not isinstance(node, Mapping) or "_target_" not in node:
            raise ValueError(
                f"data.sources.{name}: a source is needed; choose one as"
                f" +data@data.sources.{name}=files"
            )
        kind = kind_of(node["_target_"])
        if issubclass(kind, Mixture):
            raise ValueError(
                f"data.sources.{name}: a mixture cannot be mixed; name its sources here instead"
            )
        settings = dict(node)
        takes = "tokenizer" in inspect.signature(kind).parameters
        if self.shared_tokenizer is not None and takes:
            settings["tokenizer"] = self.shared_tokenizer
        try:
            return build_source(settings)
        except ValueError as error:
            raise ValueError(placed(str(error), name, kind, settings)) from error

    def _by_source(self, key: str, values: Any) -> dict[str, Any]:
        """Returns a setting by the names of sources."""
        if not isinstance(values, Mapping):
            raise ValueError(f"data.{key}={values}: a value for each source is needed, by its name")
        unknown = [name for name in values if name not in self.sources]
        if unknown:
            known = ", ".join(self.sources)
            raise ValueError(f"data.{key}.{unknown[0]}: there is no such source; known: {known}")
        return dict(values)

    def _epochs(self, name: str, times: Any) -> float:
        source = self.sources[name]
        if not isinstance(source, Local):
            kind = "draws new ones" if isinstance(source, SyntheticTask) else "is read as it comes"
            raise ValueError(
                f"data.epochs.{name}: of data.sources.{name}, which {kind}, no number of documents"
                " is known; leave it out"
            )
        if isinstance(times, bool) or not isinstance(times, int | float) or not 0 < times < 1e9:
            raise ValueError(
                f"data.epochs.{name}={times} is no number of times above 0; leave it out for no"
                " limit"
            )
        return float(times)


def placed(message: str, name: str, source: Source | type[Source], keys: Iterable[str] = ()) -> str:
    """Returns a message about a source with its settings named where they stand in the mixture.

    Args:
        message: about the source alone.
        name: of the source.
        source: itself, or its class.
        keys: further settings that the message may name, such as unknown ones.
    """
    kind = source if isinstance(source, type) else type(source)
    known = {*inspect.signature(kind).parameters, "_target_", *keys}
    names = "|".join(re.escape(key) for key in sorted(known))
    # Not within a path, such as texts/data.path.
    return re.sub(rf"(?<![\w/.~-])data\.(?=({names})\b)", f"data.sources.{name}.", message)
