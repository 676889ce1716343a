"""Dataclasses from a YAML file plus ``--dotted.key value`` overrides.

Leaf machinery: it knows no other room. Each room declares its own dataclasses with ``option`` and
``training/run_config.py`` composes them. Types and ranges are checked by pydantic; this module adds
the location of a mistake, the nearest known key, overrides and ``--help``.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from megamtp.errors import UserError

T = TypeVar("T")

REQUIRED = dataclasses.MISSING


def config_dataclass(cls: type[T]) -> type[T]:
    """A frozen keyword-only dataclass whose fields pydantic checks, refusing unknown ones."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid")
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def option(default: Any, help: str) -> Any:
    """A config field with a line of help. ``REQUIRED`` has no default; a class is a nested config."""
    if default is REQUIRED:
        return dataclasses.field(metadata={"help": help})
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Build ``cls`` from nested plain values.

    Raises ``UserError`` naming ``where``, the dotted key and, for an unknown key, the nearest known one.
    """
    _refuse_unknown_keys(cls, values, where)
    values = _without_empty_sections(cls, values)
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        # A value that may be of several types has an error for each: what got furthest was meant.
        first = max(error.errors(), key=lambda each: len(each["loc"]))
        key = _dotted(first)
        messages = [each["msg"].removeprefix("Value error, ") for each in error.errors() if _dotted(each) == key]
        message = " or ".join(dict.fromkeys(messages))
        if first["type"] == "missing":
            raise UserError(f"{where}: {key} is missing; give it in the file or as --{key} VALUE") from None
        given = f" (got {first['input']!r})" if key and not isinstance(first["input"], dict) else ""
        raise UserError(f"{where}: {key + ': ' if key else ''}{message}{given}") from None


def load(cls: type[T], path: str | Path, overrides: list[str]) -> T:
    """Read ``path`` (YAML) and lay ``["--model.dim", "256", "--seed=1", ...]`` over it.

    Raises ``UserError`` for an unreadable file, broken YAML, an unknown key or a wrong value.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"{path}: cannot read the config: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an impossible date
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(values).__name__}")
    _refuse_unknown_keys(cls, values, str(path))
    where = str(path)
    for key, text in parse_overrides(overrides):
        where = f"{path} with overrides"
        _refuse_unknown_keys(cls, _nested(key, None), "command line")
        _set(values, key, _parse_value(cls, key, text))
    return from_dict(cls, values, where)


def parse_overrides(arguments: list[str]) -> list[tuple[str, str]]:
    """``["--a.b", "1", "--c=2"]`` -> ``[("a.b", "1"), ("c", "2")]``; ``UserError`` for anything else."""
    pairs, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise UserError(f"command line: unexpected {argument!r}; overrides are written --section.key VALUE")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"command line: --{key} needs a value")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, fit for YAML and JSON."""
    return dataclasses.asdict(config)


def dump(config: Any) -> str:
    """YAML that ``load`` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def describe(cls: type) -> str:
    """One line a key: ``--dotted.key TYPE  help (default)``; the body of a command's ``--help``."""
    rows = [
        (f"--{key} {_type_name(hint)}", f"{field.metadata.get('help', '')} ({_default_text(field)})")
        for key, field, hint in leaves(cls)
    ]
    width = max(len(left) for left, _ in rows)
    return "\n".join(f"  {left:<{width}}  {right}" for left, right in rows)


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Every settable key of a config class as (dotted key, field, type)."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        nested = _nested_class(hints[field.name])
        if nested is None:
            yield prefix + field.name, field, hints[field.name]
        else:
            yield from leaves(nested, f"{prefix}{field.name}.")


def _nested_class(hint: Any) -> type | None:
    if typing.get_origin(hint) is list:
        return None
    for candidate in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _dotted(error: Any) -> str:
    """The key of pydantic's error, whose path also names the type that it tried: train.list[SourceConfig].0.weight."""
    kinds = ("str", "int", "float", "bool", "none")
    return ".".join(str(part) for part in error["loc"] if part not in kinds and "[" not in str(part))


def _item_class(hint: Any) -> type | None:
    """The dataclass of which ``hint`` may be a list."""
    for candidate in (hint, *typing.get_args(hint)):
        if typing.get_origin(candidate) is list:
            return _nested_class(*typing.get_args(candidate))
    return None


def _refuse_unknown_keys(
    cls: type, values: dict[str, Any], where: str, prefix: str = "", root: type | None = None
) -> None:
    root = root or cls
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            near = _nearest(str(key), prefix, cls, root)
            raise UserError(f"{where}: unknown key {prefix}{key}{f'; did you mean {near}?' if near else ''}")
        nested = _nested_class(hints[key])
        if nested is not None and isinstance(value, dict):
            _refuse_unknown_keys(nested, value, where, f"{prefix}{key}.", root)
        elif (item := _item_class(hints[key])) and isinstance(value, list):
            for index, entry in enumerate(value):
                if isinstance(entry, dict):
                    _refuse_unknown_keys(item, entry, where, f"{prefix}{key}.{index}.", root)


def _nearest(key: str, prefix: str, cls: type, root: type) -> str | None:
    """The dotted key that was meant: a typo in this section, or the right key in the wrong section."""
    everywhere = [known for known, _, _ in leaves(root)]
    elsewhere = [known for known in everywhere if known.rsplit(".", 1)[-1] == key]
    typo = [prefix + name for name in difflib.get_close_matches(key, list(typing.get_type_hints(cls)), n=1)]
    anywhere = difflib.get_close_matches(prefix + key, everywhere, n=1, cutoff=0.5)
    return next(iter(elsewhere + typo + anywhere), None)


def _without_empty_sections(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """``heads:`` with all its lines commented out is YAML's null; it means the defaults."""
    hints = typing.get_type_hints(cls)
    return {
        key: {} if value is None and dataclasses.is_dataclass(hints[key]) else value for key, value in values.items()
    }


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[last] = value


def _parse_value(cls: type, key: str, text: str) -> Any:
    hint = next((hint for known, _, hint in leaves(cls) if known == key), None)
    kinds = {hint, *typing.get_args(hint)}
    if hint is str or str in kinds and not (type(None) in kinds and text in ("null", "~")) and text[:1] != "[":
        return text  # a folder named 2024 is no number
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"command line: --{key}: cannot read the value {text!r}") from None


def _type_name(hint: Any) -> str:
    if item := typing.get_origin(hint) is list and _nested_class(*typing.get_args(hint)):
        return f"[{{{', '.join(typing.get_type_hints(item))}}}, ...]"
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(str(value) for value in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return "|".join(_type_name(part) for part in typing.get_args(hint) if part is not type(None))
    return getattr(hint, "__name__", str(hint)).upper() if not typing.get_args(hint) else str(hint)


def _default_text(field: dataclasses.Field) -> str:
    if field.default is not REQUIRED:
        return f"default {'null' if field.default is None else field.default}"
    if field.default_factory is not REQUIRED:
        return f"default {field.default_factory()}"
    return "required"
