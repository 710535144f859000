"""A run follows its data to another place: the fingerprint of what is read decides, not the text of
a setting."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.support.pool import ranks
from tests.trainer.data.test_tokenizers import trained
from tests.trainer.verify.test_whole_runs import in_rank
from trainer.data.open import open_stream
from trainer.data.sources.hub import Hub
from trainer.errors import UserError
from trainer.preflight.prepare import load_config
from trainer.run_dir import make_run_dir, other_run, record

FILES, HUB = "trainer.data.sources.files.Files", "trainer.data.sources.hub.Hub"


def write(folder, count=40, start=0):
    """Two files of JSON lines."""
    folder.mkdir(parents=True)
    for part in ("a", "b"):
        lines = [
            json.dumps({"text": f"{part} {number} the quick brown fox"})
            for number in range(start, start + count)
        ]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def fingerprint(node, tmp_path):
    extra = {"cache": str(tmp_path / "cache")} if node["_target_"] == FILES else {}
    return open_stream(
        {**node, "held_out": 0.1, "tokenizer": "bytes", **extra}, context_length=16, rows=2, seed=0
    ).fingerprint


def test_local_files_are_the_same_however_their_glob_is_spelt_and_wherever_they_lie(
    tmp_path, monkeypatch
):
    write(tmp_path / "x" / "texts")
    shutil.copytree(tmp_path / "x" / "texts", tmp_path / "y" / "moved")
    os.symlink(tmp_path / "x" / "texts", tmp_path / "linked")
    monkeypatch.chdir(tmp_path / "x")
    spellings = [
        tmp_path / "x/texts/*.jsonl",
        tmp_path / "x/texts/[ab].jsonl",
        tmp_path / "x//./texts/../texts/*.jsonl",
        tmp_path / "x/*/*.jsonl",
        tmp_path / "x/**/*.jsonl",
        tmp_path / "y/moved/*.jsonl",
        tmp_path / "linked/*.jsonl",
        "texts/*.jsonl",
        "./texts/?.jsonl",
    ]
    assert (
        len({fingerprint({"_target_": FILES, "path": str(path)}, tmp_path) for path in spellings})
        == 1
    )
    write(tmp_path / "z", start=1)
    assert fingerprint(
        {"_target_": FILES, "path": str(tmp_path / "z/*.jsonl")}, tmp_path
    ) != fingerprint({"_target_": FILES, "path": "texts/*.jsonl"}, tmp_path)


def test_a_streamed_folder_is_the_same_under_any_name_and_no_other_of_that_name(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    first = write(tmp_path / "x" / "texts")
    shutil.copytree(first, tmp_path / "y" / "moved")
    folders = (first, tmp_path / "y" / "moved", f"{tmp_path}/x/./texts/")
    assert (
        len({fingerprint({"_target_": HUB, "name": str(folder)}, tmp_path) for folder in folders})
        == 1
    )
    other = write(tmp_path / "w" / "texts")
    with open(other / "b.jsonl", "a") as file:  # the same name, and the same first document
        file.write('{"text": "one more"}\n')
    assert fingerprint({"_target_": HUB, "name": str(other)}, tmp_path) != fingerprint(
        {"_target_": HUB, "name": str(first)}, tmp_path
    )


def test_a_name_on_the_hub_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Hub(name="some/set", revision="abc").content() == "some/set/train/abc"


COMMON = (
    "context_length=16",
    "batch_tokens=32",
    "model.width=8",
    "model.layers=1",
    "model.heads=1",
    "evaluation.every=0",
    "checkpoint.every=1",
    "wandb.mode=disabled",
    "log.plots=false",
    "engine=single",
    "data.held_out=0",
)


@pytest.mark.parametrize("source", ["files", "hub"])
def test_a_run_goes_on_with_its_data_elsewhere_and_not_with_others(source, tmp_path):
    run_dir = tmp_path / "run"
    first = write(tmp_path / "x" / "texts")
    tokenizer = trained(tmp_path / "tokenizer.json", ["<|endoftext|>"])

    def words(folder, steps, cache, tokenizer):
        place = f"data.path={folder}/*.jsonl" if source == "files" else f"data.name={folder}"
        more = (f"data.cache={tmp_path / cache}",) if source == "files" else ()
        return (
            *COMMON,
            f"steps={steps}",
            "schedule.extend=stretch",
            f"data={source}",
            place,
            *more,
            f"data.tokenizer={tokenizer}",
            f"run_dir={run_dir}",
        )

    make_run_dir(run_dir)
    assert ranks(1, recorded, words(first, 1, "c1", tokenizer), str(run_dir)) == [0]
    shutil.move(first, tmp_path / "y")
    (tmp_path / "tok").mkdir()
    shutil.move(tokenizer, tmp_path / "tok" / "tokenizer.json")
    moved = words(tmp_path / "y", 2, "c2", tmp_path / "tok")
    assert ranks(1, recorded, (*moved, "data.on_error=skip"), str(run_dir)) == [0]
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 2
    write(tmp_path / "other", start=7)
    for strange in (
        words(tmp_path / "other", 3, "c2", tmp_path / "tok"),
        words(tmp_path / "y", 3, "c2", "bytes"),
    ):
        (said,) = ranks(1, refused, strange, str(run_dir))
        assert "cannot resume from" in said and "belongs to other data" in said
    refusals = other_run(
        load_config(
            [
                *(word for word in moved if "held_out" not in word and "run_dir" not in word),
                "data.held_out=0.5",
            ]
        ),
        run_dir,
    )
    assert [refusal.partition("=")[0] for refusal in refusals] == ["data.held_out"]


def recorded(env, words, directory):
    """As a launch does it: judged against the run that the directory holds, recorded, run."""
    config = load_config(words, started=env.size)
    record(Path(directory), config)
    return in_rank(env, words, directory)


def refused(env, words, directory):
    with pytest.raises(UserError) as caught:
        in_rank(env, words, directory)
    return str(caught.value)
