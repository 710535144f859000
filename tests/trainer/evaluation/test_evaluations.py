"""Every evaluation: equal on any ranks, 1.0 for a model that solves it, chance for one that knows
nothing."""

import math
import re

import numpy as np
import pytest
import torch

from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.span import Span
from parallel.context_parallel import apply_context_parallel
from parallel.mesh import Mesh, build_mesh
from tests.support.evaluations import Reader, Teachable, Uniform, context_of
from tests.support.pool import ranks
from tests.trainer.evaluation.test_held_out import decoder, stream
from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.data.tokenizers import Bytes
from trainer.evaluation import copy as copying
from trainer.evaluation import recall as recalling
from trainer.evaluation.base import figure_name
from trainer.evaluation.by_position import ByPosition
from trainer.evaluation.copy import Copy
from trainer.evaluation.held_out import HeldOut
from trainer.evaluation.in_context import InContext
from trainer.evaluation.induction import Induction
from trainer.evaluation.needle import Needle, insert
from trainer.evaluation.questions import Question, ask
from trainer.evaluation.recall import Recall
from trainer.evaluation.ruler import Ruler
from trainer.evaluation.scoring import next_tokens, score_rows
from trainer.evaluation.tasks import Tasks
from trainer.verify.whole_runs import write_documents

