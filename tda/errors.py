"""The one exception that means: the user's input is wrong; and how it quotes another error."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line that names the thing, the value and the way out; the command line prints it as it is and exits with status 2.
    """


class StoreUnreachable(InputError):  # noqa: N818  (reads as what happened)
    """A store does not answer, or went away; what was written before stays."""


def cause(error: BaseException) -> str:
    """What went wrong, in one line: "ValueError: the first line of its message"."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
