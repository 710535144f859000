"""The reader with limits: whatever a file holds, plain data or one message with the file's name;
never a crash or a hang."""

import json
import os
import random
import shutil
import tracemalloc

import pytest
import yaml
from matplotlib.figure import Figure

from trainer import run_dir
from trainer.checkpoint.manifest import read_manifest
from trainer.config import compose, groups
from trainer.errors import UserError
from trainer.export import reopen
from trainer.files import limited_reader
from trainer.files.limited_reader import Unreadable, json_file, json_value, yaml_file, yaml_value
from trainer.launch.exit_report import ExitReport, read_report
from trainer.logs import jsonl, summary
from trainer.logs.caption import caption
from trainer.reports.plots import draw
from trainer.reports.runs import RunRecord, collect
from trainer.reports.variants import variants
from trainer.sweep.jobs import Job, outcome

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)
BAD_JSON = {
    "cut": b'{"a": [1, 2',
    "nothing": b"",
    "deep": b"[" * 200_000,
    "deep and whole": b"[" * 900 + b"]" * 900,
    "digits": b'{"step": ' + b"9" * 400 + b"}",
    "many digits": b"[" + b"9" * 5000 + b"]",
    "negative": b"-" + b"9" * 30,
    "exponent": b'{"loss": 1e999}',
    "not utf8": b'{"a": "\xff"}',
    "nul": b"\0" * 64,
}
BAD_YAML = {
    "aliases": BOMB.encode(),
    "merged aliases": (
        b"a: &a {x: [1,2,3]}\n"
        + b"".join(
            b"%c: &%c {k: {<<: *%c}, l: {<<: *%c}}\n" % (new, new, old, old)
            for old, new in zip(range(97, 119), range(98, 120))
        )
    ),
    "of itself": b"a: &a [*a]",
    "deep": b"[" * 5000,
    "deep by aliases": b"a: &a " + b"[" * 40 + b"]" * 40 + b"\nb: " + b"[" * 40 + b"*a" + b"]" * 40,
    "digits": b"steps: " + b"9" * 400,
    "many digits": b"steps: " + b"9" * 5000,
    "no such date": b"name: 2024-13-45",
    "tag": b"!!python/object/apply:os.system [echo]",
    "key": b"? [a, b]\n: c",
    "unknown alias": b"a: *nobody",
    "tab": b"a:\n\t- b",
    "not utf8": b"a: \xff",
    "control": b"a: \x01",
    "two": b"a: 1\n---\nb: 2",
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_one_message_with_the_file(name, tmp_path):
    (tmp_path / "x.json").write_bytes(BAD_JSON[name])
    with pytest.raises(Unreadable, match=r"x\.json") as error:
        json_file(tmp_path / "x.json")
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


@pytest.mark.parametrize("name", BAD_YAML)
def test_bad_yaml_is_one_message_with_the_file(name, tmp_path):
    (tmp_path / "x.yaml").write_bytes(BAD_YAML[name])
    tracemalloc.start()
    with pytest.raises(Unreadable, match=r"x\.yaml") as error:
        yaml_file(tmp_path / "x.yaml")
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "."):
        with pytest.raises((Unreadable, OSError)):
            json_file(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        yaml_file(tmp_path / "none")


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(8 << 30)
    tracemalloc.start()
    with pytest.raises(Unreadable, match="has 8589934592 bytes"):
        json_file(tmp_path / "huge.json")
    with pytest.raises(Unreadable, match="at most 1048576"):
        yaml_file(tmp_path / "huge.json")
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_good_files_are_read_as_the_libraries_read_them():
    tree = {"a": [1, -2.5e-300, True, None, "ü"], "b": {"c": 2**64 - 1, "d": [[]] * 3, "e": {}}}
    assert (
        json_value(json.dumps(tree).encode(), "x") == tree == yaml_value(yaml.safe_dump(tree), "x")
    )
    assert yaml_value("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}", "x") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 1, "e": 2},
    }
    assert json_value("[NaN, -Infinity]", "x")[1] == -float("inf")


def test_files_spoilt_anywhere_give_data_or_one_message(tmp_path):
    draw = random.Random(3)
    good = json.dumps(
        {"step": 3, "state": [{"$tensor": "a/b"}, [1.5, None, "x"]], "files": {"a": {"bytes": 7}}}
    ).encode()
    pieces = [
        b"[",
        b"{",
        b'"',
        b"&a ",
        b"*a",
        b"9" * 40,
        b"\xff",
        b"\0",
        b": ",
        b"- ",
        b"\n",
        b"!!x ",
        b"1e999",
        b"<<",
    ]
    for _ in range(600):
        span, piece = draw.randrange(len(good)), draw.choice(pieces)
        bad = good[:span] + piece + good[span + draw.randrange(4) :]
        for read in (json_value, yaml_value):
            try:
                read(bad, "x")
            except Unreadable as error:
                assert str(error).startswith("x")


