"""What was unpickled, weighed before anything walks it: a few bytes can nest to more than any memory holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_ligo.common.errors import CheckpointError, Problem

# Far above what a checkpoint needs besides its tensors, and far below what hurts to walk or to show.
MOST_NODES = 1 << 23
MOST_DEPTH = 64


def check_tree(where: str, tree: object) -> None:
    """CheckpointError for containers that hold themselves, lie too deep, or come to too many where shared ones count
    each time that they are met."""
    weights: dict[int, tuple[int, int]] = {}  # id -> nodes, depth
    open_: set[int] = set()
    todo = [(tree, False)]
    while todo:
        node, done = todo.pop()
        inside = list(_children(node))
        if done:
            below = [weights[id(child)] for child in inside if id(child) in weights]
            nodes = 1 + len(inside) - len(below) + sum(nodes for nodes, _ in below)
            depth = 1 + max((depth for _, depth in below), default=0)
            open_.discard(id(node))
            weights[id(node)] = nodes, depth
            if nodes > MOST_NODES or depth > MOST_DEPTH:
                _refuse(where, f"{MOST_DEPTH} levels and {MOST_NODES} values at most", f"{depth} and {nodes}")
        elif id(node) in open_:
            _refuse(where, "containers that do not hold themselves", type(node).__name__)
        elif inside and id(node) not in weights:
            open_.add(id(node))
            todo.append((node, True))
            todo += ((child, False) for child in inside)


def _children(node: object) -> Iterator[object]:
    if isinstance(node, Mapping):
        yield from node.keys()
        yield from node.values()
    elif isinstance(node, list | tuple | set | frozenset):
        yield from node
    elif type(node).__module__.startswith(__name__.partition(".")[0]) and not isinstance(node, type):
        # Inert stand-ins.
        yield from vars(node).values()


def _refuse(where: str, expected: str, found: str) -> None:
    raise CheckpointError(Problem(where, expected, found, "It is not read: it is no checkpoint's."))
