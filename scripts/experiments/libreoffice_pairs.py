"""python -m scripts.experiments.libreoffice_pairs FOLDER [KEY=VALUE ...]: paragraphs of the help of
LibreOffice in two languages, as pairs for data=pairs.

    source=en-us target=de    languages, as Debian's packages libreoffice-help-* name them
    packages=FOLDER           where the two .deb files lie; left out, apt-get fetches them
    least_words=2             words of a paragraph, in both languages
    most_words=12
    held_out=0.03             share of the paragraphs that is held out
    vocabulary=2000           tokens of a byte-level BPE of both languages

Writes train.jsonl, held_out.jsonl ({"source": ..., "target": ...} a line) and tokenizer.json, and
prints how many pairs there are. Nothing of it belongs into a repository: the texts are under the
Mozilla Public License 2.0. Exit status 2 for a wish that cannot be honoured. Needs Debian's tools
dpkg-deb and, without packages=, apt-get.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.entry import run_command
from trainer.errors import BAD_CONFIG, UserError

DEFAULTS: Mapping[str, str | int | float] = {
    "source": "en-us",
    "target": "de",
    "packages": "",
    "least_words": 2,
    "most_words": 12,
    "held_out": 0.03,
    "vocabulary": 2000,
}
NAMED = ("par_id", "hd_id")  # how the numbers of paragraphs and headings begin
END = "<|endoftext|>"
# Elements that are never closed.
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
HELP = "usr/share/libreoffice/help"


class Element(NamedTuple):
    """An open element, and the number of its paragraph; empty where it has none."""

    tag: str
    number: str


class Paragraphs(HTMLParser):
    """Texts of the paragraphs and headings of a page by their numbers, white space made single.

    What is nested in a paragraph belongs to it, unless it is a paragraph with a number of its own.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[Element] = []
        self.texts: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See HTMLParser."""
        if tag == "br":
            self.handle_data(" ")
        if tag not in VOID:
            number = dict(attrs).get("id") or ""
            self.open.append(Element(tag, number if number.startswith(NAMED) else ""))

    def handle_endtag(self, tag: str) -> None:
        """See HTMLParser; what was left open inside ends with its parent."""
        for place in range(len(self.open) - 1, -1, -1):
            if self.open[place].tag == tag:
                del self.open[place:]
                return

    def handle_data(self, data: str) -> None:
        """See HTMLParser."""
        for element in reversed(self.open):
            if element.number:
                self.texts.setdefault(element.number, []).append(data)
                return

    def paragraphs(self) -> dict[str, str]:
        """Returns the texts so far."""
        found = {}
        for number, parts in self.texts.items():
            found[number] = " ".join("".join(parts).split())
        return found


class Pair(NamedTuple):
    """A paragraph in both languages."""

    source: str
    target: str


def pairs_of(source: Path, target: Path) -> Iterator[Pair]:
    """Yields the paragraphs that two folders of pages have in common, by page and number."""
    for page in sorted(source.rglob("*.html")):
        other = target / page.relative_to(source)
        if not other.is_file():
            continue
        found = []
        for path in (page, other):
            parser = Paragraphs()
            parser.feed(path.read_text(encoding="utf-8"))
            found.append(parser.paragraphs())
        here, there = found
        for number, text in here.items():
            if number in there:
                yield Pair(text, there[number])


def chosen(pairs: Iterator[Pair], least_words: int, most_words: int) -> list[Pair]:
    """Returns the pairs of that many words, each source once, without what was not translated."""
    found: dict[str, Pair] = {}
    for pair in pairs:
        counts = len(pair.source.split()), len(pair.target.split())
        fits = least_words <= min(counts) and max(counts) <= most_words
        if fits and pair.source != pair.target:
            found.setdefault(pair.source, pair)
    return list(found.values())


def is_held_out(pair: Pair, share: float) -> bool:
    """Tells whether a pair is held out, by its source alone."""
    digest = hashlib.blake2b(pair.source.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def train_tokenizer(pairs: list[Pair], vocabulary: int) -> Tokenizer:
    """Learns a byte-level BPE from both sides."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
    return tokenizer


