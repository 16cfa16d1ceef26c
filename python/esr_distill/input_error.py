"""The one exception for mistakes that a user can correct; the command line prints it without a traceback."""


class InputError(ValueError):
    """An option, a file or a pair of models that cannot be used. The message says which, what it must be, what it was."""
