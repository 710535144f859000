"""The page needs nothing but itself, every row is in it, and its pictures show the rows."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from scripts.report import main
from tests.support.run_folders import sweep, trained
from trainer.reports import plots
from trainer.reports.cost_plots import draw_costs
from trainer.reports.runs import collect
from trainer.reports.sheet import NARROW, WIDE
from trainer.reports.tables import table
from trainer.reports.variants import variants
from trainer.sweep.jobs import JobOutcome

EMPTY = ("meta", "img", "source", "wbr")  # elements that have no end


def points(line) -> list[tuple[float, float]]:
    """What a curve goes through."""
    return list(zip(line.get_xdata(), line.get_ydata()))


class Page(HTMLParser):
    """The rows of the tables, the pictures, and whether every element is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.kinds: list[str] = []
        self.images: list[bytes] = []
        self.narrow: list[bytes] = []
        self.addresses: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {key: value or "" for key, value in attrs}
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.kinds.append(told.get("class", ""))
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("img", "source"):
            head, _, data = told["src" if tag == "img" else "srcset"].partition(",")
            assert head == "data:image/png;base64"
            images = self.images if tag == "img" else self.narrow
            images.append(base64.b64decode(data))
        self.addresses += [
            value
            for key, value in told.items()
            if key in ("src", "href") and not value.startswith("data:")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep(tmp_path_factory.mktemp("here") / "all")


def test_the_report_of_a_sweep_is_one_page_with_every_row(place: Path, capsys) -> None:
    assert main([str(place)]) == 0
    said, _, paths = capsys.readouterr().out.partition("\n\n")
    names = ["index.html", "variants.md", "by_position.png", "curves.png", "pareto.png"]
    assert [Path(path).name for path in paths.split()] == names
    text = (place / "report" / "index.html").read_text()
    page = Page(text)
    assert (
        page.addresses == []
        and "<script" not in text
        and "http" not in text
        and "@import" not in text
    )
    assert page.images == [
        (place / "report" / f"{name}.png").read_bytes()
        for name in ("curves", "pareto", "by_position")
    ]
    # The pictures for narrow screens are others, one for each.
    assert len(page.narrow) == 3 and not set(page.narrow) & set(page.images)
    head, full, sliding, *_ = page.rows
    assert (
        said.splitlines()[1] == "| --- " * len(head) + "|"
        and said + "\n" == (place / "report" / "variants.md").read_text()
    )
    for row, line in zip(
        (head, full, sliding), (said.splitlines()[span] for span in (0, 2, 3)), strict=True
    ):
        assert line == f"| {' | '.join(row)} |"
    told = dict(zip(head, full))
    assert (
        told["variant"] == "model=full"
        and told["parameters"] == "123k"
        and told["FLOPs/token"] == "4M"
    )
    assert (
        told["loss"] == "2.0236 \u00b1 0.0497" and told["held-out loss"] == "2.1236 \u00b1 0.0497"
    )
    assert (
        told["recall"] == "0.2500 \u00b1 0.0000"
        and told["tokens/s"] == "8,192"
        and told["peak memory"] == "1,024 MiB"
    )
    assert told["bytes sent/step"] == "7.34M" and told["state"] == "3 runs"
    assert sliding[-1] == "2 of 3 runs; 4: failed with exit status 3: the disk <is> full"
    commands = [row for row in page.rows if row[-1].startswith("python -m trainer")]
    assert (
        len(commands) == 11 and commands[10][-1] == "python -m trainer steps=40 model=hyena seed=2"
    )
    assert (
        sum(kind == "bad" for kind in page.kinds) == 3 + 3
    )  # of the variants sliding, hyena and 11; of the runs 4, 10, 11
    ranges = next(row for row in page.rows if row[0] == "position")
    assert ranges[1:5] == ["0", "1", "2-3", "4-7"]


def test_the_report_of_a_run_that_has_not_stepped_says_so(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: lone\nsteps: 5\n")
    (tmp_path / "run" / "environment.json").write_text(
        '{"command": ["x", "name=lone", "data.hf_token=s3cret"]}'
    )
    assert main([str(tmp_path / "run")]) == 0
    text = (tmp_path / "run" / "report" / "index.html").read_text()
    page = Page(text)
    assert page.images == [] and "s3cret" not in text
    assert page.rows[1][0] == "lone" and page.rows[1][-1] == "0 of 1 runs; run: no step yet"
    assert page.rows[3][-1] == "python -m trainer name=lone 'data.hf_token=***'"


def test_pictures_show_means_over_seeds_and_what_no_other_beats(place: Path) -> None:
    rows = variants(collect(place))
    curves = plots._curves(rows, WIDE)
    assert curves is not None
    training, held_out = curves.axes
    assert [line.get_label() for line in training.get_lines()] == [
        f"model={name}" for name in ("full", "sliding", "retnet", "hyena")
    ]
    assert points(held_out.get_lines()[0])[-1][1] == pytest.approx(2.1236, abs=1e-4)
    assert len(points(training.get_lines()[3])) == 40  # the run that goes on is not mixed in
    pareto = draw_costs(rows, WIDE)
    assert pareto is not None
    drawn = [axes.get_ylabel() for axes in pareto.axes if axes.axison]
    assert drawn == [*3 * ["nats per token"], "recall"]
    best = [round(x / 1e9) for x, _ in points(pareto.axes[0].get_lines()[-1])]
    assert best == [328, 492, 655]  # hyena, sliding, full: retnet is dearer and worse than sliding
    by_position = plots._by_position(rows, WIDE)
    assert by_position is not None and points(by_position.axes[0].get_lines()[0])[0][
        1
    ] == pytest.approx(2.6)


def test_pictures_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    trained(tmp_path, 2.0)
    assert main([str(tmp_path)]) == 0
    (tmp_path / "evaluation.jsonl").unlink()
    assert main([str(tmp_path)]) == 0
    assert (
        not (tmp_path / "report" / "by_position.png").exists()
        and (tmp_path / "report" / "curves.png").exists()
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "one directory is wanted"), (["/none/such"], "there is no such directory")],
)
def test_a_wrong_wish_is_one_line_and_exit_status_2(words: list[str], said: str, capsys) -> None:
    assert main(words) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


