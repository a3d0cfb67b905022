"""The path of a warp as loops within loops, shortened where it repeats, and the time that the shortened part stands
for.

A launch of thousands of tiles a program need not be simulated to the end: a loop of n iterations is run for k of them,
spread evenly, and the time of an iteration, measured past the first, stands for the rest."""

from collections.abc import Sequence
from dataclasses import dataclass

from effkernels.tools.simulator.encoding import Code


@dataclass
class Loop:
    """Iterations of a loop, each a list of blocks and loops; ``kept``: which of them are run."""

    head: int
    iterations: list
    kept: list[int]


def nested(path: list[int], loops: dict[int, frozenset[int]]) -> list:
    """The blocks of a path, in loops."""
    out: list = []
    stack: list[tuple[int, frozenset, list]] = []
    current = out
    for block in path:
        while stack and block not in stack[-1][1]:
            _, _, current = stack.pop()
        if stack and block == stack[-1][0]:
            loop = stack[-1][2][-1]
            loop.iterations.append([])
            current = loop.iterations[-1]
        elif block in loops:
            loop = Loop(block, [[]], [])
            current.append(loop)
            stack.append((block, loops[block], current))
            current = loop.iterations[0]
        current.append(block)
    return out


def size(items: list, lengths: list[int], everything: bool = False) -> int:
    """Instructions of the kept iterations, or of all."""
    total = 0
    for item in items:
        if isinstance(item, Loop):
            if everything or not item.kept:
                total += sum(size(iteration, lengths, everything) for iteration in item.iterations)
            else:
                total += sum(size(item.iterations[j], lengths) for j in item.kept)
        else:
            total += lengths[item]
    return total


def _loops_at(items: list, depth: int):
    for item in items:
        if isinstance(item, Loop):
            if depth == 0:
                yield item
            else:
                for j in item.kept or range(len(item.iterations)):
                    yield from _loops_at(item.iterations[j], depth - 1)


def shorten(items: list, lengths: list[int], budget: float, deepest: int = 3) -> None:
    """Choose the iterations to run so that about ``budget`` instructions remain: of the outermost loops first, at least
    4 of each."""
    for depth in range(deepest):
        total = size(items, lengths)
        if total <= budget:
            return
        share = budget / total
        for loop in _loops_at(items, depth):
            n = len(loop.iterations)
            keep = max(4, round(n * share))
            if keep < n:
                loop.kept = sorted({round(j * (n - 1) / (keep - 1)) for j in range(keep)})


def flatten(items: list, blocks: list[list], mark: tuple, out: list) -> list:
    """The operations of the kept iterations, with a mark where a shortened loop begins and after each of its
    iterations."""
    for item in items:
        if not isinstance(item, Loop):
            out += blocks[item]
            continue
        if item.kept:
            out.append(mark)
        for j in item.kept or range(len(item.iterations)):
            flatten(item.iterations[j], blocks, mark, out)
            if item.kept:
                out.append(mark)
    return out


def skipped_time(items: list, times: Sequence[float], at: int = 0) -> tuple[float, int]:
    """(clocks that the iterations left out would have taken, marks used), for a warp that passed the marks at
    ``times``."""
    extra = 0.0
    for item in items:
        if not isinstance(item, Loop):
            continue
        if not item.kept:
            for iteration in item.iterations:
                more, at = skipped_time(iteration, times, at)
                extra += more
            continue
        stamps, inner = [times[at]], 0.0
        at += 1
        for j in item.kept:
            more, at = skipped_time(item.iterations[j], times, at)
            inner += more
            stamps.append(times[at])
            at += 1
        n, kept = len(item.iterations), len(item.kept)
        steady = (stamps[-1] - stamps[1]) / (kept - 1)
        extra += (n - kept) * steady + inner * n / kept
    return extra, at


def lengths_of(code: Code) -> list[int]:
    """How many instructions each basic block has."""
    return [last - first + 1 for first, last in code.blocks]