WORDS = (
    "context_length=61",
    "batch_tokens=183",
    "model.width=16",
    "model.layers=2",
    "model.heads=4",
    "evaluation.batches=2",
    "data=files",
    "data.held_out=0.2",
)
NEEDLES = {
    "lengths": [300, 331],
    "depths": [0.0, 0.6, 1.0],
    "examples": 2,
    "distractors": 3,
    "needles": 2,
}
SMALL = {
    "heldout": lambda: HeldOut(length=40),
    "by_position": lambda: ByPosition(length=75, width=10),
    "in_context": lambda: InContext(early=5, late=30),
    "needle": lambda: Needle(lengths=[260], depths=[0.0, 1.0], examples=1, distractors=2),
    "recall": lambda: Recall(lengths=[17, 40], pairs=4, examples=5),
    "copy": lambda: Copy(lengths=[3, 20], examples=5),
    "induction": lambda: Induction(length=9, examples=2, threshold=0.12, most=2),
    "ruler": lambda: Ruler(tasks=["vt"], lengths=[700], examples=1, distractors=2),
    "tasks": lambda: Tasks(
        task="recall",
        settings={"pairs": 3, "keys": 8, "values": 8},
        vary="length",
        values=[16, 90],
        across="values",
        across_values=[4, 8],
        batches=1,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    write_documents(folder / "text")
    return folder


@pytest.fixture(scope="module")
def config(folder):
    words = (f"data.path={folder}/text/*.txt", f"data.cache={folder}/cache")
    return compose((*WORDS, *words)).config


def figures_of(model, mesh, folder, config, names, time=1):
    context = context_of(model, mesh, stream(folder), config, time)
    found = {}
    for name in names:
        for figure in SMALL[name]().run(context):
            found[figure_name(name, figure.name)] = figure
    return found


def in_rank(env, folder, tree, context, names, time):
    mesh = build_mesh(context, env.size // context)
    model = decoder()
    if context > 1:
        apply_context_parallel(model, mesh.context.group, "ring")
    config = Config.model_validate(tree)
    found = figures_of(model, mesh, folder, config, names, time)
    return {name: (figure.value, figure.cells) for name, figure in found.items()}


# The last cuts rows in time, on top of three ranks.
@pytest.mark.short("3-3-1", "4-2-1")
@pytest.mark.parametrize(("size", "context", "time"), [(3, 3, 1), (4, 2, 1), (3, 3, 4)])
def test_every_figure_is_the_same_on_any_ranks(size, context, time, folder, config):
    tree = config.model_dump(by_alias=True)
    names = list(SMALL)
    want = figures_of(decoder(), Mesh.alone(), folder, config, names)
    for found in ranks(size, in_rank, folder, tree, context, names, time):
        assert found.keys() == want.keys()
        for name, (value, cells) in found.items():
            assert value == pytest.approx(want[name].value, abs=1e-9), name
            for cell, other in zip(cells, want[name].cells, strict=True):
                assert cell == pytest.approx(other, abs=1e-9), name


def test_a_model_that_knows_nothing_gets_chance(folder, config):
    found = figures_of(Uniform(), Mesh.alone(), folder, config, [*SMALL])
    for name, figure in found.items():
        if figure.chance is not None:
            assert figure.value == pytest.approx(figure.chance), name
    assert found["needle/accuracy"].chance == 1 / 3 and found["needle/exact"].value == 0
    assert found["recall/accuracy"].chance == 1 / 4 and found["copy/accuracy"].chance == 1 / 16
    assert found["held_out_loss"].chance == pytest.approx(math.log(257))
    assert found["in_context/used"].value == 0.125


def read_needles(text):
    """The values of every key that the question names."""
    question = text[text.rindex("\nWhat ") :]
    keys = re.search(r"special magic \S+ for (.*?) mentioned", question)[1]
    answers = []
    for key in re.split(r", and |, ", keys):
        answers += re.findall(rf" for {re.escape(key)} is: (\S+?)\.", text)
    return [f" {answer}" for answer in answers]


@pytest.mark.every_case
@pytest.mark.parametrize("kinds", [("words", "numbers"), ("uuids", "words"), ("numbers", "uuids")])
@pytest.mark.parametrize("variant", ["single", "multi_key", "multi_value", "multi_query"])
def test_who_reads_the_needles_tells_them_all(variant, kinds, folder, config):
    reader = Reader(read_needles, r"mentioned in the provided text (is|are)")
    context = context_of(reader, Mesh.alone(), stream(folder), config)
    longer = {**NEEDLES, "lengths": [700]}
    filler = "held_out" if variant == "single" else "repeated"
    needle = Needle(**longer, variant=variant, keys=kinds[0], values=kinds[1], filler=filler)
    accuracy, exact, *_ = needle.run(context)
    assert accuracy.value == 1.0
    if variant in ("single", "multi_key"):
        # Several answers are alike to this reader, so greedy decoding would have to choose.
        assert exact.value == 1.0
    assert [cell["depth"] for cell in accuracy.cells] == NEEDLES["depths"]
    assert all(cell["accuracy"] == 1.0 for cell in accuracy.cells)


@pytest.mark.parametrize(("model", "share"), [("reader", 1.0), ("uniform", 0.0)])
def test_who_reads_the_needles_also_writes_them(model, share, folder, config):
    reader = Reader(read_needles, r"mentioned in the provided text (is|are)")
    asked = reader if model == "reader" else Uniform()
    context = context_of(asked, Mesh.alone(), stream(folder), config)
    needle = Needle(lengths=[300], depths=[0.0, 1.0], examples=1, distractors=1, generate=8)
    *_, generated = needle.run(context)
    assert (generated.name, generated.value, generated.chance) == ("generated", share, 0.0)


LETTERS = [f" {letter}" for letter in "abcdefghijklmnop"]  # so many that some are written by chance
QUESTIONS = [
    Question(text, np.frombuffer(text.encode(), np.uint8).astype(np.int64), LETTERS, [" q"])
    for text in ("The value of the first key is", "And that of the second one is")
]


def asked_in_rank(env, folder, tree):
    mesh = build_mesh(env.size, 1)
    model = decoder()
    apply_context_parallel(model, mesh.context.group, "ring")
    context = context_of(model, mesh, stream(folder), Config.model_validate(tree))
    return [verdict._asdict() for verdict in ask(context, QUESTIONS, "questions", 30)]


def test_what_is_generated_is_scored_alike_on_any_ranks(folder, config):
    context = context_of(decoder(), Mesh.alone(), stream(folder), config)
    want = [verdict._asdict() for verdict in ask(context, QUESTIONS, "questions", 30)]
    shares = [verdict["generated"] for verdict in want]
    assert 0 < sum(shares) < len(shares)
    for size in (2, 3):
        for found in ranks(size, asked_in_rank, folder, config.model_dump(by_alias=True)):
            for verdict, other in zip(found, want, strict=True):
                assert verdict == pytest.approx(other, abs=1e-9)


def test_a_needle_stands_at_its_depth_in_a_row_of_the_length(folder, config):
    context = context_of(Uniform(), Mesh.alone(), stream(folder), config)
    needle = Needle(**NEEDLES)
    pool = np.full(1000, 1, np.int64)
    for depth in (0.0, 0.6, 1.0):
        rng = np.random.default_rng(1)
        hidden = needle.hidden(rng)
        question = needle._question(Bytes(), hidden, 400, depth, pool, rng)
        longest = max(len(text) for text in (*question.answers, *question.distractors))
        assert len(question.prompt_tokens) + longest == 400
        before = question.prompt.index(" One of")
        filler = question.prompt.count("\x01")
        assert before == round(depth * filler)
    assert context.tokenizer.vocabulary == 257


def test_pieces_are_inserted_in_order():
    row = insert(np.arange(4), [4, 0, 2, 2], [np.array([90 + i]) for i in range(4)])
    assert row.tolist() == [91, 0, 1, 92, 93, 2, 3, 90]


@pytest.mark.parametrize(("module", "evaluation"), [(recalling, "recall"), (copying, "copy")])
def test_who_was_taught_the_rows_gets_everything_right(
    module,
    evaluation,
    folder,
    config,
    monkeypatch,
):
    model = Teachable()

    def taught(context, rows, what):
        model.learn(rows)
        return score_rows(context, rows, what)

    monkeypatch.setattr(module, "score_rows", taught)
    context = context_of(model, Mesh.alone(), stream(folder), config)
    accuracy, other, loss = SMALL[evaluation]().run(context)
    assert accuracy.value == 1.0 and other.value == 1.0 and loss.value < 1e-6
    assert [cell["length"] for cell in accuracy.cells] == (
        [17, 40] if module is recalling else [3, 20]
    )


def test_rows_of_recall_and_copy_can_be_solved_by_reading():
    rng = np.random.default_rng(0)
    row = Recall(pairs=3).row(20, np.arange(50), rng)
    pairs = dict(zip(row.tokens[0:6:2].tolist(), row.tokens[1:6:2].tolist()))
    for key, target in zip(row.tokens[14::2], row.targets[14::2]):
        assert pairs[int(key)] == target and target in row.choices
    assert len(row.tokens) == 20 and (row.targets != IGNORE).sum() == 3
    row = Copy().row(5, np.arange(50), rng)
    assert row.tokens[0] == row.tokens[6] and len(row.tokens) == 11
    assert row.targets[6:].tolist() == row.tokens[1:6].tolist()


def test_scores_are_those_of_the_model(config):
    torch.manual_seed(0)
    model = decoder()
    row = next_tokens(np.array([5, 6, 7, 8]), 2)
    with torch.no_grad():
        from_model = model(
            MicroBatch(torch.tensor([[5, 6, 7]]), Span.line(1, 3), torch.tensor([[IGNORE, 7, 8]]))
        ).sum()
    context = context_of(model, Mesh.alone(), _NoStream(), config)
    scores = score_rows(context, [row], "rows")
    assert -scores.log_likelihood[0] == pytest.approx(from_model.item()) and scores.count[0] == 2


class _NoStream:
    rows = 3


def test_the_gain_is_the_late_loss_less_the_early_one(folder, config):
    held_out = stream(folder)
    model = decoder()
    context = context_of(model, Mesh.alone(), held_out, config)
    gain, used = InContext(early=5, late=30).run(context)
    sums = {5: [], 30: []}
    cursor = held_out.start()
    for _ in range(2):
        batch, cursor = held_out.read(cursor)
        with torch.no_grad():
            losses = model(MicroBatch(batch.inputs(), batch.span(), batch.targets()))
        for position, found in sums.items():
            chosen = (batch.targets() != IGNORE) & (batch.span().pos == position)
            found += losses[chosen].tolist()
    assert gain.value == pytest.approx(np.mean(sums[30]) - np.mean(sums[5]))
    assert [cell["length"] for cell in used.cells] == [61, 30, 15, 8]
    assert len({cell["tokens"] for cell in used.cells}) == 1
