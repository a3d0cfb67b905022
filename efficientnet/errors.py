"""What ends a command in one line of text: bad input, and runs that stop."""

from pathlib import Path


class InputError(ValueError):
    """What the user gave cannot be used. The message says what was given, and what is accepted."""


class TrainingStopped(RuntimeError):
    """A run cannot go on. The message says why, and how to continue."""


class Interrupted(TrainingStopped):
    """A run was asked to stop by a signal, and has saved its state in ``checkpoint`` (None: it had nothing to save)."""

    def __init__(self, signum: int, checkpoint: Path | None):
        super().__init__(f"stopped by signal {signum}; {checkpoint}")
        self.signum, self.checkpoint = signum, checkpoint
