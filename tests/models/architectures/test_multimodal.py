"""A decoder of words, patches and frames: what it reads, and its losses over ranks."""

import pytest
from torch.nn import functional as F

from models.causality import plain_sight
from models.loss import IGNORE
from models.memory.segments import SegmentMemory
from models.micro_batch import MicroBatch
from models.multimodal.columns import FIRST_VALUE, SCALE, WORD
from models.span import IMAGE, SOUND, TEXT
from tests.support.pool import ranks
from tests.support.requests import DOCUMENTS, FRAME, PATCH, SHORT, batch_of, built, over_ranks

ALL = {"stop_gradient": False, "divergence": "forward"}
CASES = [
    (2, DOCUMENTS, "contiguous", "ring", "full", {}),
    (3, DOCUMENTS, "zigzag", "ulysses", "images", {}),
    (3, DOCUMENTS, "balanced", "allgather", "images", ALL),
    (4, DOCUMENTS, "zigzag", "ring", "gated_delta", ALL),
    (4, DOCUMENTS, "contiguous", "ring", "full", {"alignment_layers": [1], "logit_cap": 5.0}),
    (3, SHORT, "contiguous", "ring", "full", ALL),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[2]}-{case[4]}")
def test_sharing_rows_of_requests_over_ranks_is_invisible(case):
    size, *rest = case
    assert max(ranks(size, over_ranks, *rest)) < 1e-11


def test_words_are_looked_up_and_values_projected():
    model = built()
    tokens, span, _, _ = batch_of(DOCUMENTS)
    got = model.read(tokens, span)
    values = tokens[..., FIRST_VALUE:].double() / SCALE
    for role, want in (
        (TEXT, model.embed(tokens[..., WORD])),
        (IMAGE, values[..., : PATCH**2] @ model.image.weight.T + model.image.bias),
        (SOUND, values[..., :FRAME] @ model.sound.weight.T + model.sound.bias),
    ):
        own = span.role == role
        assert own.any() and (got - want)[own].abs().max() < 1e-12


def test_evaluation_gives_the_losses_of_the_answers_alone():
    model = built().eval()
    batch = batch_of(DOCUMENTS)
    assert batch.targets is not None
    logits = model(batch.without_targets())
    want = F.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), reduction="none", ignore_index=IGNORE
    )
    assert (model(batch).flatten() - want).abs().max() < 1e-12
    assert (model.train()(batch).flatten() - want).abs().max() > 1e-3


def test_patches_see_one_another_and_nothing_else_ahead():
    batch = batch_of(DOCUMENTS)
    for mixer, expected in (("full", False), ("images", True)):
        model = built(mixer).eval()
        assert plain_sight(model) == 0
        before = model(batch.without_targets())
        # The last patch of row 0's first image, and its last frame.
        for place, is_seen in ((10, expected), (15, False)):
            tokens = batch.tokens.clone()
            tokens[0, place, FIRST_VALUE] += 50
            moved = (model(MicroBatch(tokens, batch.span)) - before)[0].abs().amax(-1)
            assert moved[place] > 1e-6
            first = 4 if place == 10 else 13
            assert (moved[first:place].max() > 1e-6) == is_seen
            assert moved[:first].max() == 0


def test_tokens_with_too_few_values_are_refused():
    batch = batch_of(DOCUMENTS)
    with pytest.raises(ValueError, match=r"tokens bring 2 values, .* up to 5; give the model and"):
        built()(batch.tokens[..., : FIRST_VALUE + 2])


@pytest.mark.parametrize("chosen", [[3], [-1], [0, 7]])
def test_states_that_are_not_there_are_refused(chosen):
    with pytest.raises(ValueError, match=r"model\.alignment_layers=.*to 2, which the last one"):
        built(alignment_layers=chosen)


def test_a_memory_is_refused():
    with pytest.raises(ValueError, match=r"takes no memory.*use memory=none"):
        built(memory=SegmentMemory(length=4))
