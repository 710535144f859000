"""Texts from prompts: stop strings, several samples, characters as they come."""

from typing import Any

import pytest
import torch

from models.architectures.decoder import Decoder
from models.carried_state import name_stateful_modules
from models.feedforward import SwiGLU
from models.init import initialise
from tests.support.decoders import attention
from tests.variants import WIDTH
from trainer.data.tokenizers import Bytes
from trainer.decoding.sampling import Sampling
from trainer.decoding.texts import TextStream, complete

WARM = Sampling(temperature=1.5)


@pytest.fixture(scope="module")
def model():
    bare = Decoder(257, WIDTH, [attention()], [SwiGLU(WIDTH, 20)])
    name_stateful_modules(bare)
    decoder: Any = initialise(bare, seed=1).double().eval()
    with torch.no_grad():
        # Letters and spaces alone, so that texts have words to stop at.
        decoder.head.weight[:97] = 0
        decoder.head.weight[123:] = 0
        decoder.head.weight[97:123] += 0.4
    return decoder


def words(tokens: str) -> list[int]:
    return list(tokens.encode())


def test_texts_do_not_depend_on_what_runs_beside_them(model):
    prompts = ["one", "", "three words long"]
    texts = {}
    for rows in (1, 2, 8):
        done = complete(model, Bytes(), prompts, tokens=20, samples=2, sampling=WARM, rows=rows)
        texts[rows] = {(c.prompt, c.sample): c.text for c in done}
    assert texts[1] == texts[2] == texts[8] and len(texts[1]) == 6
    assert len(set(texts[1].values())) == 6


def test_what_is_streamed_is_the_text(model):
    heard: dict[tuple[int, int], str] = {}

    def hear(prompt, sample, text):
        heard[prompt, sample] = heard.get((prompt, sample), "") + text

    whole = list(complete(model, Bytes(), ["ab", "c"], tokens=30, sampling=WARM, on_text=hear))
    assert heard == {(c.prompt, c.sample): c.text for c in whole}


def test_a_stop_string_ends_a_text_and_is_no_part_of_it(model):
    (free,) = complete(model, Bytes(), ["ab"], tokens=40, sampling=WARM)
    stop = free.text[11:13]
    place = free.text.index(stop)
    heard = []
    (stopped,) = complete(
        model,
        Bytes(),
        ["ab"],
        tokens=40,
        sampling=WARM,
        stops=["never there", stop],
        on_text=lambda prompt, sample, text: heard.append(text),
    )
    assert stopped.text == free.text[:place] == "".join(heard)
    assert stopped.finished == "stop" and stopped.tokens == place + len(stop)


def test_characters_and_stop_strings_are_held_back_until_they_are_whole():
    stream = TextStream(Bytes(), ["END"])
    tokens = list("aé".encode()) + words("ENxEN")
    written = [stream.new(tokens[: count + 1], False) for count in range(len(tokens))]
    assert written == ["a", "", "é", "", "", "ENx", "", ""]
    assert stream.new(tokens, True) == "EN"


def test_no_text_is_refused(model):
    with pytest.raises(ValueError, match="samples=0"):
        list(complete(model, Bytes(), ["a"], tokens=3, samples=0))
    with pytest.raises(ValueError, match="0 new tokens"):
        list(complete(model, Bytes(), ["a"], tokens=0))
