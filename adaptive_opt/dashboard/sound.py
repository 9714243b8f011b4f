"""Whether a report that came out of a file is one: every field of the type and size that records.py says.

`from_json` builds the records from whatever the line holds; a hostile line may put text where a number belongs. The checks
are made from the records' own annotations, so a new field is checked from the day it is there.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import Any

from adaptive_opt.records import StepReport

WHOLE = 2**53  # beyond it a step is not a whole number for the browser any more
REAL = 1e308
TEXT = 20_000  # characters

Check = Callable[[Any], bool]


def sound(report: StepReport) -> bool:
    """True when every field is what the records say; NaN passes as a loss that is not a number."""
    return _record(StepReport)(report) and report.step >= 0


@cache
def _record(cls: type) -> Check:
    hints = typing.get_type_hints(cls)
    checks = [(f.name, _check(hints[f.name])) for f in dataclasses.fields(cls)]

    def whole(x: Any) -> bool:
        return type(x) is cls and all(check(getattr(x, name)) for name, check in checks)

    return whole


def _check(hint: Any) -> Check:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        (inner,) = [_check(a) for a in args if a is not type(None)]
        return lambda x: x is None or inner(x)
    if origin is tuple:
        item = _check(args[0])
        return lambda x: type(x) is tuple and all(map(item, x))
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast(type, hint))
    return _plain(hint)


def _plain(hint: Any) -> Check:
    if hint is bool:
        return lambda x: type(x) is bool
    if hint is int:
        return lambda x: type(x) is int and -WHOLE < x < WHOLE
    if hint is float:
        return lambda x: type(x) in (float, int) and (x != x or -REAL < x < REAL)
    if hint is str:
        return _text
    if isinstance(hint, type) and issubclass(hint, Enum):
        return lambda x: type(x) is hint
    raise TypeError(f"no check for a field of type {hint!r}")


def _text(x: Any) -> bool:
    if type(x) is not str or len(x) > TEXT:
        return False
    return x.isascii() or not any("\ud800" <= c <= "\udfff" for c in x)  # half a character cannot be written anywhere
