"""RULER's tasks: made as lm-eval 0.4.13 makes them, solved by who reads them, and refused by name.

The templates were compared with those of lm-eval letter by letter when they were written; here the
structure of every task is derived anew from its prompt.
"""

import json
import re
from collections import Counter

import pytest

from parallel.mesh import Mesh
from tests.support.evaluations import Reader, Uniform, context_of
from tests.trainer.evaluation.test_evaluations import config, folder, read_needles, stream  # noqa: F401
from trainer.data.tokenizers import Bytes
from trainer.evaluation.ruler import Ruler
from trainer.evaluation.ruler_questions import QuestionAnswer, read_questions
from trainer.evaluation.ruler_tasks import ANSWER_TOKENS, NEEDLE_TASKS, TASKS, RulerWriter
from trainer.preflight.prepare import load_config

ENDING = r"mentioned in the provided text (is|are)|they are:|in the list are:|words are:|\? Answer:"
LENGTH = 1600
ESSAY = "A first sentence stands here. Is this the second? It is, and a third follows at once! "
QUESTIONS = [
    QuestionAnswer(f"What is fact {n}?", [f"answer{n}x"], [f"Fact {n} is answer{n}x in full. " * 3])
    for n in range(40)
]


def solve_tracking(text):
    value = re.findall(r"assigned the value (\d+)", text)[-1]
    names = re.findall(rf"VAR (\w+) = {value}", text)
    for _ in range(4):
        names += re.findall(rf"VAR (\w+) = VAR {names[-1]} ", text)
    return names


def solve(text):
    """The answers of any task, from its prompt alone."""
    if "special magic" in text:
        return read_needles(text)
    if "VAR " in text:
        return [f" {name}" for name in solve_tracking(text)]
    if "numbered list" in text:
        counts = Counter(re.findall(r"\d+\. (\S+)", text))
        return [f" {word}" for word, _ in counts.most_common(10)]
    if "coded text" in text:
        words = text[text.index("coded words. ") + 13 : text.index("\nQuestion:")].split()
        counts = Counter(word for word in words if word != "...")
        return [f" {word}" for word, _ in counts.most_common(3)]
    number = re.search(r"Question: What is fact (\d+)\?", text)[1]
    return [" " + re.search(rf"Fact {number} is (\S+) in full", text)[1]]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("\n".join(json.dumps(question._asdict()) for question in QUESTIONS))
    return str(path)


@pytest.fixture(scope="module")
def writer():
    return RulerWriter(Bytes(), ESSAY * 20, dict.fromkeys(TASKS[-2:], QUESTIONS), 3)


def test_there_are_thirteen_tasks():
    assert len(TASKS) == 13 and len(NEEDLE_TASKS) == 8


def test_who_reads_solves_every_task_and_who_knows_nothing_gets_chance(
    folder,  # noqa: F811
    config,  # noqa: F811
    questions,
):
    ruler = Ruler(lengths=[LENGTH], examples=1, distractors=3, squad=questions, hotpot=questions)
    assert ruler.tasks == list(TASKS)
    reader = context_of(Reader(solve, ENDING), Mesh.alone(), stream(folder), config)
    found = ruler.run(reader)
    wrong = [figure.name for figure in found if figure.name in TASKS and figure.value != 1.0]
    assert not wrong and found[0].value == 1.0
    knows_nothing = context_of(Uniform(), Mesh.alone(), stream(folder), config)
    for figure in ruler.run(knows_nothing):
        if figure.chance is not None:
            assert figure.chance == 0.25 and figure.value == pytest.approx(0.25)


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_fills_its_length_and_leaves_room_for_the_answer(task, writer):
    for length in (LENGTH, 4200):
        tokens = len(writer.write(task, length, 1).prompt)
        room = length - ANSWER_TOKENS[task]
        # One more unit of a haystack, five sentences or a paragraph, does not fit.
        assert room - 300 < tokens <= room


