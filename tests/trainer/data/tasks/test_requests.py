"""Requests: what is drawn, what training never meets, and settings that cannot be."""

import numpy as np
import pytest
import torch

from models.loss import IGNORE
from models.multimodal.columns import ASKED, FIRST_VALUE, PART, REFERENCE, SHOWN, WORD
from models.span import IMAGE, SOUND, TEXT
from trainer.data.errors import DataError
from trainer.data.streams.synthetic import SyntheticStream
from trainer.data.tasks.renderings import INK, TONE
from trainer.data.tasks.requests import REFUSE, Requests
from trainer.errors import UserError
from trainer.preflight.prepare import load_config

SMALL = {"actions": ["wash", "sell"], "objects": ["boat", "key", "jar"], "noise": 0.0}


def opened(split, **settings):
    task = Requests(**settings)
    return task, SyntheticStream(task, context_length=96, rows=16, seed=3, split=split)


def documents(task, stream, batches=2):
    """Yields (role, target, tokens) of every document."""
    cursor = stream.start()
    for _ in range(batches):
        batch, cursor = stream.read(cursor)
        for row in range(len(batch.doc)):
            for number in range(int(batch.doc[row].max()) + 1):
                own = batch.doc[row] == number
                assert batch.pos[row][own].tolist() == list(range(int(own.sum())))
                yield batch.role[row][own], batch.aims[row][own], batch.tokens[row][own]


def pair(task, tokens, target):
    """Returns the action of a rendering, and the answer."""
    words = [task.words[int(word)] for word in tokens[:, WORD]]
    return words[-2], task.words[int(target[-1])] if target[-1] != IGNORE else None


def asked_in(task, tokens):
    """Returns the action and the object of a text."""
    return task.words[int(tokens[1, WORD])], task.words[int(tokens[0, WORD])]


def test_a_request_is_a_document_in_each_modality():
    task = Requests(**SMALL)
    request = task.requests[0]
    example = task.rendered(request, np.random.default_rng(0), task.modalities)
    assert example.documents.tolist() == [0] * 3 + [1] * 10 + [2] * 6
    text, image, sound = (example.tokens[example.documents == number] for number in range(3))
    for document in (text, image, sound):
        assert task.words[document[-2, WORD]] == "wash" and task.words[document[-1, WORD]] == "?"
        assert document[:, PART].tolist() == [*[SHOWN] * (len(document) - 2), 0, ASKED]
    assert task.words[text[0, WORD]] == "boat" and text[:, REFERENCE].all()
    assert not image[:, REFERENCE].any() and not text[:, FIRST_VALUE:].any()
    assert (
        example.roles.tolist() == [TEXT] * 3 + [IMAGE] * 8 + [TEXT] * 2 + [SOUND] * 4 + [TEXT] * 2
    )
    assert set(image[:-2, FIRST_VALUE:].ravel().tolist()) == {0, INK}
    assert np.abs(sound[:-2, FIRST_VALUE:]).max() <= 2 * TONE
    assert example.targets[[2, 12, 18]].tolist() == [example.targets[2]] * 3


def test_patches_hold_the_image_and_frames_the_tones():
    task = Requests(**SMALL)
    image = task.images.image("key", np.random.default_rng(1))
    patches = task.images.patches(image)
    assert patches.shape == (8, 64) and patches.sum() == image.sum() > 0
    assert (patches[5].reshape(8, 8) == image[8:16, 8:16]).all()
    sound = task.sounds.sound("key", np.random.default_rng(1))
    spectrum = np.abs(np.fft.rfft(task.sounds.cut(sound)[2]))
    assert sorted(np.argsort(spectrum)[-2:].tolist()) == list(task.sounds.tones["key"])
    tones = list(Requests().sounds.tones.values())
    assert len(set(tones)) == len(tones) == 24


def test_training_meets_held_out_pairs_in_text_alone():
    task, train = opened("train")
    _, held_out = opened("held_out")
    held = {(each.action, each.object) for each in task.requests if each.held_out}
    refused = {(each.action, each.object) for each in task.requests if each.forbidden}
    assert len(held) == 36 and 10 <= len(held & refused) <= 12 and len(refused) == 43
    met = set()
    modalities = 0
    text = None
    for role, target, tokens in documents(task, train):
        if bool((tokens[:, REFERENCE] == 1).all()):
            text = asked_in(task, tokens)
            met.add(text)
            wanted = REFUSE if text in refused else text[1]
            assert pair(task, tokens, target)[1] == wanted
            continue
        modalities += 1
        assert text not in held and role.max() in (IMAGE, SOUND)
        assert pair(task, tokens, target) == (text[0], None if text in refused else text[1])
    assert met & held and modalities
    text = None
    for role, target, tokens in documents(task, held_out):
        if role.max() == TEXT:
            text = asked_in(task, tokens)
            assert text in held
        wanted = REFUSE if text in refused else text[1]
        assert pair(task, tokens, target) == (text[0], wanted)


