"""How a store fails a client: in one of four ways, which say whether to ask again."""

import importlib
from typing import Any

from wds_convnext.errors import UsageError


class Missing(Exception):
    """The store has no such object (404)."""


class Unranged(Exception):
    """The store gives whole objects only."""


class Denied(Exception):
    """The store does not let us read it (401, 403)."""


class Transient(Exception):
    """What may work the next time; `retry_after` are the seconds that the store asked for."""

    def __init__(self, reason: str, retry_after: float = 0.0):
        super().__init__(reason)
        self.retry_after = retry_after


def by_status(status: int | None, retry_after: float = 0.0) -> Exception:
    if status in (404, 410):
        return Missing()
    if status in (401, 403):
        return Denied(f"status {status}")
    return Transient(f"status {status}" if status else "no answer", retry_after)


def reason_of(error: BaseException) -> str:
    """Why, without texts that may hold a signed URL."""
    if isinstance(error, TimeoutError):
        return "no byte for too long"
    return getattr(error, "strerror", None) or type(error).__name__


def package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(
            f"{name} is not installed, and these shards need it: "
            "pip install 'wds-convnext[remote]'."
        ) from None
