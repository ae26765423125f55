"""Loops of a control flow graph."""

from __future__ import annotations

from collections.abc import Sequence


def loops(edges: Sequence[Sequence[int]]) -> list[frozenset[int]]:
    """Bodies of the natural loops of a control flow graph whose entry is node 0.

    A back edge leads to a node that dominates its start; the body is what reaches the edge without passing
    that node. Loops with one head are one loop. A node that only jumps to itself is no loop: ptxas pads with
    those.
    """
    order, before = _reverse_postorder(edges)
    rank = {node: position for position, node in enumerate(order)}
    dominator = _dominators(order, rank, before)
    bodies: dict[int, set[int]] = {}
    for node in order:
        for head in edges[node]:
            if rank[head] < rank[node] and _dominates(dominator, head, node):
                body = bodies.setdefault(head, {head})
                waiting = [node]
                while waiting:
                    inside = waiting.pop()
                    if inside not in body:
                        body.add(inside)
                        waiting.extend(before[inside])
    return [frozenset(body) for body in bodies.values()]


def _reverse_postorder(edges: Sequence[Sequence[int]]) -> tuple[list[int], dict[int, list[int]]]:
    """Nodes reachable from 0, and their reachable predecessors."""
    before: dict[int, list[int]] = {0: []}
    finished: list[int] = []
    path = [(0, iter(edges[0]))]
    while path:
        node, rest = path[-1]
        for goal in rest:
            if goal in before:
                before[goal].append(node)
            else:
                before[goal] = [node]
                path.append((goal, iter(edges[goal])))
                break
        else:
            finished.append(node)
            path.pop()
    return finished[::-1], before


def _dominators(order: Sequence[int], rank: dict[int, int], before: dict[int, list[int]]) -> dict[int, int]:
    """Immediate dominators (Cooper, Harvey and Kennedy, A Simple, Fast Dominance Algorithm)."""
    dominator = {0: 0}
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            known = [one for one in before[node] if one in dominator]
            meeting = known[0]
            for one in known[1:]:
                while one != meeting:
                    if rank[one] > rank[meeting]:
                        one = dominator[one]
                    else:
                        meeting = dominator[meeting]
            if dominator.get(node) != meeting:
                dominator[node] = meeting
                changed = True
    return dominator


def _dominates(dominator: dict[int, int], upper: int, node: int) -> bool:
    while node not in (upper, 0):
        node = dominator[node]
    return node == upper
