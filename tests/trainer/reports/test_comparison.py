"""A report says first in which settings its runs differ, and compares them with a baseline."""

from pathlib import Path

import pytest
import yaml

from scripts.report import main
from tests.support.run_folders import sweep, trained
from tests.trainer.reports.test_page import Page
from trainer.errors import UserError
from trainer.reports.comparison import difference, differing_settings, find_baseline, ratio
from trainer.reports.runs import RunRecord, collect
from trainer.reports.variants import Variant, variants


def variant(name: str, *losses: float, seeds=None) -> Variant:
    numbers = seeds or range(1, len(losses) + 1)
    runs = [
        RunRecord(f"{name}{seed}", name, seed=seed, loss=loss, finished=True)
        for seed, loss in zip(numbers, losses, strict=True)
    ]
    return Variant(name, tuple(runs))


def loss(run: RunRecord) -> float:
    return run.loss


def test_a_difference_is_taken_seed_by_seed_where_seeds_are_the_same():
    one, other = variant("a", 1.0, 2.0, 3.0), variant("b", 0.9, 1.8, 2.9)
    found = difference(one, other, loss)
    assert found.pairs == 3
    assert found.spread.mean == pytest.approx(0.4 / 3)
    # Of the differences 0.1, 0.2, 0.1; the spread of each variant is ten times as large.
    assert found.spread.deviation == pytest.approx(0.0577350269)


def test_other_seeds_give_the_difference_of_means_and_the_sum_of_variances():
    one, other = variant("a", 1.0, 3.0), variant("b", 0.0, 0.5, seeds=(8, 9))
    found = difference(one, other, loss)
    assert found.pairs == 0
    assert found.spread.mean == pytest.approx(1.75)
    assert found.spread.deviation == pytest.approx((2.0 + 0.125) ** 0.5)
    assert ratio(one, other, loss) == pytest.approx(8.0)


def test_a_baseline_is_a_variant_or_one_of_its_runs():
    rows = [variant("a", 1.0), variant("b", 2.0)]
    assert find_baseline(rows, "b") is rows[1]
    assert find_baseline(rows, "a1") is rows[0]
    with pytest.raises(UserError, match="baseline=c: there is no such variant; known: a, b"):
        find_baseline(rows, "c")


def test_settings_that_differ_come_first_and_what_says_where_it_ran_is_none(tmp_path: Path):
    for number, width in enumerate((16, 32)):
        trained(tmp_path / str(number), 2.0 + number)
        tree = {
            "name": f"run{number}",
            "steps": 40,
            "seed": number,
            "run_dir": f"/somewhere/{number}",
            "model": {"width": width, "layers": 2, "pattern": []},
            "mixer": {"_target_": "a.B", "window": 8} if number else None,
        }
        (tmp_path / str(number) / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    rows = variants(collect(tmp_path))
    assert differing_settings(rows) == {
        "model.width": ["16", "32"],
        "mixer": ["null", "-"],
        "mixer._target_": ["-", "a.B"],
        "mixer.window": ["-", "8"],
    }
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report" / "index.html").read_text()
    assert text.index("Settings that differ") < text.index("<h2>Variants")
    assert Page(text).rows[0] == [
        "variant",
        "model.width",
        "mixer",
        *list(differing_settings(rows))[2:],
    ]


def test_the_page_compares_with_the_baseline(tmp_path: Path, capsys):
    place = sweep(tmp_path / "all")
    assert main([str(place), "baseline=model=full"]) == 0
    text = (place / "report" / "index.html").read_text()
    assert "<h2>Differences from model=full</h2>" in text
    page = Page(text)
    start = next(index for index, row in enumerate(page.rows) if row[-1] == "seeds")
    head, sliding, retnet, hyena = page.rows[start : start + 4]
    told = dict(zip(head, retnet))
    assert told["variant"] == "model=retnet"
    # The seeds move both alike, so that the spread of the difference is far below 0.05.
    mean, _, deviation = told["held-out loss"].partition(" \u00b1 ")
    assert mean == "+0.3973"
    assert float(deviation) < 0.002
    assert told["seeds"] == "3"
    assert told["tokens/s"] == "\u00d7 1.25"
    assert dict(zip(head, sliding))["seeds"] == "2"
    assert hyena[0] == "model=hyena"
    assert main([str(place), "baseline=nothing"]) == 2
    said = capsys.readouterr().err
    assert "baseline=nothing: there is no such variant; known: model=full" in said
    assert main([str(place), "baseline=a", "baseline=b"]) == 2
