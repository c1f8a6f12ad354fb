"""The exceptions of multisa, in one tree; the command line turns each into one line and an exit code.

MultisaError (1)
    UsageError (2)             an argument or configuration value cannot be used
    DatasetError (1)           a training data set does not have the expected layout
    CheckpointError (1)        the file of a trained network is missing or damaged
    ImageError (1)             one image cannot be read or processed
    BundleError (1)            a bundle is incomplete, of another version, or was altered
    BackendError (1)           a graph was loaded and cannot be run
    ParityError (3)            an exported graph gives other results than its network
    TooManyFailures (4)        more images failed than allowed
    BackendUnavailable (5)     a backend, driver or optional package is missing
    Interrupted (130, 143)     a signal stopped a run, which can be resumed
"""

from typing import Any


class MultisaError(Exception):
    """Base of every error a user can cause; `exit_code` is what the command line exits with."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without calling `__init__`, whose arguments are not those of the exception."""
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[MultisaError], arguments: tuple[Any, ...], state: dict[str, Any]) -> MultisaError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(state)
    return error


class UsageError(MultisaError):
    """An argument or a configuration value cannot be used."""

    exit_code = 2


class DatasetError(MultisaError):
    """A training data set does not have the expected layout."""


class CheckpointError(MultisaError):
    """The file of a trained network is missing, damaged, or of another network."""


class ImageError(MultisaError):
    """One image cannot be read or processed; the message is the reason."""


class BundleError(MultisaError):
    """A bundle is incomplete, of another version, or was altered after it was made."""


class BackendError(MultisaError):
    """A graph was loaded and cannot be run as asked."""


class ParityError(MultisaError):
    """An exported graph gives other results than the network it came from."""

    exit_code = 3


class TooManyFailures(MultisaError):
    """More images failed than were allowed."""

    exit_code = 4


class BackendUnavailable(MultisaError):
    """A backend, driver or optional package is missing; the message is `cause` and `remedy`, "" if there is none."""

    exit_code = 5

    def __init__(self, cause: str, *, remedy: str = "") -> None:
        super().__init__(f"{cause}: {remedy}" if remedy else cause)
        self.cause = cause
        self.remedy = remedy


class Interrupted(MultisaError):
    """A signal stopped a run; finished work is kept, and the same command resumes it."""

    def __init__(self, message: str, *, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal
