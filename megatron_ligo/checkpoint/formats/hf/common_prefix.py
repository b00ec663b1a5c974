"""A prefix that all tensor names of a file share beyond the family's names, or that the base model's names lack.

Wrappers add one (`module.`, `_orig_mod.`, a trainer's `model.`), and a base model saved alone lacks one. Both are read
where they are unambiguous: one change of all names, after which more of the model's tensors are there than before.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from megatron_ligo.common.errors import ErrorCollector

log = logging.getLogger(__name__)

# The most dotted parts of a prefix that are tried.
MOST_PARTS = 8


@dataclass(frozen=True)
class Renaming:
    """What is removed from the beginning of every name of a file, and then added there."""

    removed: str = ""
    added: str = ""

    def apply(self, name: str) -> str:
        return self.added + name.removeprefix(self.removed)

    def report(self, where: str) -> None:
        """Logs the change, if there is any."""
        if self:
            log.info("%s: tensor names are read %s", where, self)

    def __bool__(self) -> bool:
        return self != Renaming()

    def __str__(self) -> str:
        parts = []
        if self.removed:
            parts.append(f"without their prefix {self.removed!r}")
        if self.added:
            parts.append(f"as a base model's, with the prefix {self.added!r}")
        return ", ".join(parts)


def common_parts(names: Collection[str]) -> list[str]:
    """Returns the dotted parts with which all names begin; not their last part."""
    first, last = min(names).split(".")[:-1], max(names).split(".")[:-1]
    count = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), None)
    return first[: min(len(first), len(last)) if count is None else count]


def find_renaming(
    names: Collection[str], base_prefix: str, count_matches: Callable[[Collection[str]], int]
) -> Renaming:
    """Returns the change of all names after which the most of a model's tensors are there; none if it helps nothing.

    base_prefix: what a base model's names lack ("" for none); count_matches: how many of the model's tensors are among
    some names.
    """
    if not names:
        return Renaming()
    parts = common_parts(names)[:MOST_PARTS]
    removed = ["", *(".".join(parts[: count + 1]) + "." for count in range(len(parts)))]
    candidates = [Renaming(prefix, added) for added in dict.fromkeys(("", base_prefix)) for prefix in removed]
    counts = [count_matches([candidate.apply(name) for name in names]) for candidate in candidates]
    return candidates[counts.index(max(counts))]


def explain_other_names(names: Collection[str], expected: Sequence[str], where: str, errors: ErrorCollector) -> None:
    """Adds one error for names of which none is expected: what they have instead, such as a prefix of some of them."""
    prefixes = Counter(
        name.removesuffix(suffix) for name in names for suffix in expected[:4] if name.endswith(f".{suffix}")
    )
    found = f"{len(names)} tensors of other names, such as {min(names)[:200]}" if names else "none"
    hint = ""
    if prefixes:
        prefix, _ = prefixes.most_common(1)[0]
        count = sum(name.startswith(prefix) for name in names)
        found = f"the prefix {prefix[:200]!r} before {count} of {len(names)} names"
        hint = "Save that part of the model alone."
    errors.add(where, f"the model's tensors, such as {expected[0]}", found, hint)
