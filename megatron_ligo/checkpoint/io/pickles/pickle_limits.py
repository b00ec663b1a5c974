"""Limits the size of unpickled trees before anything walks them: a few bytes can expand beyond any memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_ligo.common.errors import CheckpointError, Problem

# Far above what a checkpoint needs besides its tensors, and far below what is slow to walk or print.
MOST_NODES = 1 << 23
MOST_DEPTH = 64


def check_tree(where: str, tree: object) -> None:
    """Raises CheckpointError for containers that contain themselves, nest too deeply, or are too many.

    A shared container counts once for each reference to it.
    """
    counted: dict[int, tuple[int, int]] = {}  # id -> nodes, depth
    open_ids: set[int] = set()
    stack = [(tree, False)]
    while stack:
        node, visited = stack.pop()
        children = list(_children(node))
        if visited:
            below = [counted[id(child)] for child in children if id(child) in counted]
            nodes = 1 + len(children) - len(below) + sum(nodes for nodes, _ in below)
            depth = 1 + max((depth for _, depth in below), default=0)
            open_ids.discard(id(node))
            counted[id(node)] = nodes, depth
            if nodes > MOST_NODES or depth > MOST_DEPTH:
                _refuse(where, f"{MOST_DEPTH} levels and {MOST_NODES} values at most", f"{depth} and {nodes}")
        elif id(node) in open_ids:
            _refuse(where, "containers that do not hold themselves", type(node).__name__)
        elif children and id(node) not in counted:
            open_ids.add(id(node))
            stack.append((node, True))
            stack += ((child, False) for child in children)


def _children(node: object) -> Iterator[object]:
    if isinstance(node, Mapping):
        yield from node.keys()
        yield from node.values()
    elif isinstance(node, list | tuple | set | frozenset):
        yield from node
    elif type(node).__module__.startswith(__name__.partition(".")[0]) and not isinstance(node, type):
        # An inert stand-in of this package.
        yield from vars(node).values()


def _refuse(where: str, expected: str, found: str) -> None:
    raise CheckpointError(Problem(where, expected, found, "No checkpoint holds such values; the file is not read."))
