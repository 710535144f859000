"""Words, numbers and uuids that evaluations hide in a text, and the text that hides them."""

import string
import uuid
from typing import Literal

import numpy as np

from trainer.evaluation.base import EvaluationContext

WordKind = Literal["numbers", "words", "uuids"]
REPEATED = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
ADJECTIVE_TEXT = """
able ample amber ancient arctic autumn bitter bold brave brief bright broad calm careful clean
clear clever cloudy cold copper crisp curious damp dark dear deep distant dusty eager early
earnest eastern empty even faint famous fast fierce final fine firm flat fond formal fresh gentle
giant glad golden grand gray great green happy hidden hollow honest humble icy idle inner ivory
jolly keen kind large late lively lonely loud loyal lucky mellow mild modest narrow neat nimble
noble northern odd old olive open pale patient plain polite proud purple quick quiet rapid rare
ready rich royal rustic scarlet secret silent silver simple sleepy slow small smooth solid
southern spare steady strange sunny swift tall tender tidy tiny true vast velvet warm western wild
windy wise young
"""
ADJECTIVES = ADJECTIVE_TEXT.split()
NOUN_TEXT = """
acorn anchor apple arrow badger barrel basin beacon bell berry birch blanket bottle branch bridge
brook bucket button cabin candle canyon carpet castle cave cedar chain cherry circle cliff clock
cloud comet copper corner cotton cradle creek crow crown daisy desert dolphin dragon drum eagle
ember engine falcon feather fence fern field finch flag flame flute forest fountain fox garden
gate glacier glove granite grove hammer harbor hawk hazel hedge heron hill horizon island ivy
jacket jungle kettle key kite ladder lagoon lake lamp lantern leaf lemon lily linen lion maple
marble market meadow mirror moon moss mountain needle nest oak oasis ocean orchard otter owl
palace paper pearl pebble pepper pigeon pillow pine planet plum pond poplar prairie puzzle quartz
rabbit raven reef ribbon river robin rocket rope rose saddle salmon sand shadow shell shore skate
spark sparrow spoon spruce stable star stone stream summit swan table temple thimble thorn thunder
tiger timber tower trail tulip tunnel turtle valley violet wagon walnut water wave whale wheel
willow window winter wolf yarn zebra
"""
NOUNS = NOUN_TEXT.split()
VOWELS = "aeiou"
CONSONANTS = "".join(letter for letter in string.ascii_lowercase if letter not in VOWELS)
BATCHES = 256  # of held-out data that are read for filler at most


def draw(kind: WordKind, rng: np.random.Generator) -> str:
    """Draws a number of seven digits, an adjective with a noun, or a uuid, as RULER does."""
    if kind == "numbers":
        return str(rng.integers(10**6, 10**7))
    if kind == "words":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def draw_distinct(
    kind: WordKind, count: int, rng: np.random.Generator, taken: set[str] | None = None
) -> list[str]:
    """Draws `count` different ones, none of them in `taken`, to which they are added."""
    used = set() if taken is None else taken
    drawn: list[str] = []
    while len(drawn) < count:
        value = draw(kind, rng)
        if value not in used:
            used.add(value)
            drawn.append(value)
    return drawn


def plain_words(count: int, rng: np.random.Generator) -> list[str]:
    """Draws different words: of our list first, then made-up ones of three syllables."""
    known = sorted({*ADJECTIVES, *NOUNS})
    words = [str(word) for word in rng.permutation(known)[:count]]
    used = set(words)
    while len(words) < count:
        letters = []
        for _ in range(3):
            letters.append(str(rng.choice(list(CONSONANTS))))
            letters.append(str(rng.choice(list(VOWELS))))
        word = "".join(letters)
        if word not in used:
            used.add(word)
            words.append(word)
    return words


def held_out_tokens(context: EvaluationContext, count: int) -> np.ndarray:
    """Returns the first `count` tokens of held-out text, without what ends a document.

    Where there are fewer, they are repeated.

    Returns:
        [count] int64, the same on every rank.
    """
    stream = context.stream
    cursor = stream.start()
    batches = BATCHES if stream.batches is None else min(BATCHES, stream.batches)
    pieces: list[np.ndarray] = []
    total = 0
    for _ in range(batches):
        batch, cursor = stream.read(cursor)
        context.check_signal(batch, "filler of an evaluation")
        tokens = batch.tokens[:, :-1]
        is_text = (batch.doc[:, :-1] >= 0) & (tokens != context.tokenizer.end_of_text)
        piece = tokens[is_text].numpy()
        pieces.append(piece)
        total += len(piece)
        if total >= count:
            break
    pool = np.concatenate(pieces)
    if not len(pool):
        pool = np.asarray(context.tokenizer.encode(REPEATED), np.int64)
    return np.resize(pool, count).astype(np.int64)
