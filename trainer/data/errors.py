"""Errors of documents, which are raised, or counted while the document is left out."""

from typing import Any

from trainer.errors import BAD_RUN, UserError

ON_ERROR = ("raise", "skip")
EXAMPLES = 5  # messages kept in a report
NONE_HELD_OUT = (
    "data.held_out=0 keeps no document for evaluation; give a fraction, or evaluation.every=0"
)
ONE_DOCUMENT = (
    "a single document cannot be both trained on and held out; give more documents, or"
    " evaluation.every=0"
)


class DataError(UserError, ValueError):
    """Data that cannot be read; ends a run with the exit code of data, disk and network."""

    def __init__(self, message: str, code: int = BAD_RUN):
        super().__init__(message, code)


class ReadReport:
    """Counts the documents that were left out, by cause, or raises at the first one.

    Args:
        on_error: "raise" turns the first fault into a DataError; "skip" counts faults and keeps the
            first few messages.

    Attributes:
        cut_short: True once a file was left before its end, at the limit of a quick look.
    """

    def __init__(self, on_error: str = "raise"):
        self.on_error = on_error
        self.counts: dict[str, int] = {}
        self.examples: list[str] = []
        self.empty = 0
        self.silent = 0  # documents whose text yields no token
        self.cut_short = False

    def fault(self, cause: str, message: str) -> None:
        """Reports one file or document that cannot be read.

        Args:
            cause: a short plural noun to count it under.
            message: names the file, and the line where known.

        Raises:
            DataError: `on_error` is "raise".
        """
        if self.on_error == "raise":
            raise DataError(
                f"{message}; mend or remove it, or leave such data out with data.on_error=skip"
            )
        self.passed(cause, message)

    def passed(self, cause: str, message: str) -> None:
        """Counts a document that is left out without being a fault, whatever `on_error` is."""
        self.counts[cause] = self.counts.get(cause, 0) + 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(message)

    @property
    def left_out(self) -> int:
        """Number of documents and files that were left out."""
        return sum(self.counts.values())

    def text(self) -> str:
        """Returns one line for the log; empty where nothing was left out."""
        parts = [f"{count} {cause}" for cause, count in sorted(self.counts.items())]
        if self.empty:
            parts.append(f"{self.empty} documents without text")
        if self.silent:
            parts.append(f"{self.silent} documents of which the tokenizer makes no token")
        if not parts:
            return ""
        first = f" (first: {self.examples[0]})" if self.examples else ""
        return f"left out {', '.join(parts)}{first}"

    def facts(self) -> dict[str, Any]:
        """Returns the report as plain data for a file; the inverse of `of`."""
        return {
            "on_error": self.on_error,
            "counts": self.counts,
            "examples": self.examples,
            "empty": self.empty,
            "silent": self.silent,
        }

    @staticmethod
    def of(facts: dict[str, Any]) -> "ReadReport":
        """Restores a report from `facts`."""
        report = ReadReport(facts["on_error"])
        report.counts = facts["counts"]
        report.examples = facts["examples"]
        report.empty = facts["empty"]
        report.silent = facts["silent"]
        return report
