"""The one exception that the command line turns into a single line."""


class UserError(ValueError):
    """What was wrong with the input, what came, and what would do, in one line."""
