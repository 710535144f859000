"""What is wrong with a document, and what is done about it: raised, or counted and left out."""

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
    """Data that cannot be read, in the user's words; ends a run with the code of data, disk and
    network."""

    def __init__(self, message: str, code: int = BAD_RUN):
        super().__init__(message, code)


class ReadReport:
    """Counts what was left out of the data, by cause, or raises at the first fault.

    on_error: raise = the first fault is a DataFault; skip = faults are counted and the first few
    messages kept.
    """

    def __init__(self, on_error: str = "raise"):
        self.on_error = on_error
        self.counts: dict[str, int] = {}
        self.examples: list[str] = []
        self.empty = 0
        self.silent = 0  # documents with text, of which the tokenizer makes no token

    def fault(self, cause: str, message: str) -> None:
        """Tell of one file or document that cannot be read; `cause` is a short plural noun to count
        it under."""
        if self.on_error == "raise":
            raise DataError(
                f"{message}; mend or remove it, or leave such data out with data.on_error=skip"
            )
        self.passed(cause, message)

    def passed(self, cause: str, message: str) -> None:
        """Count what is left out without being a fault, whatever `on_error` says."""
        self.counts[cause] = self.counts.get(cause, 0) + 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(message)

    @property
    def left_out(self) -> int:
        return sum(self.counts.values())

    def text(self) -> str:
        """One line for the log; empty where nothing was left out."""
        parts = [f"{count} {cause}" for cause, count in sorted(self.counts.items())]
        if self.empty:
            parts.append(f"{self.empty} documents without text")
        if self.silent:
            parts.append(f"{self.silent} documents of which the tokenizer makes no token")
        first = f" (first: {self.examples[0]})" if self.examples else ""
        return f"left out {', '.join(parts)}{first}" if parts else ""

    def facts(self) -> dict[str, Any]:
        """The report as plain data; `Report.of` is the way back."""
        seen = {"on_error": self.on_error, "counts": self.counts, "examples": self.examples}
        return seen | {"empty": self.empty, "silent": self.silent}

    @staticmethod
    def of(facts: dict[str, Any]) -> "ReadReport":
        report = ReadReport(facts["on_error"])
        report.counts = facts["counts"]
        report.examples = facts["examples"]
        report.empty = facts["empty"]
        report.silent = facts["silent"]
        return report
