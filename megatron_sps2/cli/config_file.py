"""--config FILE: a TOML file whose keys are flags of the command, without the dashes in front.

Its settings are put before the user's own flags, so that argparse checks both alike and the user's win; and
those of --deepspeed-config before them.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sps2.cli.arguments import AUTO, DEEPSPEED_FLAGS, size_or_auto
from megatron_sps2.cli.deepspeed_config import read_deepspeed

# The type a flag's value has in TOML, by argparse's type. bool is no int here, though Python says so.
TOML_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    None: ((str,), "a string"),
    int: ((int,), "an integer"),
    size_or_auto: ((int,), f'an integer, or "{AUTO}"'),
    float: ((int, float), "a number"),
}


def insert_config(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """argv of `sps2` with the settings of its files in front of the command's own flags."""
    command = _commands(parser).get(argv[0]) if argv else None
    if command is None:
        return argv
    given = {flag.split("=")[0] for flag in argv[1:] if flag.startswith("--")}
    flags: list[str] = []
    for options, read in ((DEEPSPEED_FLAGS, _read_deepspeed), (("--config",), _read_toml)):
        path = _find_path(options, argv[1:])
        if path is None or options[0] not in command._option_string_actions:
            continue
        try:
            settings = read(command, path)
            flags += [flag for key, value in settings.items() for flag in _flags(command, given, key, value)]
        except (OSError, ValueError) as error:
            command.error(f"{options[0]} {path}: {error}")
    return [argv[0], *flags, *argv[1:]]


def _find_path(options: Sequence[str], argv: list[str]) -> str | None:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument(*options, dest="path")
    try:
        path: str | None = finder.parse_known_args(argv)[0].path
    except argparse.ArgumentError:  # no file after it; the real parser says so
        return None
    return path


def _read_toml(command: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    return tomllib.loads(Path(path).read_text(encoding="utf-8"))


def _read_deepspeed(command: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    settings, skipped = read_deepspeed(path)
    if "--dp" not in command._option_string_actions and (size := settings.pop("dp", 1)) != 1:
        raise ValueError(f"data_parallel_size = {size} must be 1: this command runs one replica")
    # Logging is set up when the flags are known.
    command.set_defaults(skipped_settings=f"{path}: not used here: {', '.join(skipped)}" if skipped else None)
    return settings


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def _flags(command: argparse.ArgumentParser, given: set[str], key: str, value: Any) -> list[str]:
    """One TOML entry as flags; none when the user gave this flag, or one that excludes it."""
    flag = "--" + key.replace("_", "-")
    actions = {option: action for action in command._actions for option in action.option_strings}
    action = actions.get(flag)
    if action is None or key.replace("_", "-") in ("config", "deepspeed-config", "help"):
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
