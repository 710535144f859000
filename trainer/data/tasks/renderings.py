"""Renderings of a word: an image of its letters, and a sound of its own, in small whole numbers.

Values lie in -LOUDEST to LOUDEST, as an image of 8 bits or a sound of 8 bits has them: a token of
the data is made of whole numbers, and models divide by SCALE.
"""

from itertools import combinations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer.data.errors import DataError

LOUDEST = 127
INK = 100  # of a pixel of a letter; paper is 0
TONE = 40  # amplitude of each tone
SLOWEST = 2  # oscillations of the lowest tone in a frame


class GlyphImages:
    """Draws words into images of one size, and cuts these into square patches.

    Letters are those of Pillow's built-in bitmap font, which is the same on every machine.

    Args:
        words: that will be drawn.
        height, width: of an image, in pixels.
        patch: side of a patch, in pixels; it divides both.
        jitter: pixels that a word is moved by at most, to the right and down.
        noise: deviation of what is added to every pixel.

    Raises:
        DataError: a word that does not fit or cannot be drawn, or sides that patches do not fill.
    """

    def __init__(
        self, words: list[str], *, height: int, width: int, patch: int, jitter: int, noise: float
    ):
        for name, side in (("image_height", height), ("image_width", width)):
            if side % patch:
                raise DataError(
                    f"data.{name}={side}: patches of data.patch={patch} pixels do not fill the"
                    f" image; use a multiple of {patch}"
                )
        self.height = height
        self.width = width
        self.patch = patch
        self.jitter = jitter
        self.noise = noise
        self.drawings = {word: self._drawn(word) for word in words}

    def __repr__(self) -> str:
        """Names all settings: part of the fingerprint of the data."""
        settings = self.height, self.width, self.patch, self.jitter, self.noise
        return f"GlyphImages({list(self.drawings)}, {settings})"

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return (self.height // self.patch) * (self.width // self.patch)

    def image(self, word: str, random: np.random.Generator) -> np.ndarray:
        """Draws a word, [height, width] int64."""
        drawing = self.drawings[word]
        down = random.integers(min(self.jitter, self.height - drawing.shape[0]) + 1)
        right = random.integers(min(self.jitter, self.width - drawing.shape[1]) + 1)
        image = np.zeros((self.height, self.width))
        image[down : down + drawing.shape[0], right : right + drawing.shape[1]] = drawing
        return quantized(image + self.noise * random.standard_normal(image.shape))

    def patches(self, image: np.ndarray) -> np.ndarray:
        """Cuts an image into patches, [tokens, patch * patch], line by line.

        Raises:
            DataError: the image has another size.
        """
        if image.shape != (self.height, self.width):
            size = " x ".join(str(side) for side in image.shape)
            raise DataError(
                f"an image of {size} pixels, but images have {self.height} x {self.width}"
                " (data.image_height, data.image_width); scale it to that size"
            )
        blocks = image.reshape(
            self.height // self.patch, self.patch, self.width // self.patch, self.patch
        )
        return blocks.transpose(0, 2, 1, 3).reshape(self.tokens, self.patch * self.patch)

    def _drawn(self, word: str) -> np.ndarray:
        """Draws a word into the smallest image that holds it; INK is a letter."""
        font = ImageFont.load_default_imagefont()
        try:
            _, _, right, bottom = font.getbbox(word)
        except UnicodeEncodeError as error:
            raise DataError(
                f"data.objects: {word!r} has a letter that the bitmap font lacks; use letters of"
                " Latin-1, or leave image out of data.modalities"
            ) from error
        if right > self.width or bottom > self.height:
            raise DataError(
                f"data.objects: {word!r} takes an image of {int(bottom)} x {int(right)} pixels, and"
                f" data.image_height={self.height} data.image_width={self.width} are less; use a"
                " larger image, or a shorter word"
            )
        canvas = Image.new("1", (int(right), int(bottom)))
        ImageDraw.Draw(canvas).text((0, 0), word, fill=1, font=font)
        return np.asarray(canvas).astype(np.float64) * INK


class ToneSounds:
    """Gives each word a sound of its own, the sum of two tones, and cuts it into frames.

    Args:
        words: that will be heard.
        frame: samples of a frame.
        frames: of a sound.
        phase: share of an oscillation that a tone begins earlier or later by at most.
        noise: deviation of what is added to every sample.

    Raises:
        DataError: a frame too short for so many different sounds.
    """

    def __init__(self, words: list[str], *, frame: int, frames: int, phase: float, noise: float):
        self.frame = frame
        self.frames = frames
        self.phase = phase
        self.noise = noise
        tones = 2
        while tones * (tones - 1) // 2 < len(words):
            tones += 1
        highest = SLOWEST + tones - 1
        # A tone needs more than two samples for an oscillation.
        if 2 * highest >= frame:
            raise DataError(
                f"data.frame={frame}: {len(words)} words take {tones} tones, of up to {highest}"
                f" oscillations in a frame; use data.frame={2 * highest + 1} or more"
            )
        pairs = combinations(range(SLOWEST, SLOWEST + tones), 2)
        self.tones = dict(zip(words, pairs))

    def __repr__(self) -> str:
        """Names all settings: part of the fingerprint of the data."""
        settings = self.frame, self.frames, self.phase, self.noise
        return f"ToneSounds({self.tones}, {settings})"

    @property
    def tokens(self) -> int:
        """Frames of a sound."""
        return self.frames

    def sound(self, word: str, random: np.random.Generator) -> np.ndarray:
        """Plays a word, [frames * frame] int64; each tone begins at a time of its own."""
        time = np.arange(self.frames * self.frame) * (2 * np.pi / self.frame)
        samples = self.noise * random.standard_normal(len(time))
        for tone in self.tones[word]:
            start = 2 * np.pi * self.phase * random.uniform(-1, 1)
            samples += TONE * np.sin(tone * time + start)
        return quantized(samples)

    def cut(self, sound: np.ndarray) -> np.ndarray:
        """Cuts a sound into frames, [frames, frame].

        Raises:
            DataError: the sound has another length.
        """
        if sound.shape != (self.frames * self.frame,):
            raise DataError(
                f"a sound of {sound.size} samples, but sounds have"
                f" {self.frames * self.frame} (data.frames={self.frames} of"
                f" data.frame={self.frame}); cut it to that length"
            )
        return sound.reshape(self.frames, self.frame)


def quantized(values: np.ndarray) -> np.ndarray:
    """Rounds to whole numbers from -LOUDEST to LOUDEST."""
    return np.clip(np.rint(values), -LOUDEST, LOUDEST).astype(np.int64)
