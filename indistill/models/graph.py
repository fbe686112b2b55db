"""The autograd graph, from a result back to what it was computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.autograd.graph import Node


def walk(root: Node | None, ends_at: Callable[[Node], bool] | None = None) -> Iterator[Node]:
    """Yield each node reachable from `root` once, depth first, `root` itself included.

    A node for which `ends_at` holds is yielded, and not followed. Keep the nodes that are compared later:
    torch makes another Python object for a node whose first one is gone.
    """
    seen: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if ends_at is None or not ends_at(node):
            stack.extend(parent for parent, _ in node.next_functions)
