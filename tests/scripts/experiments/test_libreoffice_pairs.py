"""Pairs of the help of LibreOffice: what a paragraph is, which are kept, and what is written."""

import json
import shutil
import subprocess

import pytest

from scripts.experiments.libreoffice_pairs import (
    END,
    HELP,
    Pair,
    Paragraphs,
    chosen,
    is_held_out,
    main,
    pairs_of,
)
from trainer.data.tokenizers import load

PAGE = """<html><head><title>T</title><meta charset="utf-8"></head><body>
<h1 id="hd_id1" dir="auto"><a name="x"></a>A &amp; B</h1>
<p id="par_id2" class="paragraph">Choose <span class="menu">File - {0}</span>,<br>then
   press <b>OK</b>.</p><p>no number</p>
<table><tr><td><p id="par_id3">outer <img src="x"><span id="par_id4">inner {0}</span> again</p>
</td></tr></table>
<p id="other">other</p></body></html>"""


def paragraphs(text):
    parser = Paragraphs()
    parser.feed(text)
    return parser.paragraphs()


def test_paragraphs_are_texts_by_their_numbers():
    assert paragraphs(PAGE.format("Save")) == {
        "hd_id1": "A & B",
        "par_id2": "Choose File - Save, then press OK.",
        "par_id3": "outer again",
        "par_id4": "inner Save",
    }


def test_pages_and_numbers_that_both_have_are_paired(tmp_path):
    for language, word in (("en", "Save"), ("de", "Sichern")):
        folder = tmp_path / language / "shared"
        folder.mkdir(parents=True)
        (folder / "a.html").write_text(PAGE.format(word))
        (folder / f"{language}.html").write_text(PAGE.format(word))
    (tmp_path / "de" / "shared" / "a.html").write_text(
        PAGE.format("Sichern").replace("par_id4", "par_id9")
    )
    found = list(pairs_of(tmp_path / "en", tmp_path / "de"))
    assert found == [
        Pair("A & B", "A & B"),
        Pair("Choose File - Save, then press OK.", "Choose File - Sichern, then press OK."),
        Pair("outer again", "outer again"),
    ]


def test_each_source_is_taken_once_and_what_was_not_translated_is_left_out():
    pairs = [Pair("a b", "c d"), Pair("a b", "e f"), Pair("a", "c d"), Pair("x y", "x y")]
    pairs += [Pair("g h", "i j k l"), Pair("m n", "o p")]
    assert chosen(iter(pairs), 2, 3) == [Pair("a b", "c d"), Pair("m n", "o p")]


def test_the_source_alone_says_what_is_held_out():
    held = [is_held_out(Pair(f"paragraph {number}", "x"), 0.2) for number in range(2000)]
    assert 320 < sum(held) < 480
    assert held[:9] == [is_held_out(Pair(f"paragraph {number}", "y"), 0.2) for number in range(9)]


@pytest.fixture
def packages(tmp_path):
    """Two .deb files as Debian has them, of a few pages."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is a tool of Debian")
    folder = tmp_path / "packages"
    folder.mkdir()
    for language, tag in (("en-us", "en-US"), ("de", "de")):
        root = tmp_path / language
        pages = root / HELP / tag / "text"
        pages.mkdir(parents=True)
        for number in range(40):
            text = f'<p id="par_id1">the {language} page {number}</p>'
            (pages / f"{number}.html").write_text(text)
        (root / "DEBIAN").mkdir()
        control = f"Package: libreoffice-help-{language}\nVersion: 1\nArchitecture: all\n"
        control += "Maintainer: nobody <nobody@example.org>\nDescription: none\n"
        (root / "DEBIAN" / "control").write_text(control)
        file = folder / f"libreoffice-help-{language}_1_all.deb"
        subprocess.run(["dpkg-deb", "-b", root, file], check=True, capture_output=True)
    return folder


def test_packages_become_pairs_and_a_tokenizer(packages, tmp_path, capsys):
    folder = tmp_path / "pairs"
    words = [str(folder), f"packages={packages}", "held_out=0.3", "vocabulary=300"]
    assert main(words) == 0
    rows = {}
    for name in ("train", "held_out"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines]
    assert len(rows["train"]) + len(rows["held_out"]) == 40 and rows["held_out"]
    number = rows["train"][0]["source"].split()[-1]
    assert rows["train"][0] == {
        "source": f"the en-us page {number}",
        "target": f"the de page {number}",
    }
    tokenizer = load(str(folder / "tokenizer.json"))
    text = "the de page Ü 7"
    assert tokenizer.decode(tokenizer.encode(text)).strip() == text
    assert tokenizer.end_of_text == tokenizer.number(END)
    assert f"train.jsonl: {len(rows['train'])} pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one folder is wanted"),
        (["out", "words=3"], "unknown words=3"),
        (["out", "most_words=many"], "most_words=many: a number is wanted"),
        (["out", "held_out=1"], "held_out=1.0: a share"),
        (["out", "packages=/nowhere"], "packages=/nowhere: no libreoffice-help-en-us_*.deb"),
    ],
)
def test_each_mistake_gives_one_message(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