def test_a_report_that_cannot_be_written_is_one_line_and_exit_status_3(
    tmp_path: Path, capsys
) -> None:
    trained(tmp_path, 2.0)
    (tmp_path / "report").write_text("in the way")
    assert main([str(tmp_path)]) == 3
    assert "report: Not a directory; mend that" in capsys.readouterr().err


def named(place: Path, count: int, grades: int = 15) -> Path:
    """A sweep whose variants have long names, and which was graded in several ways while it
    trained."""
    place.mkdir()
    (place / "sweep.json").write_text('{"settings": []}')
    for number in range(count):
        trained(place / str(number), 2.0 + number / 10)
        rows = [
            {"step": step, "name": name, "value": (step + number) / 100}
            for step in (20, 40)
            for name in ("accuracy", *(f"recall_of_{pairs}_pairs" for pairs in range(grades)))
        ]
        with open(place / str(number) / "evaluation.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        long = f"++mixer._target_=somebody.has.a.very.long.name.of.a.module.Mixer{number}"
        JobOutcome(["model=full", long, "++mixer.temperature=0.125"], "done", 0, 9.0).write(
            place / str(number)
        )
    return place


@pytest.mark.parametrize(
    "draw", [plots._curves, draw_costs, plots._by_position, plots._evaluations]
)
@pytest.mark.parametrize("shape", [WIDE, NARROW])
def test_legends_of_long_names_lie_on_the_sheet_and_below_the_panels(
    tmp_path: Path, draw, shape
) -> None:
    figure = draw(variants(collect(named(tmp_path / "all", 9, grades=1))), shape)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent(canvas.get_renderer())
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
    assert len(legend.get_texts()) == 9
    for axes in figure.axes:
        if axes.axison:
            assert axes.get_window_extent().y0 >= box.y1 and axes.get_window_extent().height > 200


@pytest.mark.full  # it draws nine runs
def test_accuracies_have_curves_and_tables_fit_the_page(tmp_path: Path) -> None:
    place = named(tmp_path / "all", 3)
    figure = plots._evaluations(variants(collect(place)), WIDE)
    assert figure is not None
    by_name = {axes.get_title(): axes for axes in figure.axes}
    assert len([name for name in by_name if name]) == 16
    assert points(by_name["accuracy"].get_lines()[0]) == [(20 * 4096, 0.2), (40 * 4096, 0.4)]
    assert main([str(place)]) == 0
    page = Page((place / "report" / "index.html").read_text())
    assert len(page.images) == 4 and max(len(row) for row in page.rows) <= 13
    heads = [row for row in page.rows if row[0] == "variant"]
    assert {name for head in heads for name in head} > {
        "accuracy",
        "recall_of_14_pairs",
        "state",
        "bytes sent/step",
    }


def test_a_curve_of_one_value_is_none(place: Path) -> None:
    assert plots._evaluations(variants(collect(place)), WIDE) is None


def test_equal_curves_and_points_are_told_apart(tmp_path: Path) -> None:
    for number in range(3):
        trained(tmp_path / str(number), 2.0)
        (tmp_path / str(number) / "config.yaml").write_text(f"name: run{number}\nsteps: 40\n")
    rows = variants(collect(tmp_path))
    assert len(rows) == 3
    curves = plots._curves(rows, WIDE)
    assert curves is not None
    lines = curves.axes[0].get_lines()
    assert points(lines[0]) == points(lines[1])
    assert len({line.get_linestyle() + str(line._dash_pattern) for line in lines}) == 3  # pyright: ignore
    assert len({line.get_marker() for line in lines}) == 3
    starts = [line.get_markevery()[0] for line in lines]
    assert len(set(starts)) == 3
    costs = draw_costs(rows, WIDE)
    assert costs is not None
    drawn = [line for line in costs.axes[0].get_lines() if line.get_marker() in "osD"]
    assert {line.get_fillstyle() for line in drawn} == {"full", "none"}


def test_better_shares_are_higher_and_of_other_figures_nobody_knows(tmp_path: Path) -> None:
    for number, (name, value) in enumerate([("share", 0.2), ("share", 0.4), ("bits", 3.0)]):
        trained(tmp_path / str(number), 2.0, flops=1e6 * (number + 1))
        (tmp_path / str(number) / "config.yaml").write_text(f"name: run{number}\nsteps: 40\n")
        with open(tmp_path / str(number) / "evaluation.jsonl", "a") as file:
            file.write(json.dumps({"step": 40, "name": name, "value": value}) + "\n")
    figure = draw_costs(variants(collect(tmp_path)), WIDE)
    assert figure is not None
    by_name = {axes.get_ylabel(): axes for axes in figure.axes}
    dashed = {
        name: [points(line) for line in axes.get_lines() if line.get_linestyle() == "--"]
        for name, axes in by_name.items()
    }
    assert [[value for _, value in line] for line in dashed["share"]] == [[0.2, 0.4]]
    assert dashed["bits"] == []


def test_heads_are_broken_between_words_and_nowhere_else() -> None:
    text = table(["variant", "mixer._target_", "needle/accuracy"], [(True, ["a_b", "c.d", "1"])])
    assert "mixer.<wbr>_<wbr>target_<" in text
    assert "needle/<wbr>accuracy" in text
    assert "a_b" in text and "c.d" in text
