"""Settings as text: read from a file or from key=value pairs, and given the types that a configuration's fields
declare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from vlmedit.errors import ConfigError


def read_settings(path: Path) -> dict:
    """Settings of a .json or .yaml file. Raises `ConfigError` for anything but a mapping."""
    import yaml

    if not path.exists() and path.suffix.lower() in ("", ".yaml"):
        from vlmedit.training.settings import find_config

        path = find_config(path)
    if path.suffix.lower() not in (".json", ".yaml", ".yml"):
        raise ConfigError(f"--config {path}: unknown ending {path.suffix!r}; give a .json or .yaml file")
    try:
        found = yaml.safe_load(path.read_text())  # JSON is YAML
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not {path.suffix[1:].upper()} ({error})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--config {path}: a {type(found).__name__}, not a mapping of settings")
    return {str(k): v for k, v in found.items()}


def parse_pairs(pairs: Sequence[str], option: str = "--set") -> dict:
    """['lr=1e-3', ...] as a dictionary of texts."""
    wrong = [p for p in pairs if "=" not in p or not p.split("=", 1)[0]]
    if wrong:
        raise ConfigError(f"{option} {' '.join(wrong)}: write key=value")
    return dict(p.split("=", 1) for p in pairs)


def convert(name: str, value: Any, kind: Any) -> Any:
    """A setting's text, or its JSON value, as the type its field declares. Raises `ConfigError` naming it."""
    origin, inner = get_origin(kind), get_args(kind)
    try:
        if type(None) in inner:
            if value in (None, "none", "None", "null"):
                return None
            return convert(name, value, next(k for k in inner if k is not type(None)))
        if origin is tuple:
            texts = value.strip("()[] ").split(",") if isinstance(value, str) else None
            parts = list(value) if texts is None else [text.strip() for text in texts if text.strip()]
            kinds = inner[:1] * len(parts) if inner[1:] == (...,) else inner
            return tuple(convert(name, p, k) for p, k in zip(parts, kinds, strict=True))
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is int and not isinstance(value, bool) and float(value) == int(float(value)):
            return int(float(value))
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is str and isinstance(value, (str, int, float)):
            return str(value)
        if kind not in (bool, int, float, str):
            return value
    except (ValueError, TypeError, KeyError, OverflowError):
        pass
    raise ConfigError(f"{name} is {value!r}; it must be {getattr(kind, '__name__', kind) if origin is None else kind}")


def typed(config_class, given: dict) -> dict:
    """Settings with their fields' types; unknown keys stay, for `make` to refuse."""
    place = str(given.get("data", "world"))
    kinds = config_class.known(place) if hasattr(config_class, "known") else get_type_hints(config_class)
    return {k: convert(k, v, kinds[k]) if k in kinds else v for k, v in given.items()}
