"""What ends a command in one line of text: bad input, and runs that stop."""


class InputError(ValueError):
    """What the user gave cannot be used; the message says what, and what can."""


class TrainingStopped(RuntimeError):
    """A run that cannot go on; the message says why, and how to continue."""


class Interrupted(TrainingStopped):
    """A run that was asked to stop by a signal, and has saved its state in ``checkpoint``."""

    def __init__(self, signum: int, checkpoint):
        super().__init__(f"stopped by signal {signum}; {checkpoint}")
        self.signum, self.checkpoint = signum, checkpoint
