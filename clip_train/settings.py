"""What a user sets and what a user is told: config dataclasses to and from json, `--set key=value`, UserError."""

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Config = TypeVar("Config")

# on_progress(done, total, **numbers): long calls report here; None means nobody listens.
Progress = Callable[..., None]


class UserError(Exception):
    """Something the user can put right. The command line prints its one line and exits with 2."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came; the step was finished and a checkpoint written."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped after step {step}; run the same command again to go on")
        self.number = number


def config_to_json(config: Any) -> dict[str, Any]:
    """The config's fields as plain json values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_json(cls: type[Config], data: Mapping[str, Any], where: str) -> Config:
    """Build `cls` from json; `where` (a file, usually) is named when a field is unknown, missing or mistyped."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: expected an object of settings, found {type(data).__name__}")
    for name in data:
        if name not in fields:
            raise UserError(f"{where}: unknown setting {name!r}; known: {', '.join(fields)}")
    for name, field in fields.items():
        if name not in data and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: setting {name!r} is missing")
    values = {name: _converted(value, hints[name], f"{where}: {name}") for name, value in data.items()}
    return cls(**values)


def override(configs: Sequence[Any], pairs: Sequence[str]) -> list[Any]:
    """Copies of `configs` with `key=value` strings applied, each to the config that has the key, read as its type."""
    changes: list[dict[str, Any]] = [{} for _ in configs]
    for pair in pairs:
        name, equals, text = pair.partition("=")
        owners = [i for i, c in enumerate(configs) if name in {f.name for f in dataclasses.fields(c)}]
        if not equals or not owners:
            known = sorted(f.name for c in configs for f in dataclasses.fields(c))
            raise UserError(f"--set {pair}: expected key=value with a key out of: {', '.join(known)}")
        for i in owners:
            hint = typing.get_type_hints(type(configs[i]))[name]
            changes[i][name] = _converted(_parsed(text), hint, f"--set {name}", text)
    return [dataclasses.replace(c, **some) for c, some in zip(configs, changes, strict=True)]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _converted(value: Any, hint: Any, where: str, text: str | None = None) -> Any:
    """`value` as the type of a config field: int, float, bool, str, a tuple of these, or one of a union."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or text == "none":
            if type(None) in typing.get_args(hint):
                return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
        origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} must be a list, not {value!r}")
        inner = typing.get_args(hint)[0]
        return tuple(_converted(v, inner, where) for v in value)
    if hint is dict or origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} must be an object, not {value!r}")
        return value
    if hint is str and text is not None:
        return text
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, bool) and hint is not bool or not isinstance(value, hint):
        raise UserError(f"{where} must be {hint.__name__}, not {value!r}")
    return value
