"""Names that strangers gave, put into sentences for people."""


def legible(text: str) -> str:
    """A text as it is, but for what would move a terminal's cursor, forge a line of a log, or turn letters around.

    Such characters are shown as escapes.
    """
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
