"""A data set of the Hugging Face hub, or a local folder in its layout, streamed."""

import os

from datasets import load_dataset

from trainer.data.dealing import Endless, Examples


class Hub(Endless):
    """`datasets.load_dataset(name, subset, split=split, streaming=True)`; an example is a document.

    Args:
        name: a name on the hub, or a local folder.
        subset: the data set's configuration, where it has several.
        split: which of its splits is read; documents are held out of this one.
        revision: a commit or tag; None = the newest. Name one, if the data may change before a run is resumed.
        text_field: the column that holds the text.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        subset: str | None = None,
        split: str = "train",
        revision: str | None = None,
        text_field: str = "text",
        tokenizer: str = "bytes",
        held_out: float = 0.001,
        on_error: str = "raise",
    ):
        super().__init__(tokenizer=tokenizer, held_out=held_out, on_error=on_error)
        if not isinstance(name, str) or not name:
            raise ValueError("data=hub needs data.name: a data set of the Hugging Face hub, or a local folder of one")
        for key, value in {"split": split, "text_field": text_field}.items():
            if not isinstance(value, str) or not value:
                raise ValueError(f"data.{key}={value!r} is no name; give a word, such as {key}=train or {key}=text")
        self.name, self.subset, self.split, self.revision = name, subset, split, revision
        self.text_field = text_field

    def identity(self) -> str:
        """A local folder goes by its last name, so that the data may move."""
        path = os.path.expanduser(self.name)
        name = os.path.basename(os.path.abspath(path)) if os.path.isdir(path) else self.name
        parts = [name, self.subset, self.split, self.revision]
        return "/".join(part for part in parts if part)

    def open(self) -> Examples:
        path = os.path.expanduser(self.name)
        path = path if os.path.isdir(path) else self.name
        try:
            found = load_dataset(path, self.subset, split=self.split, revision=self.revision, streaming=True)
        except Exception as error:  # many kinds: no such name, no access, no network, a bad split, a spoilt file
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"data.name={self.name} (subset {self.subset}, split {self.split}) cannot be had as a data set: "
                f"{lines[0]}; check the name, data.subset and data.split, or the network, or give a local folder"
            ) from error
        columns = found.column_names
        if columns is not None and self.text_field not in columns:
            names = ", ".join(columns)
            raise ValueError(f"{self.name} has no column {self.text_field!r} (it has: {names}); set data.text_field")
        return found.select_columns([self.text_field]) if columns is not None else found
