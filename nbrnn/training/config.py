"""Plain descriptions of losses, optimizers and schedules, from which a checkpoint builds them again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar


class Configured:
    """An object that says how to build its like: its class and its constructor's arguments.

    `arguments` names the arguments; each is kept as an attribute of the same name.
    """

    arguments: tuple[str, ...] = ()

    def config(self) -> dict[str, Any]:
        """The class's name and the constructor's arguments as plain JSON values."""
        return {"name": type(self).__name__} | {name: _plain(getattr(self, name)) for name in self.arguments}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.arguments)})"


def _plain(value: Any) -> Any:
    if isinstance(value, Configured):
        return value.config()
    return list(value) if isinstance(value, tuple) else value


Kind = TypeVar("Kind", bound=Configured)


def build(config: Any, kinds: Iterable[type[Kind]]) -> Kind:
    """The object that `config` describes.

    Parameters
    ----------
    config : mapping
        What the object's `config()` returned.
    kinds : iterable of class
        The classes it may be of; nothing else is ever called.

    Raises
    ------
    ValueError, TypeError
        The name or an argument is unknown, missing, or out of range.
    """
    by_name = {kind.__name__: kind for kind in kinds}
    if not isinstance(config, Mapping) or config.get("name") not in by_name:
        raise ValueError(f"config: expected one of {', '.join(by_name)}, got {config!r}")
    kind = by_name[config["name"]]
    arguments = {name: value for name, value in config.items() if name != "name"}
    if set(arguments) != set(kind.arguments):
        expected = ", ".join(kind.arguments) or "none"
        raise ValueError(f"config: {kind.__name__} has the arguments {expected}, got {', '.join(arguments) or 'none'}")
    return kind(**arguments)


def check_number(name: str, value: Any, least: float = 0.0, below: float = math.inf) -> float:
    """A finite number in [least, below), or a clear error."""
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    if not (math.isfinite(number) and least <= number < below):
        wanted = f"a finite number from {least:g} on" if below == math.inf else f"a number in [{least:g}, {below:g})"
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    return number
