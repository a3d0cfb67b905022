"""One streaming multiprocessor that runs programs instruction by instruction, in the order and with the waits that
ptxas encoded.

Every resource is a time at which it is free again, so an operation that issues knows at once when its result will be
there, and a warp's next instruction when it may issue: nothing is polled. Four schedulers issue one instruction a clock
each: the warp before goes on while it can, then the oldest. What it holds: pipes, the shared memory's and L1's passes,
one queue to L2 and one to DRAM, six scoreboards a warp, groups of asynchronous copies and of matrix products, barriers,
tensor copies in order."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

from effkernels.tools.simulator.encoding import NO_SCOREBOARD
from effkernels.tools.simulator.machine import (
    BARRIER,
    COMMIT_COPIES,
    COPY,
    FMA,
    FMA_HEAVY,
    FMA_LIGHT,
    LOAD,
    MARK,
    MATRIX,
    MEMORY,
    PIPE,
    PIPES,
    PRODUCT,
    SHARED,
    STORE,
    TENSOR_COPY,
    WAIT_COPIES,
    WAIT_PRODUCTS,
    WAIT_TENSORS,
    Machine,
)

# What a warp waits for: results of memory, of shared memory, groups of copies and of products, a barrier, other results
# of no fixed latency, a free pipe and issue slot, and the clocks that ptxas makes it stall for results of fixed
# latency.
REASONS = ("memory", "shared memory", "copies", "products", "barrier", "results", "slots", "stall")
_MEMORY, _SHARED, _COPIES, _PRODUCTS, _BARRIER, _RESULTS, _SLOTS, _STALL = range(len(REASONS))


# What operations take for some clocks: pipes of a scheduler, and what all four share.
RESOURCES = (*PIPES, "shared memory, L1", "L2", "DRAM")
_L1, _L2, _DRAM = RESOURCES[len(PIPES) :]


@dataclass(frozen=True)
class Operation:
    """An instruction as the event loop needs it. passes: clocks of the SM's shared memory or L1; l2, dram: bytes of an
    average warp."""

    kind: int
    pipe: int
    clocks: float
    latency: float
    stall: int
    sets: int
    releases: int
    waits: tuple[int, ...]
    passes: float = 0.0
    l2: float = 0.0
    dram: float = 0.0
    # of DEPBAR: how many may be outstanding; of a product: 1 ends a group; of BAR: (name, warps); of a tensor copy: the
    # warp that issues it
    group: object = 0
    board: int = 0
    index: int = -1  # of the instruction

    def packed(self) -> tuple:
        """Its fields as a tuple, which the event loop reads faster; it stalls for at least one clock."""
        return (
            self.kind,
            self.pipe,
            self.clocks,
            self.latency,
            max(self.stall, 1),
            self.sets,
            self.releases,
            self.waits,
            self.passes,
            self.l2,
            self.dram,
            self.group,
            self.board,
            self.index,
        )


class _Warp:
    __slots__ = (
        "ops",
        "at",
        "boards",
        "why",
        "program",
        "scheduler",
        "copied",
        "copies",
        "product",
        "products",
        "waited",
        "times",
        "row",
    )

    def __init__(self, ops, program, scheduler, row):
        self.ops, self.at, self.program, self.scheduler, self.row = ops, 0, program, scheduler, row
        self.boards, self.why = [0] * 6, [_RESULTS] * 6
        self.copied, self.copies, self.product, self.products = 0.0, defaultdict(list), 0.0, []
        self.waited, self.times = 0, []


class _Resident:
    """A program on the SM."""

    __slots__ = ("warps", "left", "arrived", "tensors", "blocked", "start", "end", "traces")

    def __init__(self, traces, start):
        self.traces, self.left, self.start, self.end = traces, len(traces), start, 0.0
        self.arrived: dict = {}
        self.tensors: list[float] = []
        self.blocked, self.warps = [], []


@dataclass
class Run:
    """What happened: clocks until the last program ended, instructions, the times of each program's warps, and why
    warps waited."""

    clocks: float
    instructions: int
    programs: list
    waits: dict[str, float]
    pipes: dict[str, float]
    l2: float
    dram: float
    passes: float
    barriers: int
    timeline: list["Event"] = field(default_factory=list)


class Event(NamedTuple):
    """Something that takes ``clocks`` from ``clock`` on.

    what: "issue", or one of ``REASONS`` for a warp that waits, with its row; or one of ``RESOURCES`` that an operation
    takes, with its scheduler in the place of a row, as each scheduler has pipes of its own. kind and pipe: the
    operation's."""

    clock: float
    clocks: float
    row: int
    what: str
    kind: int
    pipe: int


