"""Which settings a comparison is about, by their names on the command line. Knows no tensors."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from typing import Any

from megatron_sps2.csa_setting import CsaSetting, load_setting

EXACT = "dense"
# Tables belong into a file.
CHANGEABLE = {field.name for field in fields(CsaSetting)} - {"name", "floors", "densities", "content_id"}


def parse_settings(names: str) -> dict[str, CsaSetting | None]:
    """'dense,strided:degrees=1,4,4,4,default:floor=0.9' -> by name; None is exact attention.

    A name is `dense`, a preset or a JSON file, then `:FIELD=VALUE` any number of times. A number between
    commas goes on with the list before it. Raises ValueError or FileNotFoundError.
    """
    pieces = re.sub(r",(?=[\d.]+(,|:|$))", "\0", names).split(",")
    found = [piece.replace("\0", ",").strip() for piece in pieces]
    if not all(found):
        raise ValueError(f"settings {names!r} has an empty name; give names with one comma between them")
    return {name: _parse(name) for name in found}


def _parse(name: str) -> CsaSetting | None:
    base, *changes = name.split(":")
    if base == EXACT:
        if changes:
            raise ValueError(f"setting {name!r}: {EXACT} is exact attention and has no fields to change")
        return None
    values = dict(_change(name, change) for change in changes)
    return replace(load_setting(base), name=name, **values)


def _change(name: str, change: str) -> tuple[str, Any]:
    field, given, text = change.partition("=")
    if not given or field not in CHANGEABLE:
        raise ValueError(
            f"setting {name!r}: {change!r} is not FIELD=VALUE with a field of {', '.join(sorted(CHANGEABLE))}"
        )
    if field == "selector":
        return field, text
    if field == "floor" and text == "none":
        return field, None
    return field, _numbers(name, field, text)


def _numbers(name: str, field: str, text: str) -> Any:
    """A number, or for lists a tuple of them."""
    try:
        values = json.loads(f"[{text}]")
    except ValueError:
        values = []
    is_list = field in ("group_sizes", "degrees")
    kinds = (int, float) if field in ("floor", "degrees") else (int,)
    if not values or (len(values) != 1 and not is_list) or any(type(value) not in kinds for value in values):
        wanted = "numbers" if float in kinds else "whole numbers"
        raise ValueError(f"setting {name!r}: {field}={text!r} must be {wanted}{'' if is_list else ', one'}")
    return tuple(values) if is_list else values[0]
