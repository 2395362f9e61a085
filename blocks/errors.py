"""What all errors have in common that an operator can do something about."""


class ArchiverError(Exception):
    """The message is a sentence: what happened, to what, and what to do. A command prints it alone."""