def test_a_long_line_is_passed_in_pieces(tmp_path):
    (tmp_path / "x").write_bytes(b"ab\n" + b"c" * 25 + b"\n" + b"d" * 10 + b"\ne" * 2)
    with open(tmp_path / "x", "rb") as source:
        rows = list(limited_reader.lines(source, 10))
    assert rows == [(b"ab\n", 3), (b"c" * 11, 26), (b"d" * 10 + b"\n", 11), (b"e\n", 2), (b"e", 1)]


def test_settings_files_that_another_library_reads_are_vetted_alike(tmp_path):
    (tmp_path / "good.yaml").write_text("a: {b: [1, 2]}\n")
    limited_reader.vet_yaml(tmp_path / "good.yaml")
    for name in ("aliases", "deep", "tab", "not utf8"):
        (tmp_path / "x.yaml").write_bytes(BAD_YAML[name])
        with pytest.raises(Unreadable, match=r"x\.yaml"):
            limited_reader.vet_yaml(tmp_path / "x.yaml")


SPOILT = {
    "deep": b"[" * 5000,
    "digits": b'{"step": ' + b"9" * 400 + b"}",
    "kind": b"[1]",
    "not utf8": b"\xff",
    "nothing": b"",
}


@pytest.mark.parametrize("name", SPOILT)
def test_every_reader_of_a_run_directory_takes_a_spoilt_file_for_what_it_is(name, tmp_path):
    for file in (
        "config.yaml",
        "environment.json",
        "outcome.json",
        "summary.json",
        "metrics.jsonl",
        "evaluation.jsonl",
    ):
        (tmp_path / file).write_bytes(SPOILT[name] + b"\n" * file.endswith("l"))
    (run,) = collect(tmp_path)
    assert "config.yaml" in run.state or "outcome.json" in run.state
    with pytest.raises(UserError, match="outcome"):
        outcome(Job(0, (), tmp_path))
    with pytest.raises(ValueError, match="config"):
        run_dir.read_config(tmp_path)
    with pytest.raises(ValueError, match=r"summary\.json"):
        summary.read(tmp_path)
    (tmp_path / "manifest.json").write_bytes(SPOILT[name])
    with pytest.raises(ValueError, match=r"manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / "config.json").write_bytes(SPOILT[name])
    with pytest.raises(UserError, match="no exported model"):
        reopen(tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        '{"step": "3"}',
        '{"step": 1, "loss": [2]}',
        '{"step": true}',
        '{"step": 1, "value": 2}',
        "[" * 2000,
    ],
)
def test_a_row_of_another_kind_is_one_message(row, tmp_path):
    (tmp_path / "x.jsonl").write_text(f'{{"step": 1, "loss": null}}\n{row}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*x\.jsonl"):
        list(jsonl.read(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("text", [BOMB, "a:\n\t- b", "[" * 5000], ids=["aliases", "tab", "deep"])
def test_a_spoilt_settings_file_is_a_message_of_the_composing(text, tmp_path, monkeypatch):
    shutil.copytree(groups.CONF, tmp_path / "conf")
    monkeypatch.setattr(groups, "CONF", tmp_path / "conf")
    assert compose.compose(["steps=3"]).faults == []
    (tmp_path / "conf" / "optim" / "mine.yaml").write_text(text)
    compose._vet.cache_clear()
    (said,) = compose.compose(["optim=mine"]).faults
    assert "mine.yaml" in said
    compose._vet.cache_clear()


@pytest.mark.parametrize(
    "name", ["$x_{$", "a$b", "\\$b$", "_hidden", "name\nwith\x1b[31m", "\udcff", "$" * 300]
)
def test_any_name_can_stand_in_a_picture(name, tmp_path):
    runs = [RunRecord(name, label=name, curve=[(1.0, 2.0), (2.0, 1.0)], loss=1.0, finished=True)]
    assert draw(variants(runs), tmp_path)["curves"].is_file()
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([1, 2], label=caption(name))
    axes.legend()
    figure.savefig(tmp_path / "x.png")
    (label,) = axes.get_legend_handles_labels()[1]
    assert label.replace("\\$", "").count("$") == 0


@pytest.mark.parametrize("left", [b"", b"[0, ", b"[0]", b'["0", "x"]', b"[" * 5000, b"7", b"\xff"])
def test_what_rank_0_left_may_be_spoilt(left, tmp_path):
    assert read_report(tmp_path / "end") is None
    (tmp_path / "end").write_bytes(left)
    end = read_report(tmp_path / "end")
    assert end is not None and end.code == 1 and "cannot be read" in end.message
    (tmp_path / "end").write_text(json.dumps([143, "saved"]))
    assert read_report(tmp_path / "end") == ExitReport(143, "saved")
