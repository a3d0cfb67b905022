"""Training states on disk. They are written whole and checked when read; the newest few are kept; a damaged one is
passed over.
"""

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from efficientnet.errors import InputError, TrainingStopped
from efficientnet.files import replacing
from efficientnet.weights.checkpoints import load_training_state

NAME = re.compile(r"step-(\d{8})\.train\.pt")


class RunStates:
    """The training states of one run, ``folder/step-NNNNNNNN.train.pt``, of which the newest ``keep`` stay."""

    def __init__(self, folder: str | os.PathLike, keep: int = 3):
        self.folder, self.keep = Path(folder), keep

    def paths(self) -> list[Path]:
        """The files that there are, the newest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in found if NAME.fullmatch(path.name)), reverse=True)

    def save(self, state: dict) -> Path:
        """Write ``state`` to a file of its own, safe from a power cut, and only then remove the oldest files. Returns
        its path.

        Raises TrainingStopped where it cannot be written; older states are then untouched.
        """
        path = self.folder / f"step-{state['step']:08d}.train.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary, _Writer(temporary) as writer:
                try:
                    torch.save(state, writer)
                except RuntimeError as error:  # torch's own words for a write that failed
                    raise writer.error or error from None
            _sync_folder(self.folder)
            for old in self.paths()[self.keep :]:
                old.unlink(missing_ok=True)
        except OSError as error:
            last = next(iter(self.paths()), None)
            hint = (
                f"the last good checkpoint is {last}; make room and continue with --resume auto"
                if last
                else "no checkpoint exists yet"
            )
            raise TrainingStopped(
                f"cannot write checkpoint {str(path)!r}: {error.strerror or error}; {hint}"
            ) from error
        return path

    def newest(self, say: Callable[[str], None] = print) -> tuple[Path, dict] | None:
        """(Path, state) of the newest file that is whole, or None where there is no file at all.

        Args:
            say: is told of every damaged file that is passed over.

        Raises InputError where there are files but none is whole.
        """
        paths = self.paths()
        for path in paths:
            try:
                return path, read_state(path)
            except ValueError as error:
                say(f"{error}; falling back to the one before")
        if paths:
            raise InputError(f"no checkpoint in {str(self.folder)!r} can be read; move them away to start anew")
        return None


def read_state(path: str | os.PathLike) -> dict:
    """Read a training state onto the CPU and compare its checksums.

    Raises FileNotFoundError, or ValueError for a file that is damaged or is something else.
    """
    state = load_training_state(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums that it writes
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"checkpoint {str(path)!r} is damaged: {error}") from error
    if bad is not None:
        raise ValueError(f"checkpoint {str(path)!r} is damaged: the checksum of {bad!r} is wrong")
    if "step" not in state:
        raise ValueError(f"{str(path)!r} was written by another version of this program")
    return state


class _Writer:
    """A file that remembers its own error, since torch.save raises another one in its place."""

    def __init__(self, path):
        self.file, self.error = open(path, "wb"), None  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self.file.flush()


def _sync_folder(folder):
    """Make new names in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
