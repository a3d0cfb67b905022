"""One program of a launch, carried out as far as its path and its addresses need: how often each instruction runs, for
which threads, and what every load and store touches.

Only the instructions that a branch, an address, a mask or a barrier's name depends on are carried out
(``translate.Program``), all threads of the program at once. Threads that part at a branch go on in groups, the one
furthest behind first, until they meet.

Memory is not there: a global load gives 0. An atomic addition before any other access to memory hands out tickets, in
the order of the programs; a later one gives ``AWAITED``, which equals no count of arrivals, and where the program
compares it, what it was compared with is kept, so that the program that comes last can be emulated as well.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from effkernels.tools.simulator.encoding import BRANCHES, Code, Instruction
from effkernels.tools.simulator.project import SLOT_BITS
from effkernels.tools.simulator.translate import Program, conditions, prepared
from effkernels.tools.simulator.values import M, select, truth

AWAITED = 0x5A170000
MOST_BLOCKS = 3_000_000  # of a path; a longer one is not a kernel of this kind
SAMPLES = 3  # executions of an instruction whose addresses are looked at, where not all are recorded


class EmulationError(RuntimeError):
    """The path depends on something that is not emulated; the message names the instruction."""


@dataclass
class Requests:
    """What an instruction that touches memory did in one program: executions, those with an active thread, and active
    threads in all.

    Of ``sampled`` executions: the warps that carried it out, the 32-byte sectors of every warp, those of the program
    each once, the 128-byte lines of every warp, and the passes of an average warp through the shared memory's banks;
    ``tensors``: slots of addresses. ``addresses``: those of the active threads of every execution, an array each, where
    they are recorded."""

    executions: int = 0
    active: int = 0
    threads: int = 0
    group_warps: int = 0
    sampled: int = 0
    sectors: int = 0
    unique: int = 0
    lines: int = 0
    passes: float = 0.0
    tensors: set = field(default_factory=set)
    addresses: list = field(default_factory=list)


@dataclass
class Copies:
    """Of an instruction that announces tensor copies, or starts one from shared memory: how often, of how many bytes in
    all, and in which warp."""

    executions: int = 0
    bytes: int = 0
    warp: int = 0


@dataclass
class Path:
    """What one program did. ``events``: (block, warps or None for all of them), in order; requests by instruction;
    ``awaited``: whether it compared a count of arrivals, so that it may come last; ``unknown``: instructions that were
    not carried out."""

    program: int
    warps: int
    events: list
    requests: dict[int, Requests]
    shared: dict[int, Requests]
    copies: dict[int, Copies]
    awaited: dict[int, int]
    unknown: dict[str, int]

    def of_warp(self, warp: int) -> list[int]:
        """The basic blocks that a warp runs, in order."""
        return [block for block, who in self.events if who is None or warp in who]

    def classes(self) -> list[list[int]]:
        """Warps that take the same path, together."""
        if all(who is None for _, who in self.events):
            return [list(range(self.warps))]
        found: dict[tuple, list[int]] = {}
        for warp in range(self.warps):
            found.setdefault(tuple(self.of_warp(warp)), []).append(warp)
        return list(found.values())


class Emulator:
    """State of one program while it runs. constants: {offset in constant bank 0: 32-bit word}."""

    def __init__(
        self,
        program: Program,
        constants: dict[int, int],
        block: tuple[int, int, int],
        linear: int,
        record: bool = False,
        arrivals: dict[int, int] | None = None,
        counters: dict[int, int] | None = None,
    ):
        code = program.code
        self.program, self.code, self.record = program, code, record
        self.warps, self.threads = code.warps, 32 * code.warps
        lanes = np.arange(self.threads, dtype=np.int64)
        self.lanes = lanes
        self.special = defaultdict(int)
        self.special |= {
            "SR_TID.X": lanes,
            "SR_LANEID": lanes & 31,
            "SR_CTAID.X": block[0],
            "SR_CTAID.Y": block[1],
            "SR_CTAID.Z": block[2],
            "SR_LTMASK": (1 << (lanes & 31)) - 1,
            "SR_LEMASK": (2 << (lanes & 31)) - 1,
            "SR_EQMASK": 1 << (lanes & 31),
            "SR_CLOCKLO": 0,
            "SR_VIRTID": 0,
        }
        self.constants = constants
        self.linear, self.arrivals, self.counters = linear, arrivals, counters
        self.mask = None
        self.accesses = 0
        self.atomics: dict[int, int] = defaultdict(int)
        self.compared: dict[int, int] = {}
        self.tickets: dict[int, int] = {}
        self.requests: dict[int, Requests] = defaultdict(Requests)
        self.shared: dict[int, Requests] = defaultdict(Requests)
        self.copies: dict[int, Copies] = defaultdict(Copies)
        self.stored = 0  # bytes in shared memory since the last copy from there
        self.memory = np.zeros(1 << 18, np.uint8)
        self.local: dict = {}
        self.last_atomic = -1

    # -- what blocks call

    def _active(self, guard):
        if self.mask is not None:
            guard = guard & self.mask
        return truth(guard)

    def touch(self, k: int, address: int | np.ndarray, guard: bool | np.ndarray) -> None:
        """Instruction ``k`` accesses global memory: count it, and look at the addresses of its first executions."""
        active = self._active(guard)
        self.accesses += 1
        of = self.requests[k]
        of.executions += 1
        if active is False:
            return
        of.active += 1
        of.threads += self.threads if active is True else int(np.count_nonzero(active))
        if self.counters and self.code.instructions[k].base == "STG":
            for place in np.unique(address):
                if int(place) in self.counters:  # the last one leaves a counter at 0
                    self.counters[int(place)] = 0
        if self.record:
            lanes = (
                np.broadcast_to(address, self.threads)
                if active is True
                else np.broadcast_to(address, self.threads)[active]
            )
            of.addresses.append(np.array(lanes, np.int64))
        if of.sampled < SAMPLES or self.record:
            self._sample(of, address, active, self.code.instructions[k].width)

    def _sample(self, of: Requests, address, active, width: int):
        addresses = np.broadcast_to(address, self.threads).astype(np.int64)
        sectors = (addresses >> 5).reshape(self.warps, 32)
        if active is not True:
            sectors = np.where(active.reshape(self.warps, 32), sectors, -1)
        ordered = np.sort(sectors, axis=1)
        first = np.ones_like(ordered, bool)
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        first &= ordered >= 0
        of.sectors += int(first.sum())
        lines = ordered >> 2
        new = np.ones_like(ordered, bool)
        new[:, 1:] = lines[:, 1:] != lines[:, :-1]
        new &= ordered >= 0
        of.lines += int(new.sum())
        found = np.unique(ordered)
        of.unique += int((found >= 0).sum())
        of.tensors.update(np.unique(found[found >= 0] >> (SLOT_BITS - 5)).tolist())
        of.group_warps += self.warps if self.mask is None else int(self.mask.reshape(self.warps, 32).any(1).sum())
        of.sampled += 1

    def copy_out(self, k: int, guard: bool | np.ndarray) -> None:
        """A thread starts a tensor copy of what was stored to shared memory since the one before."""
        if self._active(guard) is not False:
            of = self.copies[k]
            of.executions += 1
            of.bytes += self.stored
            self.stored = 0

    def touch_shared(self, k: int, address: int | np.ndarray, guard: bool | np.ndarray) -> None:
        """Instruction ``k`` accesses shared memory: count it, and what it stores; bank conflicts are those of its first
        execution."""
        active = self._active(guard)
        i = self.code.instructions[k]
        of = self.shared[k]
        of.executions += 1
        if active is False:
            return
        of.active += 1
        of.threads += self.threads if active is True else int(np.count_nonzero(active))
        if i.base in ("STS", "STSM"):
            count = self.threads if active is True else int(np.count_nonzero(active))
            self.stored += count * (
                i.width if i.base == "STS" else 4 * max(int(m) for m in (*i.modifiers, "1") if m in ("1", "2", "4"))
            )
        if of.sampled < 1:
            of.passes += self._passes(address, active, i)
            of.sampled += 1

    def _passes(self, address, active, i: Instruction) -> float:
        """Passes of an average warp through the 32 banks of 4 bytes."""
        addresses = np.broadcast_to(address, self.threads).reshape(self.warps, 32)
        active = np.broadcast_to(active, self.threads).reshape(self.warps, 32)
        if i.base in ("LDSM", "STSM"):  # a thread gives the address of a row of 16 bytes, eight of them are a matrix
            matrices = next((int(m) for m in i.modifiers if m in ("4", "2")), 1)
            groups, words = [slice(8 * m, 8 * m + 8) for m in range(matrices)], 4
        else:
            words = max(1, i.width // 4)
            groups = [slice(g * 32 // words, (g + 1) * 32 // words) for g in range(words)]
        total = 0
        for warp in range(self.warps):
            for group in groups:
                at = addresses[warp, group][active[warp, group]]
                if at.size:
                    word = np.unique(((at >> 2)[:, None] + np.arange(words)).ravel())
                    total += int(np.bincount(word & 31).max())
        return total / self.warps

    def expect(self, k: int, amount: int | np.ndarray, guard: bool | np.ndarray) -> None:
        """A thread announces the bytes of the tensor copies that a barrier in shared memory waits for."""
        active = self._active(guard)
        if active is False:
            return
        thread = 0 if active is True else int(np.flatnonzero(active)[0])
        amount = amount if type(amount) is int else int(amount[thread])
        if amount:
            of = self.copies[k]
            of.executions += 1
            of.bytes += amount
            of.warp = thread // 32

    def atomic(
        self, k: int, address: int | np.ndarray, value: int | np.ndarray, guard: bool | np.ndarray
    ) -> int | np.ndarray:
        """What an atomic addition finds: a ticket, a count of arrivals, or, with counters, the true value."""
        active = self._active(guard)
        if active is False:
            return 0
        if self.counters is not None:
            return self._added(address, value, active)
        again = self.last_atomic == k and self.atomics[k] > 0
        self.last_atomic = k
        self.atomics[k] += 1
        if k in self.tickets or (self.accesses <= 1 and not self.atomics.keys() - {k}):
            self.tickets[k] = self.linear
            return self.linear
        if self.arrivals and k in self.arrivals:
            return self.arrivals[k]
        if again and k in self.compared:  # it waits in a loop for the value that it was compared with
            return self.compared[k]
        return AWAITED

    def observe(self, address: int | np.ndarray) -> int | np.ndarray:
        """What a load finds that may be of a count that other programs raise: one for which nobody waits any longer."""
        if self.counters is None:
            return AWAITED
        if type(address) is int:
            return self.counters.get(address, 0)
        return np.array([self.counters.get(int(place), 0) for place in address], np.int64)

    def reduce(self, address: int | np.ndarray, value: int | np.ndarray, guard: bool | np.ndarray) -> None:
        """An atomic addition whose result nobody asks for."""
        active = self._active(guard)
        if self.counters is not None and active is not False:
            self._added(address, value, active)

    def _added(self, address, value, active):
        """The same where the programs run one after the other: the counters' true values."""
        threads = np.flatnonzero(np.broadcast_to(active, self.threads))
        at, amounts = (np.broadcast_to(x, self.threads) for x in (address, value))
        found = np.zeros(self.threads, np.int64)
        for thread in threads.tolist():
            place = int(at[thread])
            found[thread] = self.counters.get(place, 0)
            self.counters[place] = int(found[thread] + amounts[thread]) & M
        return found

    def _compares(self, a, b):
        """Keep what a count of arrivals is compared with."""
        for one, other in ((a, b), (b, a)):
            values = one if type(one) is int else int(one.flat[0]) if getattr(one, "size", 0) else 0
            if abs(values - AWAITED) <= 8 and self.last_atomic >= 0:
                count = other if type(other) is int else int(other.flat[0])
                self.compared[self.last_atomic] = (count - (values - AWAITED)) & M

    def equal(self, a: int | np.ndarray, b: int | np.ndarray) -> bool | np.ndarray:
        """Whether two values are equal; what a count of arrivals is compared with is kept."""
        self._compares(a, b)
        return a == b

    def differ(self, a: int | np.ndarray, b: int | np.ndarray) -> bool | np.ndarray:
        """The opposite of ``equal``, which keeps the same."""
        self._compares(a, b)
        return a != b

    def uniform(self, x: int | np.ndarray) -> int | np.ndarray:
        """The value of each warp's first running thread, for a uniform register (R2UR)."""
        if type(x) is int:
            return x
        rows = x.reshape(self.warps, 32)
        if self.mask is not None:
            first = self.mask.reshape(self.warps, 32).argmax(1)
            values = rows[np.arange(self.warps), first]
            running = self.mask.reshape(self.warps, 32).any(1)
            kept = values[running]
        else:
            values = kept = rows[:, 0]
        if kept.size and (kept == kept[0]).all():
            return int(kept[0])
        return np.repeat(values, 32)

    def shuffle(
        self, how: str, x: int | np.ndarray, lane: int | np.ndarray, mask: int | np.ndarray
    ) -> int | np.ndarray:
        """Each thread's ``x`` of another lane of its warp (SHFL). how: IDX, BFLY, UP or DOWN; mask: the clamp, and the
        segments' bits above it."""
        if type(x) is int:
            return x
        clamp = mask & 31 if type(mask) is int else 31
        me = self.lanes & 31
        segment = (mask >> 8 & 31) if type(mask) is int else 0
        source = {"IDX": lane, "BFLY": me ^ lane, "UP": me - lane, "DOWN": me + lane}[how]
        source = np.broadcast_to(np.asarray(source, np.int64), me.shape)
        if how == "UP":
            source = np.where(source < (me & segment), me, source)
        else:
            source = np.where(source > np.maximum(clamp, me & segment), me, source) if how != "IDX" else source & 31
        return x[(self.lanes & ~31) + (source & 31)]

    def ballot(self, p: bool | np.ndarray) -> int | np.ndarray:
        """Bits of a warp's running threads whose predicate holds."""
        bits = np.broadcast_to(p, self.threads)
        if self.mask is not None:
            bits = bits & self.mask
        rows = (bits.reshape(self.warps, 32).astype(np.int64) << np.arange(32)).sum(1)
        return int(rows[0]) if (rows == rows[0]).all() else np.repeat(rows, 32)

    def vote(self, how: str, p: bool | np.ndarray) -> bool | np.ndarray:
        """Whether the predicate holds for ANY, or else for all, of a warp's running threads."""
        if type(p) is bool:
            return p
        bits = p if self.mask is None else (p & self.mask if how == "ANY" else p | ~self.mask)
        rows = bits.reshape(self.warps, 32)
        result = rows.any(1) if how == "ANY" else rows.all(1)
        return truth(np.repeat(result, 32))

    def elected(self) -> np.ndarray:
        """One running thread of each warp, its first (ELECT)."""
        if self.mask is None:
            return (self.lanes & 31) == 0
        first = self.mask.reshape(self.warps, 32).argmax(1)
        return (self.lanes & 31) == np.repeat(first, 32)

    def _lanes_of(self, address, guard):
        active = self._active(guard)
        at = np.broadcast_to(np.asarray(address, np.int64), self.threads) & (len(self.memory) - 1)
        return at, active

    def store_shared(self, address: int | np.ndarray, width: int, values: list, guard: bool | np.ndarray) -> None:
        """Write words to shared memory, of ``width`` bytes a thread in all; addresses wrap at its size."""
        at, active = self._lanes_of(address, guard)
        if active is False:
            return
        view = self.memory.view({1: np.uint8, 2: np.uint16}.get(width, np.uint32))
        size = min(width, 4)
        for w, value in enumerate(values):
            value = np.broadcast_to(np.asarray(value, np.int64), self.threads) & ((1 << 8 * size) - 1)
            where = at // size + w
            if active is True:
                view[where] = value
            else:
                view[where[active]] = value[active]

    def load_shared(self, address: int | np.ndarray, width: int, negative: bool) -> list:
        """The words of ``width`` bytes in shared memory; ``negative``: the sign of a narrow one is repeated."""
        size = min(width, 4)
        view = self.memory.view({1: np.uint8, 2: np.uint16}.get(width, np.uint32))
        if type(address) is int:
            at = (address & (len(self.memory) - 1)) // size
            return [int(view[at + w]) for w in range(max(1, width // 4))]
        at = (address & (len(self.memory) - 1)) // size
        found = [view[at + w].astype(np.int64) for w in range(max(1, width // 4))]
        if negative:
            top = 1 << (8 * size - 1)
            found = [((value ^ top) - top) & M for value in found]
        return found

    def store_local(self, address: int | np.ndarray, width: int, values: list, guard: bool | np.ndarray) -> None:
        """Write words to each thread's own memory. EmulationError where threads differ in the address."""
        if type(address) is not int:
            raise EmulationError("a store to local memory at an address of its own in every thread")
        active = self._active(guard)
        for w, value in enumerate(values):
            self.local[address + 4 * w] = select(active, value, self.local.get(address + 4 * w, 0))

    def load_local(self, address: int | np.ndarray, width: int, negative: bool) -> list:
        """The words of ``width`` bytes of each thread's own memory; 0 where nothing was stored. EmulationError where
        threads differ in the address."""
        if type(address) is not int:
            raise EmulationError("a load from local memory at an address of its own in every thread")
        return [self.local.get(address + 4 * w, 0) for w in range(max(1, width // 4))]

    # -- the run

    def run(self) -> Path:
        """Carry the program out. EmulationError where it cannot go on, or not end."""
        code, program = self.code, self.program
        state = [0] * 256, [0] * 64, [False] * 8, [False] * 8
        events: list = []
        groups: dict[int, np.ndarray | None] = {0: None}
        everyone = np.ones(self.threads, bool)
        idle = program.blocks_with_nothing
        successors, steps = [], 0
        for first, last in code.blocks:
            del first
            end = code.instructions[last]
            successors.append((end, end.base in BRANCHES))
        while groups:
            block = min(groups) if len(groups) > 1 else next(iter(groups))
            mask = groups.pop(block)
            if block >= len(code.blocks):
                continue
            self.mask = mask
            if mask is None:
                events.append((block, None))
            else:
                events.append((block, frozenset(np.flatnonzero(mask.reshape(self.warps, 32).any(1)).tolist())))
            steps += 1
            if steps > MOST_BLOCKS:
                raise EmulationError(f"more than {MOST_BLOCKS} basic blocks in one program: a wait that never ends?")
            if block not in idle:
                program.function(block, mask is not None)(*state, self.constants, self, mask)
            end, branches = successors[block]
            if not branches:
                self._go(groups, block + 1, mask, everyone)
                continue
            taken = self._taken(end, state)
            if mask is not None and taken is not True:
                taken = truth(taken & mask) if taken is not False else False
            target = self._target(end, state)
            if taken is True:
                self._go(groups, target, mask, everyone)
            elif taken is False:
                self._go(groups, block + 1, mask, everyone)
            else:
                self._go(groups, target, taken, everyone)
                rest = ~taken if mask is None else mask & ~taken
                if rest.any():
                    self._go(groups, block + 1, rest, everyone)
        awaited = {k: value for k, value in self.compared.items() if k not in self.tickets}
        unknown = dict(program.unknown)
        return Path(
            self.linear, self.warps, events, dict(self.requests), dict(self.shared), dict(self.copies), awaited, unknown
        )

    def _taken(self, end: Instruction, state):
        """For which threads a branch is taken: its guard, and a predicate among its operands."""
        if end.base == "BRA" and ("DIV" in end.modifiers or "CONV" in end.modifiers):
            return False
        taken = True
        for name, negated in conditions(end):
            value = state[3][int(name[2:])] if name.startswith("U") else state[2][int(name[1:])]
            taken = taken & (value ^ True if negated else value)
        return truth(taken)

    def _target(self, end: Instruction, state) -> int:
        if end.base in ("EXIT", "KILL"):
            return len(self.code.blocks)
        if end.base == "RET":
            address = state[0][int(re.match(r"R(\d+)", end.operands[0])[1])]
            address = address if type(address) is int else int(address.flat[0])
            if address not in self.code.block_of_address:
                raise EmulationError(f"{end}: no block starts at {address:#x}")
            return self.code.block_of_address[address]
        if end.target is None:
            raise EmulationError(f"{end} is not emulated")
        return self.code.block_of_address[end.target]

    def _go(self, groups, block: int, mask, everyone):
        if block >= len(self.code.blocks):
            return
        if block in groups:
            other = groups[block]
            mask = None if mask is None or other is None else mask | other
        if mask is not None and mask.all():
            mask = None
        groups[block] = mask


def run(
    code: Code,
    constants: dict[int, int],
    grid: tuple,
    linear: int,
    *,
    full: bool = True,
    record: bool = False,
    arrivals: dict[int, int] | None = None,
    counters: dict[int, int] | None = None,
) -> Path:
    """Emulate the program of number ``linear`` of a grid.

    full: with addresses and counts, not the path alone. record: keep every address. arrivals: {atomic: the count that
    it finds}, as the program that comes last would (``Path.awaited`` of another program). counters: {address: value} of
    the atomics, shared by programs that run one after the other. EmulationError where a program cannot be carried
    out."""
    x, y = grid[0], grid[1] if len(grid) > 1 else 1
    block = linear % x, linear // x % y, linear // (x * y)
    return Emulator(prepared(code, full), constants, block, linear, record, arrivals, counters).run()