def simulate(
    machine: Machine,
    programs: Iterable[list[list[tuple]]],
    resident: int,
    l2_rate: float,
    dram_rate: float,
    timeline: bool = False,
) -> Run:
    """Run ``programs``, each a list of a trace (tuples of ``Operation.packed``) a warp, at most ``resident`` at once.

    l2_rate, dram_rate: bytes a clock that the SM gets.
    """
    queue = list(reversed(programs))
    finished: list[_Resident] = []
    futures = [[] for _ in range(4)]  # (time, order, warp) of each scheduler
    ready: list[list] = [[] for _ in range(4)]
    pipes = [[0.0] * 8 for _ in range(4)]
    nexts = [0.0] * 4
    previous = [None] * 4
    busy = [0.0] * 8
    waits = [0.0] * len(REASONS)
    lsu = l2 = dram = 0.0
    l2_bytes = dram_bytes = passes_all = 0.0
    order = issued = barriers = started = 0
    events: list = []
    store_release, barrier_latency = machine.store_release, machine.barrier
    shared_queue, memory_queue = machine.shared_queue, machine.memory_queue
    l2_latency, far = machine.l2_latency, machine.memory_latency - machine.l2_latency

    def start(now):
        nonlocal started
        traces = queue.pop()
        program = _Resident(traces, now)
        for w, ops in enumerate(traces):
            scheduler = w % 4 if len(traces) % 4 == 0 else started % 4
            started += 1
            warp = _Warp(ops, program, scheduler, started - 1)
            program.warps.append(warp)
            schedule(warp, now + w)

    def schedule(warp, now):
        """Put a warp whose next instruction can issue at ``now`` at the earliest in its scheduler's queue."""
        nonlocal order
        ops, at = warp.ops, warp.at
        when, reason = now, _STALL
        while True:
            op = ops[at]
            if op[0] != MARK:
                break
            warp.times.append(now)
            at += 1
            if at == len(ops):
                break
        warp.at = at
        if at == len(ops):
            end(warp, now)
            return
        boards = warp.boards
        for k in op[7]:
            if boards[k] > when:
                when, reason = boards[k], warp.why[k]
        kind = op[0]
        if kind == WAIT_COPIES:
            pending = warp.copies[op[12]]
            if len(pending) > op[11]:
                until = max(pending[: len(pending) - op[11]])
                if until > when:
                    when, reason = until, _COPIES
        elif kind == WAIT_PRODUCTS:
            pending = warp.products
            if len(pending) > op[11]:
                until = pending[len(pending) - op[11] - 1]
                if until > when:
                    when, reason = until, _PRODUCTS
        elif kind == WAIT_TENSORS:
            if warp.waited >= len(warp.program.tensors):
                warp.program.blocked.append((warp, now))
                return
            until = warp.program.tensors[warp.waited]
            if until > when:
                when, reason = until, _COPIES
        waits[reason] += when - now
        if timeline and when - now > 4:
            events.append(Event(now, when - now, warp.row, REASONS[reason], kind, op[1]))
        s = warp.scheduler
        order += 1
        heappush(futures[s], (when, order, warp))
        if when < nexts[s]:
            nexts[s] = when

    def end(warp, now):
        program = warp.program
        program.left -= 1
        if program.left == 0:
            program.end = now
            finished.append(program)
            for stuck, _ in program.blocked:
                stuck.program.tensors.append(now)
            if queue:
                start(now + machine.program_start)

    for _ in range(min(resident, len(queue))):
        start(0.0)
    infinite = float("inf")
    clock = 0.0
    while True:
        clock = min(nexts)
        if clock == infinite:
            break
        s = nexts.index(clock)
        future, mine, taken = futures[s], ready[s], pipes[s]
        while future and future[0][0] <= clock:
            entry = heappop(future)
            mine.append((entry[2].row, entry[2], entry[0]))
        best = None
        soonest = infinite
        last = previous[s]
        if len(mine) > 1:
            mine.sort()
        for position, entry in enumerate(mine):
            warp = entry[1]
            op = warp.ops[warp.at]
            kind = op[0]
            if kind == PIPE or kind == PRODUCT:
                free = taken[op[1]] if kind == PIPE else taken[MATRIX] - 64
            elif kind == FMA:
                free = min(taken[FMA_LIGHT], taken[FMA_HEAVY])
            elif kind == SHARED:
                free = max(taken[MEMORY], lsu - shared_queue)
            elif kind == LOAD or kind == COPY or kind == STORE:
                free = max(taken[MEMORY], lsu - shared_queue, l2 - memory_queue, dram - memory_queue)
            else:
                free = 0.0
            if free <= clock:
                if best is None or warp is last:
                    best = position
                if warp is last or last is None:
                    break
            elif free < soonest:
                soonest = free
        if best is None:
            later = future[0][0] if future else infinite
            nexts[s] = max(clock + 1, min(later, soonest)) if later < infinite or soonest < infinite else infinite
            continue
        _, warp, since = mine.pop(best)
        kind, pipe, clocks, latency, stall, sets, releases, _, passes, l2_amount, dram_amount, group, board, _ = (
            warp.ops[warp.at]
        )
        waits[_SLOTS] += clock - since
        waits[_STALL] += stall
        issued += 1
        previous[s] = warp
        done = clock + (latency or 20)
        reason = _RESULTS
        if kind == PIPE:
            taken[pipe] = clock + clocks
            busy[pipe] += clocks
            done = clock + clocks + latency
        elif kind == FMA:
            pipe = FMA_LIGHT if taken[FMA_LIGHT] <= clock else FMA_HEAVY
            taken[pipe] = clock + clocks
            busy[pipe] += clocks
        elif kind == SHARED:
            taken[MEMORY] = clock + clocks
            lsu = (lsu if lsu > clock else clock) + passes
            passes_all += passes
            done = lsu + latency
            reason = _SHARED
        elif kind == LOAD or kind == STORE or kind == COPY:
            taken[MEMORY] = clock + clocks
            lsu = (lsu if lsu > clock else clock) + passes
            passes_all += passes
            reached = lsu
            if l2_amount:
                l2 = (l2 if l2 > clock else clock) + l2_amount / l2_rate
                l2_bytes += l2_amount
                reached = max(reached, l2)
            if dram_amount:
                dram = (dram if dram > clock else clock) + dram_amount / dram_rate
                dram_bytes += dram_amount
                reached = max(reached, dram)
            share = dram_amount / l2_amount if l2_amount else 0.0
            done = reached + l2_latency + far * min(1.0, share) if l2_amount else lsu + 33
            reason = _MEMORY
            if kind == STORE:
                done = clock + 30
            elif kind == COPY:
                warp.copied = max(warp.copied, done)
                done = clock + 30
        elif kind == PRODUCT:
            taken[MATRIX] = (taken[MATRIX] if taken[MATRIX] > clock else clock) + clocks
            busy[MATRIX] += clocks
            warp.product = taken[MATRIX] + latency
            if group:
                warp.products.append(warp.product)
        elif kind == COMMIT_COPIES:
            done = max(warp.copied, clock + 5)
            warp.copies[sets if sets != NO_SCOREBOARD else 0].append(done)
            reason = _COPIES
        elif kind == WAIT_COPIES:
            pending = warp.copies[board]
            if len(pending) > 8:
                del pending[:-8]
        elif kind == WAIT_PRODUCTS:
            if len(warp.products) > 8:
                del warp.products[:-8]
        elif kind == TENSOR_COPY:
            program = warp.program
            if warp is program.warps[group]:
                l2 = (l2 if l2 > clock else clock) + l2_amount / l2_rate
                dram = (dram if dram > clock else clock) + dram_amount / dram_rate
                l2_bytes += l2_amount
                dram_bytes += dram_amount
                program.tensors.append(max(l2, dram) + l2_latency + far)
                blocked, program.blocked = program.blocked, []
                for other, since in blocked:
                    schedule(other, since)
        elif kind == WAIT_TENSORS:
            warp.waited += 1
        if sets != NO_SCOREBOARD and done > warp.boards[sets]:
            warp.boards[sets] = done
            warp.why[sets] = reason
        if releases != NO_SCOREBOARD:
            until = max(clock + store_release, lsu if kind in (SHARED, LOAD, STORE, COPY) else 0.0)
            if until > warp.boards[releases]:
                warp.boards[releases] = until
                warp.why[releases] = _SHARED if kind != PRODUCT else _PRODUCTS
        if timeline:
            events.append(Event(clock, 1.0, warp.row, "issue", kind, pipe))
            if kind in (PIPE, FMA, SHARED, LOAD, STORE, COPY):
                events.append(Event(clock, clocks, s, PIPES[pipe], kind, pipe))
            if kind in (SHARED, LOAD, STORE, COPY) and passes:
                events.append(Event(lsu - passes, passes, s, _L1, kind, pipe))
            if kind == PRODUCT:
                events.append(Event(taken[MATRIX] - clocks, clocks, s, PIPES[MATRIX], kind, pipe))
            if kind in (LOAD, STORE, COPY) or kind == TENSOR_COPY and warp is warp.program.warps[group]:
                for name, end_of, amount in ((_L2, l2, l2_amount / l2_rate), (_DRAM, dram, dram_amount / dram_rate)):
                    if amount:
                        events.append(Event(end_of - amount, amount, s, name, kind, pipe))
        warp.at += 1
        now = clock + stall
        if kind == BARRIER:
            program = warp.program
            name, needed = group
            waiting = program.arrived.setdefault(name, [])
            waiting.append((warp, now))
            needed = needed or len(program.warps)
            if len(waiting) >= needed:
                del program.arrived[name]
                barriers += 1
                for other, arrived in waiting:
                    go = max(clock + barrier_latency, arrived)
                    waits[_BARRIER] += go - arrived
                    if timeline:
                        events.append(Event(arrived, go - arrived, other.row, "barrier", kind, pipe))
                    if other.at == len(other.ops):
                        end(other, go)
                    else:
                        schedule(other, go)
        elif warp.at == len(warp.ops):
            end(warp, now)
        else:
            schedule(warp, now)
        if mine:
            nexts[s] = clock + 1
        else:
            nexts[s] = max(clock + 1, future[0][0]) if future else infinite
    clocks = max((program.end for program in finished), default=0.0)
    return Run(
        clocks,
        issued,
        finished,
        dict(zip(REASONS, waits, strict=True)),
        dict(zip(PIPES, busy, strict=True)),
        l2_bytes,
        dram_bytes,
        passes_all,
        barriers,
        events,
    )
