"""What each option takes: its type, its choices, its range. All callers check options here."""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import Field, dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pear_train.choices import Augmentation
from pear_train.errors import ConfigError


@dataclass(frozen=True)
class _Range:
    """Allowed values of a number. Values outside are typing errors: they would overflow or fill the memory."""

    low: float
    high: float
    above: bool = False
    """Whether `low` itself is excluded."""
    below: bool = False
    """Whether `high` itself is excluded."""

    def __contains__(self, value: float) -> bool:
        inside = self.low <= value <= self.high  # a NaN is in no range
        return inside and not (self.above and value == self.low) and not (self.below and value == self.high)

    def __str__(self) -> str:
        ends: tuple[float, float] = self.low, self.high
        low, high = (f"{end:g}" if end >= 1e9 and isinstance(end, float) else f"{int(end):,}" for end in ends)
        return f"{'above' if self.above else 'at least'} {low} and {'below' if self.below else 'at most'} {high}"


_RANGES = {
    "epochs": _Range(1, 100_000),
    "prune_epoch": _Range(0, 100_000),  # TrainConfig checks it against the epochs
    "rank": _Range(1, 4_096),  # a larger adapter would exceed the matrices beside it
    "scale": _Range(0, 1e6, above=True),  # a base's adapters are divided by it
    "ratio": _Range(0, 1, below=True),  # at 1, no adapter would be kept to borrow from
    "borrowed_scale": _Range(-1e6, 1e6),
    "scale_lr": _Range(0, 1e6, above=True),
    "lr": _Range(0, 1_000, above=True),  # AdamW moves a weight by about so much in a step
    "weight_decay": _Range(0, 1_000),
    "warmup": _Range(0, 1),  # a share
    "max_grad_norm": _Range(0, 1e12, above=True),
    "drop_branch": _Range(0, 1, below=True),  # the other branches are divided by 1 minus this
    "label_smoothing": _Range(0, 1, below=True),
    "threshold_accuracy": _Range(0, 1, above=True),
    "batch_size": _Range(1, 1_000_000),
    "seed": _Range(0, 2**63 - 1),  # the limit of torch and of a checkpoint
    "img_size": _Range(1, 16_384),  # the limit of a task checkpoint
    "patience": _Range(1, 100_000),
    "base_blocks": _Range(0, 10_000),
    "bank_share": _Range(1, 1_000),
    "own_rank": _Range(0, 4_096),
    "own_bytes": _Range(0, 2**32),  # the limit of a task checkpoint
    "core_lr": _Range(0, 1e6, above=True),
    "bases_lr": _Range(0, 1e6),  # 0: the bases do not change
}

_AUGMENTATIONS: tuple[Augmentation, ...] = get_args(Augmentation)

_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


def choices(option: Field[Any]) -> tuple[Any, ...]:
    """The values of an option whose type is a Literal. Empty for other types."""
    return get_args(option.type) if get_origin(option.type) is Literal else ()


def kinds(option: Field[Any]) -> list[str]:
    """The names of the types of an option's values, without None."""
    if fixed := choices(option):
        return list(dict.fromkeys(type(value).__name__ for value in fixed))
    types = get_args(option.type) or (option.type,)
    return [kind.__name__ for kind in types if kind is not NoneType]


def check_option(shown: str, option: Field[Any], value: Any) -> None:
    """Checks the value of one option.

    Args:
        shown: the option's name in messages.
    Raises:
        ConfigError: the value has the wrong type, or the option does not allow it.
    """
    name = option.name
    if value is None and option.default is None:
        return
    allowed, fixed = kinds(option), choices(option)
    where = f"{shown} {_short(value)}"
    if not any(type(value) in _TYPES[kind] for kind in allowed):
        raise ConfigError(f"{where}: expected {' or '.join(allowed)}")
    if fixed and value not in fixed:
        raise ConfigError(f"{where}: expected one of {', '.join(map(str, fixed))}")
    if name in _RANGES and value not in _RANGES[name]:
        raise ConfigError(f"{where}: expected {_RANGES[name]}")


def checked_options(where: str, options: Mapping[str, Any], known: Mapping[str, Field[Any]]) -> dict[str, Any]:
    """Checks each option alone. Returns the options by their names in `known`.

    Args:
        where: the start of every message.
    Raises:
        ConfigError: an option is unknown, or does not allow its value.
    """
    checked = {}
    for key, value in options.items():
        name = re.sub("-", "_", key)
        if name not in known:
            raise ConfigError(f"{where}: unknown option {key!r}: expected one of {', '.join(known)}")
        try:
            check_option(f"{key} =", known[name], value)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        checked[name] = value
    return checked


def parse_settings(where: str, settings: Iterable[str], known: Mapping[str, Field[Any]]) -> dict[str, Any]:
    """Parses options from texts ``name=value``, as on a command line. ``none`` is None if the option allows it.

    Args:
        where: the start of every message.
    Raises:
        ConfigError: a text has no ``=``, a name comes twice or is unknown, or an option does not allow its value.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        name = re.sub("-", "_", key.strip())
        if not equals:
            raise ConfigError(f"{where}: {_short(setting)}: expected name=value, such as rank=8")
        if name in values:
            raise ConfigError(f"{where}: {name} is set twice: set it once")
        values[name] = _parsed(text.strip(), known[name]) if name in known else text
    return checked_options(where, values, known)


def _parsed(text: str, option: Field[Any]) -> Any:
    """The text as a value of the option's type. Any other text is returned unchanged, and the check then refuses it."""
    allowed = kinds(option)
    if option.default is None and "str" not in allowed and text.lower() == "none":
        return None
    if "bool" in allowed:
        return {"true": True, "false": False}.get(text.lower(), text)
    numbers = {"int": (int,), "float": (int, float)}
    for number in numbers.get(allowed[0], ()):
        with suppress(ValueError):
            return number(text)
    return text


def _short(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10**20:
        return "of more than 20 digits"  # Python refuses to print very long ones
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def parse_augment(text: str) -> tuple[Augmentation, ...]:
    """The words of an option such as ``flip+color``, in the order in which they are applied. Empty for "none".

    Raises:
        ConfigError: a word is unknown, or comes twice.
    """
    said = [] if text == "none" else text.split("+")
    if len(set(said)) < len(said) or not set(said) <= set(_AUGMENTATIONS):
        raise ConfigError(f"augment {_short(text)}: expected none, or some of {', '.join(_AUGMENTATIONS)} joined by +")
    return tuple(word for word in _AUGMENTATIONS if word in said)
