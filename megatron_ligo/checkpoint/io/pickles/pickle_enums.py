"""Reads enum members from pickles.

The first releases of Python 3.11 (Debian 12 has 3.11.2) pickle them as `getattr(class, name)`, all others as
`class(value)`. getattr is allowed for nothing else.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from enum import Enum

GETATTR = ("builtins", "getattr")


def enum_stand_ins(kinds: Iterable[object]) -> Callable[[object, object], object]:
    """Returns a replacement of `getattr` that looks up members of these classes only.

    For an enum it returns the member, for a stand-in class the stand-in called with the member's name.
    """
    allowed = [kind for kind in kinds if isinstance(kind, type)]

    def member(kind: object, name: object) -> object:
        if not any(kind is one for one in allowed) or type(name) is not str:
            raise pickle.UnpicklingError("WeightsUnpickler error: getattr of something other than an enum")
        return kind[name] if issubclass(kind, Enum) else kind(name)

    return member
