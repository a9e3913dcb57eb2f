"""What is said to a user who gave something wrong."""


class InputError(ValueError):
    """The user gave something wrong; the message says what was expected, what came, what to do."""
