"""Documents of which a tokenizer makes no token hold nothing to predict: they are left out, and all
of them are no data."""

import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from models.loss import IGNORE
from tests.support.pool import ranks
from tests.trainer.verify.test_whole_runs import in_rank
from trainer.data.errors import DataError
from trainer.data.open import check, open_stream
from trainer.run_dir import make_run_dir

UNKNOWN, A, B, END = range(4)
BLANK = "   "


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer of words that makes no token of white space, as BERT's."""
    backend = Tokenizer(models.WordPiece({"[UNK]": UNKNOWN, "a": A, "b": B}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


@pytest.fixture(params=["files", "hub"])
def data(request, tmp_path, tokenizer):
    """data(texts): a node of local files, or of the same files streamed."""

    def node(texts, **settings):
        folder = tmp_path / "texts"
        folder.mkdir(exist_ok=True)
        (folder / "train.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
        common = {"tokenizer": tokenizer, "held_out": 0.0, **settings}
        if request.param == "hub":
            return {"_target_": "trainer.data.sources.hub.Hub", "name": str(folder), **common}
        path, cache = str(folder / "*.jsonl"), str(tmp_path / "cache")
        return {
            "_target_": "trainer.data.sources.files.Files",
            "path": path,
            "cache": cache,
            **common,
        }

    return node


def opened(node, lanes=False):
    return open_stream(node, context_length=6, rows=2, seed=0, lanes=lanes)


def read(node, steps, lanes=False):
    stream = opened(node, lanes)
    cursor, batches = stream.start(), []
    for _ in range(steps):
        batch, cursor = stream.read(json.loads(json.dumps(cursor)))
        batches.append(batch)
    return stream, batches


@pytest.mark.every_case
@pytest.mark.parametrize("count", [1, 2, 20])
def test_documents_without_a_token_are_refused_before_the_start_and_while_reading(data, count):
    node = data([BLANK] * count)
    (message,) = check(node)
    assert "token" in message and "give other data" in message
    with pytest.raises(DataError, match=r"make.* (a|no) token"):
        read(node, 1)


def test_the_start_is_not_held_up_by_a_token_far_behind(data):
    assert check(data([BLANK] * 9 + ["a b"])) == []


@pytest.mark.every_case
@pytest.mark.parametrize("lanes", [False, True])
def test_a_document_without_tokens_leaves_no_trace_in_the_rows(data, lanes):
    texts = [f"{'a ' * (n % 4 + 1)} b" if n % 3 == 0 else BLANK for n in range(30)]
    stream, batches = read(data(texts), 9, lanes=lanes)
    assert "documents of which the tokenizer makes no token" in stream.describe()
    for batch in batches:
        real = batch.doc >= 0
        ends = (batch.tokens == END) & real
        # an end follows a token of its own document, unless a row begins with it
        follows = ends[:, 1:]
        assert (batch.doc[:, 1:][follows] == batch.doc[:, :-1][follows]).all()
        assert (batch.targets() != IGNORE).any()


def test_reading_goes_on_exactly_behind_documents_without_tokens(data):
    texts = ["a b a" if n % 5 == 0 else BLANK for n in range(40)]
    node = data(texts)
    _, whole = read(node, 8)
    cursor = opened(node).start()
    for batch in whole:
        again, cursor = opened(node).read(json.loads(json.dumps(cursor)))
        assert all((x == y).all() for x, y in zip(batch[:4], again[:4]))


def test_an_evaluation_over_no_tokens_is_no_figure(tmp_path, tokenizer):
    """No document of a streamed data set is held out: that is said, and nothing becomes the best
    value."""
    folder, run_dir = tmp_path / "texts", tmp_path / "run"
    folder.mkdir()
    texts = ["a b a b b a" for _ in range(60)]
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    words = (
        "steps=2",
        "context_length=8",
        "batch_tokens=16",
        "model.width=8",
        "model.layers=1",
        "model.heads=1",
        "data=hub",
        f"data.name={folder}",
        f"data.tokenizer={tokenizer}",
        "data.held_out=1e-9",
        "evaluation.every=1",
        "checkpoint.every=2",
        "wandb.mode=disabled",
        "log.plots=false",
        "engine=single",
        f"run_dir={run_dir}",
    )
    make_run_dir(run_dir)
    assert ranks(1, in_rank, words, str(run_dir)) == [0]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["loss"] > 0 for row in rows)
    evaluations = run_dir / "evaluation.jsonl"
    assert not evaluations.exists() or not evaluations.read_text().strip()
    manifest = json.loads(next((run_dir / "checkpoints").glob("step_*/manifest.json")).read_text())
    assert manifest["extra"]["best"] == {}
