"""The one exception meant for people."""


class UserError(ValueError):
    """A mistake its user can mend. The message says what is wrong, the value, and what to type instead.

    `train.main` prints it as one line and exits with 2; anything else is a bug and keeps its traceback.
    """
