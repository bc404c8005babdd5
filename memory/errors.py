"""The errors of Nightschool, flat and named after the boundary that was crossed.

Every error that a user may cause or meet is one of these: its text is one line that says what
happened and what to do next. `serve` maps them to HTTP statuses and to exit code 2 at the CLI;
nothing here knows of HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class NightschoolError(Exception):
    """Base of all expected errors; `str(error)` is fit to be shown to a user."""


class ConfigError(NightschoolError):
    """A setting, file or argument is unusable as given."""


class NotFoundError(NightschoolError):
    """The record that was asked for is not in the ledger."""


class UnknownModelError(NotFoundError):
    """No model of the name that was asked for is served."""


class ConflictError(NightschoolError):
    """The act contradicts what the ledger already holds (a used id, an illegal transition)."""


class LedgerError(NightschoolError):
    """The database refused a read or a write."""


class IndexUnavailableError(NightschoolError):
    """The vector index cannot answer; the ledger still can."""


class ModelError(NightschoolError):
    """A model call failed after its retries."""


class ModelUnavailableError(ModelError):
    """The model could not be reached or was too busy, still after the retries: worth trying later."""


class ContextLengthError(ModelError):
    """The prompt and the asked-for answer do not fit the model's context."""


class ToolError(NightschoolError):
    """A tool refused its input or failed; the agent reads the text as an observation."""


class VerifierError(NightschoolError):
    """A verifier is unknown or cannot judge this task."""


class EngineError(NightschoolError):
    """The inference engine could not be started, reached or made to serve an adapter."""


class TrainingError(NightschoolError):
    """The trainer refused its data or died."""


class NotEnoughExperienceError(NightschoolError):
    """There is too little new experience for a night."""


@contextmanager
def boundary(error: type[NightschoolError], what: str) -> Iterator[None]:
    """Translate whatever third-party code raises inside into `error`, keeping the cause.

    Errors that are ours already pass through untouched.
    """
    try:
        yield
    except NightschoolError:
        raise
    except Exception as exc:
        said = " ".join(str(exc).split())  # a user is told one line, whatever a library says
        raise error(f"{what}: {type(exc).__name__}: {said}") from exc
