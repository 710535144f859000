"""Small data for the tests of the data wing."""

import json
from pathlib import Path

import numpy as np
import pytest

from trainer.data.open import open_stream


@pytest.fixture
def files(tmp_path):
    """files(path, **settings): a data=files node over a folder of this test, with its own cache."""

    def node(path, **settings):
        base = {"tokenizer": "bytes", "held_out": 0.0, "cache": str(tmp_path / "cache")}
        return {"_target_": "trainer.data.sources.files.Files", "path": str(path)} | base | settings

    return node


@pytest.fixture
def texts(tmp_path):
    """texts(list of texts): a jsonl file of them."""

    def write(found, name="data.jsonl"):
        path = Path(tmp_path) / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found), "utf-8")
        return path

    return write


@pytest.fixture
def words():
    """words(n): n different documents of unequal length, each of letters of its own pattern."""

    def make(count, longest=40):
        draw = np.random.default_rng(7)
        return [
            "".join(chr(97 + int(c)) for c in draw.integers(0, 26, draw.integers(1, longest)))
            for _ in range(count)
        ]

    return make


@pytest.fixture
def opened(files, texts):
    """opened(list of texts, **what open_stream takes): a stream of them."""

    def make(found, *, data=None, **settings):
        node = files(texts(found), **(data or {}))
        return open_stream(node, **({"context_length": 8, "rows": 2, "seed": 0} | settings))

    return make
