"""sps2_model.json beside a Megatron checkpoint: the model's shape, dtype and id, and the size of every file.

Knows JSON and file sizes, so that a broken checkpoint is named before torch reads it; knows no tensor.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_sps2.config import DTYPES, DType, ModelConfig, RopeScaling

FORMAT_VERSION = 1
MANIFEST_NAME = "sps2_model.json"
WEIGHTS_NAME = "release"
TRACKER_NAME = "latest_checkpointed_iteration.txt"
CONVERT_AGAIN = "run `sps2 convert SRC DST --force` to write it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What sps2_model.json says. `files`: bytes by path, relative to the checkpoint folder."""

    model: ModelConfig
    dtype: DType
    files: dict[str, int]
    # The same for the same weights, however often they are converted; "" in a checkpoint older than the id.
    content_id: str = ""


def load_model_config(folder: str | Path) -> ModelConfig:
    """The shape of the model in a checkpoint folder. Raises as `read_manifest` does."""
    return read_manifest(folder).model


def write_manifest(folder: Path, model: ModelConfig, dtype: DType, content_id: str) -> None:
    """Written last, over files that are complete."""
    weights = sorted(path for path in (folder / WEIGHTS_NAME).rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in weights}
    content = {
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        "content_id": content_id,
        "model": asdict(model),
        "files": files,
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(content, indent=1) + "\n")


def read_manifest(folder: str | Path) -> Manifest:
    """Raises FileNotFoundError (no folder, no manifest) or ValueError (it cannot be understood)."""
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise FileNotFoundError(
            f"checkpoint folder {folder} does not exist; `sps2 convert SRC {folder}` makes one"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST_NAME}, so it is not a checkpoint of sps2; convert the original model "
            f"with `sps2 convert SRC DST` and give DST"
        )
    try:
        return _parse(json.loads(path.read_text()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} cannot be understood: {reason}; {CONVERT_AGAIN}") from error


def _parse(content: dict[str, Any]) -> Manifest:
    version = content["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version={version}, this program reads {FORMAT_VERSION}")
    if content["dtype"] not in DTYPES:
        raise ValueError(f"dtype={content['dtype']!r} is not one of {', '.join(DTYPES)}")
    values = dict(content["model"])
    unknown = set(values) - {field.name for field in fields(ModelConfig)}
    if unknown:
        raise ValueError(f"unknown model fields {sorted(unknown)}")
    values["eos_token_ids"] = tuple(values["eos_token_ids"])
    for name in ("no_rope_layers", "window_layers"):
        values[name] = tuple(values.get(name, ()))
    if values.get("rope_scaling"):
        values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
    files = {str(name): int(size) for name, size in content["files"].items()}
    return Manifest(
        model=ModelConfig(**values),
        dtype=content["dtype"],
        files=files,
        content_id=str(content.get("content_id", "")),
    )


def check_replaceable(folder: Path) -> None:
    """Raises FileExistsError unless a checkpoint may take the place of what is at `folder`."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give a folder to write the checkpoint to")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST_NAME).is_file():
        raise FileExistsError(
            f"{folder} is not empty and has no {MANIFEST_NAME}, so it is not a checkpoint of sps2 and is "
            "never replaced; give another folder, or empty it yourself"
        )


def check_files(folder: str | Path, manifest: Manifest) -> None:
    """Every file there with its full size? FileNotFoundError or ValueError naming the first that is not."""
    for name, expected in manifest.files.items():
        path = Path(folder) / name
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint file {path} is missing ({expected} bytes); {CONVERT_AGAIN}")
        found = path.stat().st_size
        if found != expected:
            raise ValueError(
                f"checkpoint file {path} has {found} bytes, {expected} expected: it is truncated or was "
                f"changed; {CONVERT_AGAIN}"
            )
