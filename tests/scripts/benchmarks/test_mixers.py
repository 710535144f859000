"""The bench of the linear-time family runs every layer, compares with what it says, and its
formulas are what is sent."""

import json

import pytest

from scripts.benchmarks.mixers import (
    BARE,
    KINDS,
    LAYERS,
    MixerBenchmark,
    MixerSizes,
    measure,
    parse,
    table,
)
from tests.support.pool import ranks


def rows(env, sizes):
    return list(measure(sizes, env.group))


def only_bytes(env, tokens):
    bench = MixerBenchmark(MixerSizes(tokens=tokens, heads=5, width=4), env.group)
    return [bench.sent(kind, tokens) for kind in KINDS]


@pytest.mark.full
@pytest.mark.slow
def test_every_layer_is_measured():
    for found in ranks(
        2, rows, MixerSizes(tokens=64, heads=2, width=8, layer_heads=2, layer_width=16, repeats=1)
    ):
        section = {
            name: [row for row in found if row["section"] == name]
            for name in ("growth", "speed", "state", "sent")
        }
        assert [row["name"] for row in section["growth"]] == [BARE, *LAYERS]
        assert all(
            row["growth"] > 0 and row["growth_by_cpu"] > 0 and row["tokens"] == 512
            for row in section["growth"]
        )
        bare, hyena = section["growth"][0]["growth"], section["growth"][-1]
        assert hyena["name"] == "hyena" and hyena["goal"] == pytest.approx(1.2 * bare)
        assert {row["goal"] for row in section["growth"][1:-1]} == {9.5}
        assert [(row["name"], row["tokens"]) for row in section["speed"]] == [
            ("scan in chunks", 64),
            ("SDPA, causal", 64),
            ("scan step by step", 64),
            ("scan in chunks", 128),
            ("SDPA, causal", 128),
        ]
        assert all(row["times"] == 1 for row in section["speed"] if row["name"] == "scan in chunks")
        held = {row["name"]: row["bytes"] for row in section["state"]}
        assert held.pop("hyena") == [None, None]
        assert all(few == many > 0 for few, many in held.values())
        assert held["linear"] == [2 * 8 * 9 * 4] * 2, (
            "heads x key width x (value width and the sum of weights) in float32"
        )
        assert all(
            row["sent_bytes"] == row["formula_bytes"] and max(row["sent_bytes"]) > 0
            for row in section["sent"]
        )
        text = table(json.loads(json.dumps(found)))
        assert all(name in text for name in (BARE, *LAYERS, *KINDS)) and text.count(
            "equal to the formula"
        ) == len(section["sent"])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bytes_are_the_formula_and_know_no_length(size):
    short, long = ranks(size, only_bytes, 96), ranks(size, only_bytes, 192)
    assert short == long
    assert all(sent == formula for found in short for sent, formula in found)
    assert all(sum(found[i][0] for found in short) > 0 for i in range(len(KINDS)))


def test_a_wish_that_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="no setting 'kv_heads'; there are tokens"):
        parse(["kv_heads=2"])
    with pytest.raises(ValueError, match="knows the devices cpu and cuda"):
        parse(["device=tpu"])
    assert parse(["ranks=1", "device=cpu"]) == MixerSizes(ranks=1)
