"""Members of enumerations in pickles.

The first releases of Python 3.11 (Debian 12 has 3.11.2) write `getattr(class, name)` where others write `class(value)`.
Nothing else may use that name.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from enum import Enum

GETATTR = ("builtins", "getattr")


def enum_stand_ins(kinds: Iterable[object]) -> Callable[[object, object], object]:
    """What takes the place of `getattr`, for members of these classes: of an enumeration its member, of a stand-in what
    it makes of a member's name."""
    known = [kind for kind in kinds if isinstance(kind, type)]

    def member(kind: object, name: object) -> object:
        if not any(kind is one for one in known) or type(name) is not str:
            raise pickle.UnpicklingError("WeightsUnpickler error: getattr of what is no enumeration")
        return kind[name] if issubclass(kind, Enum) else kind(name)

    return member
