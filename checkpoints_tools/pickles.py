"""Files that torch.save wrote: read without running any code unless the user says otherwise.

Knows pickles and archives, not what a checkpoint holds.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch


def load_pickle(path: Path, *, trust_pickle: bool = False) -> Any:
    """Values, and tensors that are mapped where the file allows it. Raises ValueError naming the file."""
    is_archive = zipfile.is_zipfile(path)
    if is_archive:
        _check_archive(path)
    try:
        # argparse.Namespace holds Megatron's args; it is a bag of names and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle, mmap=is_archive)
    except pickle.UnpicklingError as error:
        needs = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
        reason = f"it needs {needs[1]}, which could run any code" if needs else str(error).split(". ")[0]
        raise ValueError(
            f"{path} is not read: {reason}; if you trust whoever wrote it, say --trust-pickle"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} ({path.stat().st_size} bytes) cannot be read: {error}") from error


def _check_archive(path: Path) -> None:
    """torch stores its archives' members as they are; a packed one may unpack to any size."""
    with zipfile.ZipFile(path) as archive:
        packed = [each for each in archive.infolist() if each.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(
            f"{path}: its member {packed[0].filename!r} is packed, {packed[0].file_size} bytes in "
            f"{packed[0].compress_size}; torch never packs, so the file is not read"
        )