@pytest.mark.parametrize(
    ("task", "needles", "answers"),
    [
        ("niah_single_1", 1, 1),
        ("niah_single_2", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_needles_are_as_many_as_the_task_says(task, needles, answers, writer):
    example = writer.write(task, LENGTH, 2)
    hidden = re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.", example.prompt)
    assert len(hidden) == needles and len(example.answers) == answers
    keys = {key for _, key, _ in hidden}
    assert len(keys) == (1 if task == "niah_multivalue" else needles)
    assert {answer.strip() for answer in example.answers} <= {value for _, _, value in hidden}
    assert example.prompt.startswith("A special" if answers == 1 else "Some special")
    assert example.prompt.endswith(" is" if answers == 1 else " are")
    wanted = r"[0-9a-f-]{36}" if task == "niah_single_3" else r"\d{7}"
    assert all(re.fullmatch(wanted, value) for _, _, value in hidden)
    assert not {text.strip() for text in example.distractors} & {
        answer.strip() for answer in example.answers
    }


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_a_haystack_of_needles_holds_nothing_else(task, writer):
    example = writer.write(task, LENGTH, 2)
    body = example.prompt.split("\n")[1:-1]
    assert len(body) > 5 and all(line.startswith("One of the special magic ") for line in body)
    is_uuid = task == "niah_multikey_3"
    assert all(bool(re.search(r" for [0-9a-f-]{36} is", line)) == is_uuid for line in body)


def test_the_chain_has_five_variables_in_order_and_an_example_before_it(writer):
    example = writer.write("vt", 4200, 0)
    shots = example.prompt.split("Memorize and track")
    assert len(shots) == 3
    assert len(writer.write("vt", 900, 0).prompt.split("Memorize and track")) == 2
    links = re.findall(r"VAR (\w+) = (VAR )?(\w+)", shots[2])
    names = [name for name, _, _ in links]
    assert [f" {name}" for name in names] == example.answers and len(names) == 5
    assert [of for _, _, of in links][1:] == names[:-1] and all(len(name) == 5 for name in names)
    assert [len(name) for name, _, _ in re.findall(r"VAR (\w+) = (VAR )?(\w+)", shots[1])] == [
        3
    ] * 5


@pytest.mark.parametrize(("length", "often", "seldom"), [(LENGTH, 6, 1), (4200, 30, 3)])
def test_ten_words_are_common(length, often, seldom, writer):
    example = writer.write("cwe", length, 0)
    words = re.findall(r"(\d+)\. (\S+)", example.prompt)
    assert [int(number) for number, _ in words] == list(range(1, len(words) + 1))
    counts = Counter(word for _, word in words)
    common = {answer.strip() for answer in example.answers}
    assert len(common) == 10
    for word, count in counts.items():
        assert count == (often if word in common else seldom)


def test_counts_of_coded_words_fall_as_the_square_of_the_rank(writer):
    example = writer.write("fwe", 4200, 0)
    words = example.prompt.split("coded words. ", 1)[1].split("\nQuestion")[0].split()
    counts = [count for _, count in Counter(words).most_common()]
    units = max(units for units in range(1, 4200) if int(units / 1.6449340668) == counts[0])
    for rank, count in enumerate(counts, 1):
        assert abs(count - units / rank**2 / 1.6449340668) <= 1
    assert Counter(words).most_common(1)[0][0] == "..."
    assert all(len(word) == 6 for word in words if word != "...")


def test_documents_are_numbered_and_hold_the_answer(writer):
    example = writer.write("qa_squad", LENGTH, 3)
    numbers = re.findall(r"Document (\d+):\n", example.prompt)
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)] and len(numbers) > 5
    assert "Fact 3 is answer3x" in example.prompt and example.answers == [" answer3x"]


def test_questions_are_read_in_three_forms(tmp_path):
    squad = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": "p",
                        "qas": [
                            {"question": "q", "answers": [{"text": "a"}, {"text": "b"}]},
                            {"question": "r", "answers": [], "is_impossible": True},
                        ],
                    }
                ]
            }
        ]
    }
    hotpot = [{"question": "q", "answer": "a", "context": [["t", ["one. ", "two."]]]}]
    for name, value in (("squad", squad), ("hotpot", hotpot)):
        (tmp_path / name).write_text(json.dumps(value))
    assert read_questions(tmp_path / "squad") == [QuestionAnswer("q", ["a", "b"], ["p"])]
    assert read_questions(tmp_path / "hotpot") == [QuestionAnswer("q", ["a"], ["t\none. two."])]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tasks=[niah_singel_1]", "there is no task niah_singel_1; did you mean niah_single_1?"),
        (
            "tasks=[qa_squad]",
            "evaluation.ruler.squad=null: qa_squad reads its questions from a file",
        ),
        ("squad=none.json", "evaluation.ruler.squad=none.json: it cannot be read"),
        ("lengths=[200]", "has no room for"),
        ("squad=EMPTY", "its question 1 has no answers ('q')"),
    ],
)
def test_bad_input_is_said_before_a_rank_starts(setting, message, tmp_path):
    path = tmp_path / "empty.json"
    path.write_text('[{"question": "q", "answers": [], "paragraphs": ["p"]}]')
    tasks = () if setting.startswith("tasks") else ("evaluation.ruler.tasks=[vt]",)
    if "squad" in setting:
        tasks = ("evaluation.ruler.tasks=[vt,qa_squad]",)
    words = (
        "context_length=2048",
        "batch_tokens=2048",
        "model.width=16",
        "model.layers=1",
        "model.heads=2",
        "evaluation=[heldout,ruler]",
        *tasks,
        f"evaluation.ruler.{setting.replace('EMPTY', str(path))}",
    )
    with pytest.raises(Exception) as refused:
        load_config(words)
    assert message in str(refused.value) and len(str(refused.value).splitlines()) == 1
