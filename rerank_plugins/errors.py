"""What can go wrong, as one tree of exceptions.

::

    RerankError
    ├── ConfigurationError (ValueError)      a keyword that cannot work
    ├── InputError (ValueError)              a query, candidate or data file that cannot be used
    │   └── QueryError                       ... because the query is blank or too long
    ├── MissingDependencyError (ImportError) an extra that is not installed
    ├── ModelLoadError                       a model that is not there or cannot be read
    ├── ScoringError                         an engine failed, or gave a logit that is not finite
    └── ServerError                          a rerank server answered wrongly (url, status)
        └── ServerTimeout                    ... or not in time

Every message says what was expected, what came, and what to do about it.
"""

from __future__ import annotations

import errno

__all__ = [
    "ConfigurationError",
    "InputError",
    "MissingDependencyError",
    "ModelLoadError",
    "QueryError",
    "RerankError",
    "ScoringError",
    "ServerError",
    "ServerTimeout",
    "is_passing",
]


class RerankError(Exception):
    """Base of every exception that this package raises on purpose."""


class ConfigurationError(RerankError, ValueError):
    """A keyword has a value that cannot work."""


class InputError(RerankError, ValueError):
    """A query, a candidate or a data file cannot be used."""


class QueryError(InputError):
    """A query is no text, is blank, or is so long that no text fits beside it."""


class MissingDependencyError(RerankError, ImportError):
    """A feature needs an optional dependency that is not installed."""


class ModelLoadError(RerankError):
    """A model is missing, incomplete or unreadable."""


class ScoringError(RerankError):
    """An engine failed while scoring, or returned something that is no score."""


class ServerError(RerankError):
    """A rerank server answered with an error, or with something that is no ranking.

    Attributes:
        url: The address that was asked.
        status: The HTTP status, or None when there was no answer.
        passing: Whether the same request may succeed later: there was no answer, or the server was busy or out of
            order (408, 429, from 500 on). False for what fails again: a wrong key, address, request or answer.
    """

    def __init__(self, message: str, *, url: str, status: int | None = None, passing: bool | None = None) -> None:
        super().__init__(message)
        self.url = url
        self.status = status
        self.passing = status is None or status in (408, 429) or status >= 500 if passing is None else passing

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_server_error, (type(self), str(self), self.url, self.status, self.passing))


class ServerTimeout(ServerError):
    """A rerank server did not answer in time."""


_PASSING_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM})


def is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed later: no connection, no answer in time, a busy server, a full disk."""
    if isinstance(error, ServerError):
        return error.passing
    if isinstance(error, OSError):
        return isinstance(error, ConnectionError | TimeoutError) or error.errno in _PASSING_ERRNOS
    return False


def _rebuild_server_error(
    cls: type[ServerError], message: str, url: str, status: int | None, passing: bool
) -> ServerError:
    return cls(message, url=url, status=status, passing=passing)
