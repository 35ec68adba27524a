"""Which tokens of a command line are options, overrides or the config file.

Overrides come as `training.budget.steps=10`, `--scheduled_sampling_reflexflow=false` or
`--scheduled_sampling_max_step_offset 10`. The last form is joined before the options are parsed,
so that `10` is never taken for the config file, in whatever order the tokens stand. What the
overrides mean is the loader's business (`raysched.config`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from raysched.errors import ConfigError

CONFIG_COMMANDS = frozenset({"train", "plan", "tune", "show-config", "verify-resume"})
FLAGS = frozenset({"--json", "--resume", "--retry-failed", "--help"})
# No slash before the sign: `runs/lr=0.1/config.yaml` is a file.
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*=")


def join_values(argv: Sequence[str]) -> list[str]:
    """Turn `--key value` into `--key=value`, in the commands that take a config.

    Args:
        argv: the command and what follows it.

    Returns:
        The same tokens; the options in `FLAGS` and settings given as a flag alone stay alone.
    """
    if not CONFIG_COMMANDS.intersection(argv[:1]):
        return list(argv)
    joined: list[str] = []
    rest = list(reversed(argv))
    while rest:
        token = rest.pop()
        is_key = token.startswith("--") and len(token) > 2 and "=" not in token
        if is_key and token not in FLAGS and rest and _is_value(token[2:], rest[-1]):
            token = f"{token}={rest.pop()}"
        joined.append(token)
    return joined


def split_arguments(tokens: Iterable[str]) -> tuple[str | None, list[str]]:
    """Separate the config file from the overrides.

    Args:
        tokens: what is left of the command line, values joined to their keys.

    Returns:
        The config file, None if there is none, and the overrides in their order.

    Raises:
        ConfigError: several files.
    """
    files: list[str] = []
    overrides: list[str] = []
    for token in tokens:
        is_override = token.startswith("-") or _ASSIGNMENT.match(token)
        (overrides if is_override else files).append(token)
    if len(files) > 1:
        raise ConfigError(
            f"command line: one file is expected, got {len(files)} ({', '.join(files)}); "
            "a setting is key=value or --key=value"
        )
    return (files[0] if files else None), overrides


def _is_value(key: str, token: str) -> bool:
    """Whether a token that follows `--key` is its value."""
    from raysched.config.fields import RUN, fits
    from raysched.config.overrides import parse_value

    if token.startswith("--"):
        return False
    leaf = RUN.leaves.get(RUN.resolve(key))
    if leaf is None or not fits(leaf, True):
        return True
    # `--scheduled_sampling_reflexflow config.yaml`: true or false may stand there, a file can't.
    try:
        return fits(leaf, parse_value(token, leaf))
    except ValueError:
        return False
