"""The one exception that a reader of checkpoints has to catch."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line that says what is wrong and what to do."""