def test_refusals_are_taught_where_it_is_said():
    task, train = opened("train", taught=["text", "image"])
    taught = set()
    for role, target, _ in documents(task, train):
        if target[-1] == task.number[REFUSE]:
            taught.add(int(role.max()))
    assert taught == {TEXT, IMAGE}


def test_no_part_alone_tells_what_is_forbidden():
    task = Requests()
    for word in task.objects:
        own = [each.forbidden for each in task.requests if each.object == word]
        assert 1 <= sum(own) <= 2
    for action in task.actions:
        own = [each.forbidden for each in task.requests if each.action == action]
        assert 0 < sum(own) < len(own)


def test_rows_are_the_same_however_they_are_read_and_shown():
    _, stream = opened("held_out", shown=["image"])
    first, cursor = stream.read(stream.start())
    again, _ = stream.read(stream.start())
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.role, again.role)
    assert not (first.role == SOUND).any() and (first.role == IMAGE).any()
    assert stream.read(cursor)[1]["rows"] == 32


def test_the_fingerprint_is_that_of_the_settings():
    prints = [opened("train", **more)[1].fingerprint for more in ({}, {}, {"noise": 9.0})]
    prints += [opened("train", jitter=2)[1].fingerprint, opened("train", frames=5)[1].fingerprint]
    assert prints[0] == prints[1] and len(set(prints)) == 4


def test_grades_count_refusals_and_benign_answers():
    task = Requests()
    refuse = task.number[REFUSE]
    target = np.array([refuse, refuse, 7, 8, 9, 9])
    predicted = np.array([refuse, 7, refuse, 8, 9, 8])
    assert task.grade(predicted, target) == {
        "accuracy": (3, 6),
        "refusal": (1, 2),
        "over_refusal": (1, 4),
        "benign_accuracy": (2, 4),
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_width": 30}, r"data\.image_width=30: patches of data\.patch=8 .* multiple of 8"),
        ({"image_height": 8}, r"'ball' takes an image of 11 x 24 pixels, .* use a larger image"),
        ({"objects": ["ball", "\u4e2d"]}, "has a letter that the bitmap font lacks"),
        ({"objects": ["ball", "ball"]}, "'ball' is there twice; leave one out"),
        ({"objects": ["wash"]}, "'wash' is there twice"),
        ({"objects": ["two words"]}, "'two words' is no word"),
        ({"actions": []}, r"data\.actions=\[\] leaves nothing"),
        ({"frame": 17}, r"data\.frame=17: 24 words take 8 tones, .* use data\.frame=19 or more"),
        ({"modalities": ["image"]}, "text is missing, .* add text"),
        ({"modalities": ["text", "video"]}, r"names video, .* use text, image, sound"),
        ({"modalities": ["text"], "shown": ["image"]}, r"data\.shown names image"),
        ({"taught": []}, r"data\.taught=\[\]: a modality is missing"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(DataError, match=words):
        Requests(**settings)


def test_images_sounds_and_words_of_ones_own_are_judged():
    task = Requests(**SMALL)
    with pytest.raises(DataError, match=r"an image of 8 x 32 pixels, .* 16 x 32 .* scale it"):
        task.images.patches(np.zeros((8, 32), np.int64))
    with pytest.raises(DataError, match="a sound of 100 samples, but sounds have 128"):
        task.sounds.cut(np.zeros(100, np.int64))
    with pytest.raises(DataError, match=r"'cup' is not among data\.objects; use one of boat, key"):
        task.document("wash", "cup")
    with pytest.raises(DataError, match=r"'eat' is not among data\.actions"):
        task.document("eat", "boat")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model=full", "data=requests"), "which Decoder would not read; use model=multimodal"),
        (("model=multimodal", "data=sets"), "no requests in several modalities.*data=requests"),
        (
            ("model=multimodal", "data=requests", "data.frame=40"),
            r"model\.frame=32.*another size, data\.frame=40.*use model\.frame=40",
        ),
        (
            ("model=multimodal", "data=requests", "evaluation.attention_maps=1"),
            r"evaluation\.attention_maps=1.*patches and frames",
        ),
        (
            ("model=full", "data=sort", "evaluation=[heldout,refusal]"),
            "refusal.*judges answers to requests",
        ),
        (
            ("model=multimodal", "data=requests", "parallel.time=2"),
            "compares documents that lie in different pieces",
        ),
        (
            ("model=multimodal", "data=requests", "model.consistency_weight=-1"),
            r"model\.consistency_weight=-1",
        ),
    ],
)
def test_settings_of_a_run_that_cannot_be_are_refused(words, message):
    sizes = ("context_length=64", "batch_tokens=128", "wandb.mode=disabled")
    with pytest.raises(UserError, match=message):
        load_config((*words, *sizes))
