"""An error that every rank raises alike, so that rank 0 may speak for all. Knows no ranks."""

from __future__ import annotations

from typing import TypeVar

E = TypeVar("E", bound=Exception)


def mark_shared(error: E) -> E:
    error.shared_by_all_ranks = True  # type: ignore[attr-defined]
    return error


def is_shared(error: Exception) -> bool:
    return getattr(error, "shared_by_all_ranks", False)
