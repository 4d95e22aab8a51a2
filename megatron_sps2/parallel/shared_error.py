"""Marks on errors: raised by every rank alike, so that rank 0 may speak for all; or told already."""

from __future__ import annotations

from typing import TypeVar

E = TypeVar("E", bound=Exception)


def mark_shared(error: E) -> E:
    error.shared_by_all_ranks = True  # type: ignore[attr-defined]
    return error


def is_shared(error: Exception) -> bool:
    return getattr(error, "shared_by_all_ranks", False)


def mark_told(error: E) -> E:
    error.was_told = True  # type: ignore[attr-defined]
    return error


def was_told(error: Exception) -> bool:
    return getattr(error, "was_told", False)
