"""--config FILE: a TOML file whose keys are flags of the command, without the dashes in front.

Its settings are put before the user's own flags, so that argparse checks both alike and the user's win.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sps2.cli.arguments import AUTO, size_or_auto

# The type a flag's value has in TOML, by argparse's type. bool is no int here, though Python says so.
TOML_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    None: ((str,), "a string"),
    int: ((int,), "an integer"),
    size_or_auto: ((int,), f'an integer, or "{AUTO}"'),
    float: ((int, float), "a number"),
}


def insert_config(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """argv of `sps2` with the settings of its --config file in front of the command's own flags."""
    path, command = _find_config(argv[1:]), _commands(parser).get(argv[0]) if argv else None
    if path is None or command is None:
        return argv
    given = {flag.split("=")[0] for flag in argv[1:] if flag.startswith("--")}
    try:
        settings = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        flags = [flag for key, value in settings.items() for flag in _flags(command, given, key, value)]
    except (OSError, ValueError) as error:
        command.error(f"--config {path}: {error}")
    return [argv[0], *flags, *argv[1:]]


def _find_config(argv: list[str]) -> str | None:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    try:
        path: str | None = finder.parse_known_args(argv)[0].config
    except argparse.ArgumentError:  # no file after it; the real parser says so
        return None
    return path


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def _flags(command: argparse.ArgumentParser, given: set[str], key: str, value: Any) -> list[str]:
    """One TOML entry as flags; none when the user gave this flag, or one that excludes it."""
    flag = "--" + key.replace("_", "-")
    actions = {option: action for action in command._actions for option in action.option_strings}
    action = actions.get(flag)
    if action is None or key in ("config", "help"):
        raise ValueError(f"{key} is not a flag of this command")
    rivals = [rival for group in command._mutually_exclusive_groups for rival in _others(group, action)]
    if given & {option for other in (action, *rivals) for option in other.option_strings}:
        return []
    return _spell(flag, action, key, value)


def _others(group: argparse._MutuallyExclusiveGroup, action: argparse.Action) -> list[argparse.Action]:
    return group._group_actions if action in group._group_actions else []


def _spell(flag: str, action: argparse.Action, key: str, value: Any) -> list[str]:
    if action.nargs == 0:  # a switch; one that can be switched off has a --no- form
        _check(key, value, (bool,), "true or false")
        off = [option for option in action.option_strings if option.startswith("--no-")]
        return [flag] if value else off
    types, wanted = TOML_TYPES[action.type]
    if action.type is size_or_auto and value == AUTO:
        return [f"{flag}={AUTO}"]
    if action.nargs != "*" and not isinstance(action, argparse._AppendAction):
        _check(key, value, types, wanted)
        return [f"{flag}={value}"]
    _check(key, value, (list,), f"a list, each {wanted}")
    for one in value:
        _check(key, one, types, wanted)
    if action.nargs == "*":
        return [flag, *map(str, value)]
    return [f"{flag}={one}" for one in value]


def _check(key: str, value: Any, types: Sequence[type], wanted: str) -> None:
    if not isinstance(value, tuple(types)) or (isinstance(value, bool) and bool not in types):
        raise ValueError(f"{key} = {value!r} must be {wanted}")
