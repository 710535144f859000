"""A data set of the Hugging Face hub, or a local folder in its layout, streamed."""

import os
from typing import Any

from datasets import DatasetBuilder, config, load_dataset, load_dataset_builder
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet

from trainer.data.errors import ReadReport
from trainer.data.folders import spare_folder, writable
from trainer.data.samples import sampled
from trainer.data.sources.arrow import is_saved
from trainer.data.sources.readers import MOST
from trainer.data.sources.rows import Rows, strangers
from trainer.data.sources.streaming import Examples, StreamingSource


class Hub(StreamingSource):
    """`datasets.load_dataset(name, subset, split=split, streaming=True)`; an example is a document.

    Args:
        name: a name on the hub, or a local folder.
        subset: the data set's configuration, where it has several.
        split: which of its splits is read; documents are held out of this one.
        revision: a commit or tag; None = the newest. Name one, if the data may change before a run
            is resumed.
        text_field: the column that holds the text.
    """

    content_decides = (*StreamingSource.content_decides, "name")

    def __init__(
        self,
        *,
        name: str | None = None,
        subset: str | None = None,
        split: str = "train",
        revision: str | None = None,
        text_field: str = "text",
        tokenizer: str = "bytes",
        pad_vocabulary_to: int = 1,
        held_out: float = 0.001,
        on_error: str = "raise",
        max_document_bytes: int = MOST,
    ):
        super().__init__(
            tokenizer=tokenizer,
            pad_vocabulary_to=pad_vocabulary_to,
            held_out=held_out,
            on_error=on_error,
            max_document_bytes=max_document_bytes,
        )
        if not isinstance(name, str) or not name:
            raise ValueError(
                "data=hub needs data.name: a data set of the Hugging Face hub, or a local folder"
                " of one"
            )
        for key, value in {"split": split, "text_field": text_field}.items():
            if not isinstance(value, str) or not value:
                raise ValueError(
                    f"data.{key}={value!r} is no name; give a word, such as {key}=train or"
                    f" {key}=text"
                )
        self.name = name
        self.subset = subset
        self.split = split
        self.revision = revision
        self.text_field = text_field

    def identity(self) -> str:
        """A local folder goes by its last name, so that the data may move."""
        path = os.path.expanduser(self.name)
        name = os.path.basename(os.path.abspath(path)) if os.path.isdir(path) else self.name
        parts = [name, self.subset, self.split, self.revision]
        return "/".join(part for part in parts if part)

    def content(self) -> str:
        """Of a local folder the files of the split, in order, by their sizes and samples of their
        bytes."""
        folder = self._place()
        if not os.path.isdir(folder):
            return self.identity()
        builder = load_dataset_builder(
            folder, self.subset, revision=self.revision, cache_dir=cache_folder()
        )
        files = (builder.config.data_files or {}).get(self.split, [])
        return f"{self.split} {self.text_field} {' '.join(sampled(str(file)) for file in files)}"

    def open(self) -> Examples:
        path = self._place()
        if os.path.isdir(path) and is_saved(path):
            raise ValueError(
                f"data.name={self.name} was written by save_to_disk and is read as files; use"
                f" data=files data.path={self.name}"
            )
        try:
            builder = load_dataset_builder(
                path, self.subset, revision=self.revision, cache_dir=cache_folder()
            )
            files = _files(builder)
            if files is not None and self.split in files:
                tables = isinstance(builder, Parquet)
                return Rows(
                    files[self.split],
                    parquet=tables,
                    field=self.text_field,
                    most=self.max_document_bytes,
                )
            if files is not None:
                raise ValueError(
                    f"there is no split {self.split}; it has {', '.join(map(str, files))}"
                )
            examples = load_dataset(
                path,
                self.subset,
                split=self.split,
                revision=self.revision,
                cache_dir=cache_folder(),
                streaming=True,
                **_only(builder, self.text_field),
            )
        except (
            Exception
        ) as error:  # many kinds: no such name, no access, no network, a bad split, a spoilt file
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"data.name={self.name} (subset {self.subset}, split {self.split}) cannot be had as"
                f" a data set: {lines[0]}; check the name, data.subset and data.split, or the"
                " network, or give a local folder"
            ) from error
        columns = examples.column_names
        if columns is not None and self.text_field not in columns:
            names = ", ".join(columns)
            raise ValueError(
                f"{self.name} has no column {self.text_field!r} (it has: {names}); set"
                " data.text_field"
            )
        return examples.select_columns([self.text_field]) if columns is not None else examples

    def leave_out(self, report: ReadReport) -> None:
        """Tells of the files of a local folder that are no part of the data set: the library takes
        one kind of them."""
        folder = self._place()
        if not os.path.isdir(folder):
            return
        builder = load_dataset_builder(
            folder, self.subset, revision=self.revision, cache_dir=cache_folder()
        )
        within = builder.config.data_files or {}
        for path, why in strangers(
            folder, [file for files in within.values() for file in files]
        ).items():
            report.passed("files that are no part of the data set", f"{path}: {why}")

    def _place(self) -> str:
        path = os.path.expanduser(self.name)
        return path if os.path.isdir(path) else self.name


def _files(builder: DatasetBuilder) -> dict[str, list[str]] | None:
    """The files of each split, where they are plain JSON or Parquet; None where the library has to
    read them itself."""
    config: Any = builder.config
    plain_json = (
        isinstance(builder, Json) and config.field is None and config.encoding in (None, "utf-8")
    )
    plain_table = isinstance(builder, Parquet) and config.filters is None
    if not (plain_json or plain_table) or not config.data_files:
        return None
    return {str(split): [str(file) for file in files] for split, files in config.data_files.items()}


def _only(builder: DatasetBuilder, field: str) -> dict[str, Any]:
    """Returns the arguments that keep the library from reading other columns."""
    return {"usecols": [field]} if isinstance(builder, Csv) else {}


def cache_folder() -> str | None:
    """Returns the library's folder for notes; None = its own, if that can be written."""
    usual = os.path.expanduser(str(config.HF_DATASETS_CACHE))
    return None if writable(usual) else spare_folder("datasets", f"{usual} cannot be written")
