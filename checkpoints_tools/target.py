"""The folder that a converter writes: whole or not at all, and never over something that is not a checkpoint.

Knows no format, and no torch: a mistake is told at once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sps2.model.manifest import check_replaceable

Progress = Callable[[str, int, int], None]  # (what, done, total)


def check_source(src: Path) -> None:
    if not src.exists():
        raise FileNotFoundError(f"{src} does not exist; give a .gguf file or a model's folder")


def check_target(src: Path, target: Path, force: bool) -> None:
    """Raises ValueError, FileNotFoundError or FileExistsError before anything is read."""
    check_source(src)
    source, place = src.resolve(), target.resolve()
    if source == place or place in source.parents or source in place.parents:
        raise ValueError(
            f"SRC {src} and DST {target} are the same or one lies inside the other; give a DST outside SRC"
        )
    check_replaceable(target)
    if target.is_dir() and any(target.iterdir()) and not force:
        raise FileExistsError(f"{target} is not empty; give another folder, or --force to replace it")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into; it gets the name when nothing was raised."""
    target = target.resolve()
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
