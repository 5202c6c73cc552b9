"""The one exception that means: the user's input is wrong."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line that names the thing, the value and the way out; the command line prints it as it is and exits with status 2.
    """
