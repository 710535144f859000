"""Answers to requests over ranks, their four figures, and the probes of the direction."""

import numpy as np
import pytest
import torch

from models.architectures.multimodal import Multimodal
from models.attention.full import Attention
from models.feedforward import SwiGLU
from models.init import initialise
from models.loss import IGNORE
from models.positions.rope import Rope
from parallel.context_parallel import apply_context_parallel
from parallel.mesh import Mesh, build_mesh
from tests.support.pool import ranks
from trainer.data.batch_sharding import BatchSharder
from trainer.data.streams.synthetic import SyntheticStream
from trainer.data.tasks.requests import REFUSE, Requests
from trainer.evaluation.requests.answers import Answers, answers, figures_of, renderings
from trainer.evaluation.requests.direction import (
    drifts,
    examine,
    judge_requests,
    refusal_direction,
    separability,
)

WIDTH = 16
ROWS = 3
LENGTH = 41


def opened(**settings):
    task = Requests(**settings)
    return SyntheticStream(task, context_length=LENGTH, rows=ROWS, seed=0, split="held_out")


def built():
    task = Requests()
    mixers = [Attention(WIDTH, 4, 2, Rope()) for _ in range(2)]
    parts = [SwiGLU(WIDTH, 24) for _ in range(2)]
    model = Multimodal(task.vocabulary, WIDTH, mixers, parts, init_std=WIDTH**-0.5)
    return initialise(model, seed=2).double().eval()


def sharder(mesh):
    return BatchSharder(
        mesh, rows=ROWS, context_length=LENGTH, micro_batch=2, policy="zigzag", prefix=0
    )


def found_by(mesh, model):
    return answers(model, sharder(mesh), opened(), 2, shifts={0: torch.ones(3, WIDTH) * 0.3})


def over_ranks(env):
    model = built()
    mesh = build_mesh(env.size, 1)
    apply_context_parallel(model, mesh.context.group, "ring")
    found = found_by(mesh, model)
    return [tensor.numpy() for tensor in found]


def test_answers_are_those_of_one_device_on_every_rank():
    want = found_by(Mesh.alone(), built())
    for got in ranks(3, over_ranks):
        for tensor, expected in zip(got, want, strict=True):
            assert np.abs(tensor - expected.numpy()).max() < 1e-11


def test_renderings_are_listed_by_request():
    stream = opened()
    batch, _ = stream.read(stream.start())
    found = renderings(batch.numbered())
    # Two requests of 19 tokens fit in a row of 41, and of a third its text does not.
    assert found.modality.tolist() == [0, 1, 2] * 2 * ROWS
    assert found.request.tolist() == [number for number in range(2 * ROWS) for _ in range(3)]
    assert (found.target.view(-1, 3) == found.target.view(-1, 3)[:, :1]).all()
    images = opened(shown=["image"])
    batch, _ = images.read(images.start())
    found = renderings(batch.numbered())
    assert found.modality.unique().tolist() == [1]
    assert found.request.tolist() == list(range(len(found.request)))


def made(modality, request, target, predicted, states=None):
    columns = [torch.tensor(column) for column in (modality, request, target, predicted)]
    if states is None:
        states = torch.zeros(len(modality), 1, 1)
    return Answers(*columns, states)


def test_the_four_figures():
    task = Requests()
    refuse = task.number[REFUSE]
    found = made(
        [0, 1, 0, 1, 0, 1, 0, 1, 1],
        [0, 0, 1, 1, 2, 2, 3, 3, 4],
        [refuse, refuse, refuse, refuse, 8, 8, 9, 9, IGNORE],
        [refuse, refuse, refuse, 8, 8, 8, 9, refuse, refuse],
    )
    assert figures_of(found, task) == {
        "text_refusal": 1.0,
        "text_over_refusal": 0.0,
        "text_benign_accuracy": 1.0,
        "image_refusal": 0.5,
        "image_over_refusal": 0.5,
        "image_benign_accuracy": 0.5,
        "consistency": 0.5,
    }


def test_joined_batches_keep_their_requests_apart():
    one = made([0, 1], [0, 0], [1, 1], [1, 1])
    assert Answers.join([one, one]).request.tolist() == [0, 0, 1, 1]


def test_direction_separability_and_drift_by_hand():
    refuse = 5
    # Text lies at 3 and 5 (refused) or -1 and 1 along the first axis; images are 2 up the second.
    along = [3.0, 5.0, -1.0, 1.0]
    text = torch.tensor([[[value, 0.0]] for value in along], dtype=torch.float64)
    image = text + torch.tensor([0.0, 2.0])
    image[:2, :, 0] -= 4
    states = torch.cat([text, image])
    target = [refuse, refuse, 1, 2] * 2
    found = made([0] * 4 + [1] * 4, [0, 1, 2, 3] * 2, target, target, states)
    direction = refusal_direction(found, refuse)
    assert direction.tolist() == [[1.0, 0.0]]
    assert separability(found, direction, refuse, 0).item() == pytest.approx(4 / 2**0.5)
    assert separability(found, direction, refuse, 1).item() == pytest.approx(0)
    drift = drifts(found)
    assert drift[0, 0].tolist() == [0, 0] and drift[0, 2].tolist() == [0, 0]
    assert drift[0, 1].tolist() == [-2.0, 2.0]


def test_drift_is_subtracted_at_the_layer_that_tells_text_apart_best():
    model, share, stream = built(), sharder(Mesh.alone()), opened()
    probes = examine(model, share, stream, 2)
    assert len(probes.cells) == 2 * 3 and probes.layer in (1, 2)
    for cell in probes.cells:
        is_behind = cell["layer"] >= probes.layer
        assert ("corrected_separability" in cell) == is_behind
        # A constant does not change d' at its own layer, and there is none for text.
        if is_behind and (cell["layer"] == probes.layer or cell["modality"] == "text"):
            assert cell["corrected_separability"] == pytest.approx(cell["separability"])
    judged = judge_requests(model, share, stream, 2)
    assert judged["layer"] == probes.layer
    assert {f"corrected_{name}" for name in probes.corrected} <= set(judged)
    assert judged["image_separability"] == judged[f"image_separability_{probes.layer}"]