def unpack(language: str, packages: str, folder: Path) -> Path:
    """Unpacks the help of a language into a folder, and returns that of its pages.

    Raises:
        UserError: there is no such package, or it holds no pages.
    """
    name = f"libreoffice-help-{language}"
    place = Path(packages) if packages else folder
    if not packages:
        _call(["apt-get", "download", name], folder)
    found = sorted(place.glob(f"{name}_*.deb"))
    if not found:
        raise UserError(
            f"packages={packages}: no {name}_*.deb lies there; fetch it there, or leave"
            " packages= out"
        )
    inside = folder / language
    _call(["dpkg-deb", "-x", str(found[-1].resolve()), str(inside)], folder)
    pages = sorted((inside / HELP).glob("*/text"))
    if not pages:
        raise UserError(f"{found[-1]}: no pages under {HELP}/*/text; name another language")
    return pages[0]


def _call(words: list[str], folder: Path) -> None:
    try:
        subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f"{words[0]}: not found; the pairs are made on a Debian system") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(
            f"{' '.join(words)}: {said}; fetch the packages by hand, and name their"
            " folder with packages="
        ) from error


def settings_of(words: list[str]) -> tuple[Path, dict[str, str | int | float]]:
    """Reads the command line.

    Raises:
        UserError: no folder, an unknown key, or a value of another kind.
    """
    folders = [word for word in words if "=" not in word]
    if len(folders) != 1:
        raise UserError(
            "one folder is wanted: python -m scripts.experiments.libreoffice_pairs pairs"
        )
    settings = dict(DEFAULTS)
    for word in words:
        key, sign, text = word.partition("=")
        if not sign:
            continue
        if key not in DEFAULTS:
            raise UserError(f"unknown {word}; choose one of {', '.join(DEFAULTS)}")
        try:
            settings[key] = type(DEFAULTS[key])(text)
        except ValueError as error:
            raise UserError(f"{word}: a number is wanted, as {key}={DEFAULTS[key]}") from error
    if not 0 < float(settings["held_out"]) < 1:
        raise UserError(f"held_out={settings['held_out']}: a share between 0 and 1 is wanted")
    return Path(folders[0]), settings


def main(words: list[str]) -> int:
    try:
        folder, settings = settings_of(words)
        with tempfile.TemporaryDirectory() as place:
            pages = []
            for side in ("source", "target"):
                pages.append(unpack(str(settings[side]), str(settings["packages"]), Path(place)))
            pairs = chosen(
                pairs_of(*pages), int(settings["least_words"]), int(settings["most_words"])
            )
        write(pairs, folder, float(settings["held_out"]), int(settings["vocabulary"]))
    except UserError as fault:
        print(fault, file=sys.stderr)
        return BAD_CONFIG
    return 0


def write(pairs: list[Pair], folder: Path, held_out: float, vocabulary: int) -> None:
    """Writes the files, and prints how many pairs each has."""
    parts: dict[str, list[Pair]] = {"train": [], "held_out": []}
    for pair in pairs:
        parts["held_out" if is_held_out(pair, held_out) else "train"].append(pair)
    for name, part in parts.items():
        if not part:
            raise UserError(f"{name}.jsonl would have no pair; use another held_out or most_words")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            lines = [json.dumps(pair._asdict(), ensure_ascii=False) + "\n" for pair in part]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            print(f"{folder / name}.jsonl: {len(part):,} pairs")
        tokenizer = train_tokenizer(parts["train"], vocabulary)
        tokenizer.save(str(folder / "tokenizer.json"))
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; name another folder") from error
    print(f"{folder / 'tokenizer.json'}: {tokenizer.get_vocab_size():,} tokens")


if __name__ == "__main__":
    run_command(main, __doc__)
