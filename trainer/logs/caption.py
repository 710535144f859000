"""Names of runs, settings and folders as text of a picture, where some characters are orders to
matplotlib."""

LONGEST = 160  # characters; a legend of longer names has no room for the curves


def caption(text: str) -> str:
    """The text as it is, never formulas, line breaks, or a label that a legend leaves out.

    A pair of `$` would make a formula of what is between them, a leading underscore hides a label,
    and half a surrogate pair (a file name that is no UTF-8) has no glyph.
    """
    plain = text.encode("utf-8", "replace").decode("utf-8")
    plain = "".join(letter if letter.isprintable() else "?" for letter in plain)
    if len(plain) > LONGEST:
        plain = plain[: LONGEST - 3] + "..."
    return (" " if plain.startswith("_") else "") + plain.replace("$", "\\$")
