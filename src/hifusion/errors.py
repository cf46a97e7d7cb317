"""The one error a user can cause."""


class InputError(ValueError):
    """Input that cannot be used: the message is one line saying what was given, what is allowed and what to do."""
