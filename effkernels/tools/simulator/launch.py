"""The time of a launch: its programs emulated, a few of them run on one SM, and all of them counted.

``predict(launch, gpu)`` is what the rest of the project calls. Programs of a launch may do different things (roles);
those at which the path changes are found by halving, and each stretch of programs with the same blocks is represented
by its first, middle and last one. One SM gets the programs that it would get, every ``processors``-th, and the
bandwidth that is its share; the launch takes as long as it, and the program that comes last and merges what the others
left takes as much longer as it alone needs."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from effkernels.tools.simulator import emulate, encoding, project, sm, trace
from effkernels.tools.simulator.encoding import Code, Instruction
from effkernels.tools.simulator.machine import (
    BARRIER,
    COPY,
    FREE,
    LOAD,
    MARK,
    PRODUCT,
    SHARED,
    STORE,
    TENSOR_COPY,
    WAIT_COPIES,
    WAIT_PRODUCTS,
    Machine,
    machine_of,
)

BUDGET = 1_000_000  # instructions of the programs on an SM that are run one by one; the rest is extrapolated
PROBES = 24  # programs whose path alone is emulated, to find the roles
_MARK = sm.Operation(MARK, 0, 0, 0, 0, encoding.NO_SCOREBOARD, encoding.NO_SCOREBOARD, ()).packed()


@dataclass
class Sample:
    """A program that stands for ``weight`` programs of a role."""

    path: emulate.Path
    weight: float
    role: int


@dataclass
class Prediction:
    """Of one launch. Times in seconds: ``time`` of the whole launch, ``floors`` by what binds at least; bytes in all of
    the launch."""

    name: str
    grid: tuple
    time: float
    floors: dict[str, float]
    dram_bytes: float
    l2_bytes: float
    instructions: float  # of all warps
    instructions_per_clock: float  # of an SM while it runs
    registers: int
    spills: int
    shared: int
    resident: int  # programs an SM
    warps: int
    barriers_per_tile: float
    elements: int
    waits: dict[str, float]  # share of the warps' time by what they wait for
    pipes: dict[str, float]  # share of the SM's time that each pipe is taken
    roles: int
    tail: float  # seconds of the last program's merge
    unknown: dict[str, int] = field(default_factory=dict)  # instructions that were not emulated
    run: sm.Run | None = None  # what one SM did, where a timeline was asked for

    @property
    def estimated(self) -> bool:
        """Whether its counts come from its loops as they stand, as something that decides them could not be
        emulated."""
        return bool(self.unknown)

    @property
    def bytes_time(self) -> float:
        """Seconds that its distinct bytes take at the bandwidth."""
        return self.floors["bytes"]

    @property
    def waits_most_for(self) -> str:
        """The reason, of ``sm.REASONS``, for which its warps spend most of their time."""
        return max(self.waits, key=self.waits.get)

    @property
    def instructions_per_element(self) -> float:
        """Of a thread, for each element of the largest tensor."""
        return 32 * self.instructions / self.elements if self.elements else 0.0


def code_of(launch: project.Launch, arch: int) -> Code:
    """The launch's machine code, compiled where it is not in the cache."""
    binary, metadata = encoding.compiled(f"{launch.digest(arch)}", lambda: project.compiled_parts(launch, arch))
    memo = _CODES.get(binary)
    if memo is None:
        memo = _CODES[binary] = encoding.read(binary, metadata["name"], arch, metadata["shared"], metadata["warps"])
    return memo


_CODES: dict[bytes, Code] = {}


def samples(launch: project.Launch, code: Code) -> tuple[list[Sample], list[emulate.Path]]:
    """(programs that stand for all, in the order of their numbers and with weights; the program that comes last in its
    kinds)."""
    constants = project.constants(launch, code)
    total = math.prod(launch.grid)
    probes: dict[int, tuple] = {}

    def probe(number):
        if number not in probes:
            path = emulate.run(code, constants, launch.grid, number, full=False)
            probes[number] = path, frozenset(block for block, _ in path.events)
        return probes[number]

    asked = sorted({0, total - 1, total // 2, total // 4, 3 * total // 4})
    for number in asked:
        probe(number)
    stretch = max(1, total // 256)
    while len(probes) < PROBES:
        known = sorted(probes)
        gaps = [
            (b - a, a, b)
            for a, b in zip(known, known[1:], strict=False)
            if b - a > stretch and probes[a][1] != probes[b][1]
        ]
        if not gaps:
            break
        _, a, b = max(gaps)
        probe((a + b) // 2)
    known = sorted(probes)
    segments: list[list[int]] = [[known[0]]]
    for a, b in zip(known, known[1:], strict=False):
        if probes[a][1] == probes[b][1]:
            segments[-1].append(b)
        else:
            segments.append([b])
    bounds = [0]
    for before, after in zip(segments, segments[1:], strict=False):
        bounds.append((before[-1] + after[0] + 1) // 2)
    bounds.append(total)
    found: list[Sample] = []
    roles: dict[frozenset, int] = {}
    for segment, start, stop in zip(segments, bounds, bounds[1:], strict=False):
        role = roles.setdefault(probes[segment[0]][1], len(roles))
        numbers = sorted({start if start in segment else segment[0], segment[len(segment) // 2], segment[-1]})
        kept: list[int] = []
        for number in numbers:  # those that take the same path are one
            if not kept or probes[number][0].events != probes[kept[-1]][0].events:
                kept.append(number)
        edges = [start] + [(a + b + 1) // 2 for a, b in zip(kept, kept[1:], strict=False)] + [stop]
        for number, a, b in zip(kept, edges, edges[1:], strict=False):
            found.append(Sample(emulate.run(code, constants, launch.grid, number), b - a, role))
    last = []
    for role in sorted(roles.values()):
        mine = [sample for sample in found if sample.role == role and sample.path.awaited]
        if mine:
            path = max(mine, key=lambda sample: sample.weight).path
            last.append(emulate.run(code, constants, launch.grid, path.program, arrivals=path.awaited))
    return found, last


# ---- bytes -----------------------------------------------------------------------------------------------------------


def requested(code: Code, path: emulate.Path) -> dict[int, tuple[float, set]]:
    """{instruction: (bytes that one program asks L2 for, in 32-byte sectors, slots of the tensors)} of every access to
    global memory.

    Loads of several warps of the same sectors at the same instruction are served by L1, those that bypass it not.
    """
    found = {}
    for k, of in path.requests.items():
        if not of.sampled:
            if of.executions and of.threads:
                found[k] = 0.0, set()
            continue
        i = code.instructions[k]
        once = (
            i.base in ("LDG", "LD")
            and "STRONG" not in i.modifiers
            or (i.base == "LDGSTS" and "BYPASS" not in i.modifiers)
        )
        sectors = of.unique if once else of.sectors
        found[k] = 32 * sectors / of.sampled * of.active, of.tensors
    return found


def _stores(i: Instruction) -> bool:
    return i.base in ("STG", "ST", "RED", "REDG", "UTMASTG", "UTMAREDG")


TENSOR_MAPS = 0  # the slot of what tensor copies read: tensors that no other instruction touches


@dataclass
class Bytes:
    """Of a launch: what is requested through L2, and as it counts against L2's bandwidth; what DRAM must serve; and for
    each (slot, stores) the shares of a request that count at L2 and DRAM."""

    requested: float
    l2: float
    dram: float
    shares: dict[tuple[int, bool], tuple[float, float]]


def count_bytes(
    launch: project.Launch, code: Code, found: list[Sample], machine: Machine, cached: dict[int, float]
) -> Bytes:
    """cached: {storage: bytes of it that L2 still holds from launches before}."""
    asked: dict[tuple[int, bool], float] = {}
    by_role: dict[tuple[int, bool, int], float] = {}
    for sample in found:
        for k, (amount, slots) in requested(code, sample.path).items():
            for slot in slots:
                key = slot, _stores(code.instructions[k])
                asked[key] = asked.get(key, 0.0) + sample.weight * amount / len(slots)
                of_role = (*key, sample.role)
                by_role[of_role] = by_role.get(of_role, 0.0) + sample.weight * amount / len(slots)
        for k, of in sample.path.copies.items():
            key = TENSOR_MAPS, _stores(code.instructions[k])
            asked[key] = asked.get(key, 0.0) + sample.weight * of.bytes
    sizes: dict[int, tuple[float, int]] = {}
    for tensor in project.tensors(launch):
        size, storage = sizes.get(tensor.slot, (0, tensor.storage))
        sizes[tensor.slot] = min(size + tensor.bytes, tensor.storage_bytes), storage
    others = sum(size for slot, (size, _) in sizes.items() if (slot, False) not in asked and (slot, True) not in asked)
    sizes[TENSOR_MAPS] = others, 0
    shares, dram, through = {}, 0.0, 0.0
    for (slot, stores), amount in asked.items():
        size, storage = sizes.get(slot, (amount, 0))
        passes = 1
        if not stores and size > machine.l2_bytes / 2:  # roles that run one beside the other read it each on its own
            passes = max(
                1, sum(by_role.get((slot, stores, sample), 0.0) >= size / 2 for sample in {s.role for s in found})
            )
        served = min(amount, size * passes)
        if not stores:
            served = max(0.0, served - cached.get(storage, 0.0))
        again = 0.0 if stores else max(0.0, amount - size * passes)
        counts = amount - (1 - machine.l2_again) * again
        shares[slot, stores] = (counts / amount, served / amount) if amount else (1.0, 0.0)
        dram += served
        through += counts
    return Bytes(sum(asked.values()), through, dram, shares)


# ---- operations ------------------------------------------------------------------------------------------------------


def operations(
    code: Code, machine: Machine, path: emulate.Path, shares: Mapping[tuple[int, bool], tuple[float, float]]
) -> list[tuple]:
    """Each instruction as the SM takes it, with the average amounts of this program; shares: those of ``Bytes``."""
    amounts = requested(code, path)
    out = []
    for k, i in enumerate(code.instructions):
        kind, pipe, clocks, latency = machine.operation(i)
        waits = tuple(b for b in range(6) if i.waits >> b & 1)
        passes = l2 = dram = 0.0
        group: object = 0
        board = 0
        if k in path.copies and kind == STORE:  # by one warp of them
            counts, served = shares.get((TENSOR_MAPS, True), (1.0, 1.0))
            amount = path.copies[k].bytes / path.copies[k].executions / code.warps
            l2, dram, passes = amount * counts, amount * served, 1.0
        elif kind in (LOAD, STORE, COPY):
            of = path.requests.get(k)
            if of is None or not of.threads:
                kind = FREE
            else:
                amount, slots = amounts[k]
                runs = of.executions * (of.group_warps / max(of.sampled, 1))
                l2 = amount / runs
                stores = _stores(i)
                parts = [shares.get((slot, stores), (1.0, 1.0)) for slot in slots] or [(1.0, 0.0)]
                dram = l2 * sum(part for _, part in parts) / len(parts)
                l2 *= sum(part for part, _ in parts) / len(parts)
                data = of.threads * i.width / 128 / runs
                passes = max(of.lines / max(of.group_warps, 1) * of.active / of.executions, data)
        elif kind == SHARED:
            of = path.shared.get(k)
            passes = machine.shuffle_passes if i.base == "SHFL" else 1.0
            if of is not None and of.executions:
                passes = of.passes * of.active / of.executions if of.sampled else 0.0
                if not of.threads:
                    kind = FREE
        elif kind == PRODUCT:
            _, n, depth = (int(x) for x in i.modifiers[0].split("x"))
            from_registers = len(i.operands) > 1 and i.operands[1].startswith("R")
            itemsize = 4 if "TF32" in i.modifiers else 2
            clocks = max(clocks, itemsize * depth * (n + (0 if from_registers else 64)) / machine.l1_rate)
            group = int(any("gsb" in operand for operand in i.operands))
        elif kind == BARRIER:
            warps = int(i.operands[1], 16) // 32 if len(i.operands) > 1 and i.operands[1].startswith("0x") else 0
            group = (i.operands[0] if i.operands else "0x0", warps)
        elif kind == WAIT_COPIES:
            board, group = int(i.operands[0][2:]), int(i.operands[1], 16)
        elif kind == WAIT_PRODUCTS:
            group = int(i.operands[1], 16)
        elif kind == TENSOR_COPY:
            of = path.copies.get(k)
            if of is None:
                kind = FREE
            else:
                counts, served = shares.get((TENSOR_MAPS, False), (1.0, 1.0))
                l2, dram, group = of.bytes / of.executions * counts, of.bytes / of.executions * served, of.warp
        out.append(
            sm.Operation(
                kind, pipe, clocks, latency, i.stall, i.sets, i.releases, waits, passes, l2, dram, group, board, k
            ).packed()
        )
    return out


@dataclass
class _Ready:
    """A sample with the traces of its warps: shortened, and how long it is in all."""

    sample: Sample
    trees: list  # of each warp
    traces: list
    instructions: int  # of all warps, of the whole path
    shortened: int
    barriers: int
    tiles: int


def prepare(
    code: Code,
    machine: Machine,
    sample: Sample,
    shares: Mapping[tuple[int, bool], tuple[float, float]],
    budget: float,
) -> _Ready:
    """The traces of a sample's warps, as short as ``budget``, the instructions of the program's warps together, asks
    for; shares: those of ``Bytes``."""
    packed = operations(code, machine, sample.path, shares)
    blocks = [packed[first : last + 1] for first, last in code.blocks]
    lengths = trace.lengths_of(code)
    trees, traces = [None] * code.warps, [None] * code.warps
    instructions = shortened = barriers = 0
    tiles = 1
    for warps in sample.path.classes():
        path = sample.path.of_warp(warps[0])
        tree = trace.nested(path, code.loops)
        trace.shorten(tree, lengths, budget / code.warps)
        flat = trace.flatten(tree, blocks, _MARK, [])
        instructions += len(warps) * sum(lengths[block] for block in path)
        shortened += len(warps) * len(flat)
        if 0 in warps:
            per_block = [sum(op[0] == BARRIER for op in ops) for ops in blocks]
            barriers = sum(per_block[block] for block in path)
            top = [item for item in tree if isinstance(item, trace.Loop)]
            tiles = max((len(loop.iterations) for loop in top), default=1)
        for warp in warps:
            trees[warp], traces[warp] = tree, flat
    return _Ready(sample, trees, traces, instructions, shortened, barriers, tiles)


def _time_of(run: sm.Run, ready: list[_Ready]) -> float:
    """Clocks of the run, with what its shortened loops stand for."""
    by_traces = {id(each.traces): each for each in ready}
    longest = 0.0
    for program in run.programs:
        trees = by_traces[id(program.traces)].trees
        extra = [trace.skipped_time(tree, warp.times)[0] for tree, warp in zip(trees, program.warps, strict=True)]
        longest = max(longest, program.end + sum(extra) / len(extra))
    return longest


def _on_one_sm(
    machine, programs: list[_Ready], resident: int, l2_rate, dram_rate, timeline=False
) -> tuple[float, sm.Run]:
    """(clocks, run) of the programs that one SM gets, in order."""
    each = max(1, max(ready.shortened for ready in programs))
    total = sum(ready.shortened for ready in programs)
    shortened = any(ready.shortened < ready.instructions for ready in programs)

    def simulate(some):
        return sm.simulate(machine, [ready.traces for ready in some], resident, l2_rate, dram_rate, timeline)

    if len(programs) <= resident or total <= 2 * BUDGET and not shortened:
        run = simulate(programs)
        return _time_of(run, programs), run
    if not shortened:  # many short programs, one after the other: the steady rate at which whole waves end
        waves = min(len(programs) // resident, max(3, BUDGET // (each * resident)))
        run = simulate(programs[: waves * resident] if waves > 2 else programs)
        if waves <= 2 or waves * resident == len(programs):
            return _time_of(run, programs), run
        ends = sorted(program.end for program in run.programs)[resident - 1 :: resident]
        wave = (ends[-2] - ends[0]) / (waves - 2)  # past the first; the last has the SM to itself
        return run.clocks + (len(programs) / resident - waves) * wave, run
    clocks, first_run = 0.0, None
    for start in range(0, len(programs), resident):
        some = programs[start : start + resident]
        if start == 0 or len(some) < resident or [id(r) for r in some] != [id(r) for r in programs[:resident]]:
            run = simulate(some)
            wave = _time_of(run, some)
            first_run = first_run or run
            full = wave if len(some) == resident else None
        else:
            wave = full
        clocks += wave
    return clocks, first_run


def predict(
    launch: project.Launch,
    gpu: str = "h200",
    *,
    cached: dict[int, float] | None = None,
    machine: Machine | None = None,
    timeline: bool = False,
) -> Prediction:
    """How long a launch takes on a GPU: "h200", "h100", "a100" or "rtx4090".

    cached: {storage of a tensor: bytes of it that L2 holds before the launch}. machine: other figures than the
    architecture's. With ``timeline`` the prediction keeps what one SM did, for ``timeline.draw``. ValueError for
    another GPU; RuntimeError, naming the kernel, where it does not compile or asks for too much shared memory.

    A prediction is kept beside the listings, under a digest of all that it depends on, and not made again.
    """
    machine, cached = machine or machine_of(gpu), cached or {}
    try:
        code = code_of(launch, machine.arch)
    except Exception as error:
        raise RuntimeError(f"{launch.name} does not compile for sm_{machine.arch}: {error}") from error
    if code.shared > machine.most_shared:
        raise RuntimeError(
            f"{launch.name} needs {code.shared} bytes of shared memory, a program on sm_{machine.arch} has at most "
            f"{machine.most_shared}"
        )
    rates = project.GPUS[gpu]
    if timeline:
        return _predicted(launch, code, rates, machine, cached, timeline=True)
    tensors = [
        (tensor.slot, tensor.bytes, tensor.storage_bytes, cached.get(tensor.storage, 0.0))
        for tensor in project.tensors(launch)
    ]
    words = sorted(project.constants(launch, code).items())
    parts = project.version(), rates, machine, code.digest, code.shared, code.warps, launch.grid, tensors, words
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    made = encoding.cached(
        f"prediction-{digest}", lambda: asdict(_predicted(launch, code, rates, machine, cached, timeline=False))
    )
    return Prediction(**made | {"name": launch.name, "grid": launch.grid})


def _predicted(
    launch: project.Launch, code: Code, rates: project.Gpu, machine: Machine, cached: dict, timeline: bool
) -> Prediction:
    """``predict`` for a launch whose code is known."""
    found, last = samples(launch, code)
    counted = count_bytes(launch, code, found, machine, cached)
    total = math.prod(launch.grid)
    active = min(total, rates.processors)
    resident = machine.resident(code.registers, code.shared, code.warps)
    l2_rate = min(machine.l2_rate, machine.l2_bandwidth / active / rates.clock)
    bandwidth = machine.memory_share * rates.bandwidth
    dram_rate = min(machine.l2_rate, bandwidth / active / rates.clock)
    mine = list(range(0, total, rates.processors))
    bounds = []
    at = 0.0
    for sample in found:
        at += sample.weight
        bounds.append(at)
    by_number = [next(j for j, bound in enumerate(bounds) if number < bound or j == len(bounds) - 1) for number in mine]
    together = min(len(mine), resident)
    if total <= rates.processors:  # a program an SM: the launch ends with the longest
        ready = {j: prepare(code, machine, sample, counted.shares, BUDGET) for j, sample in enumerate(found)}
        runs = [_on_one_sm(machine, [each], resident, l2_rate, dram_rate, timeline) for each in ready.values()]
        clocks, run = max(runs, key=lambda found: found[0])
    else:
        ready = {j: prepare(code, machine, found[j], counted.shares, BUDGET / together) for j in set(by_number)}
        clocks, run = _on_one_sm(machine, [ready[j] for j in by_number], resident, l2_rate, dram_rate, timeline)
    tail = 0.0
    for path in last:
        normal = next(sample for sample in found if sample.path.program == path.program)
        alone = [
            prepare(code, machine, each, counted.shares, BUDGET / 4) for each in (normal, Sample(path, 1, normal.role))
        ]
        rate = min(machine.l2_rate, machine.l2_bandwidth / rates.clock)
        times = [_on_one_sm(machine, [each], 1, rate, rate)[0] for each in alone]
        tail = max(tail, times[1] - times[0])
    everything = [
        prepare(code, machine, sample, counted.shares, 0) if j not in ready else ready[j]
        for j, sample in enumerate(found)
    ]
    instructions = sum(each.instructions * each.sample.weight for each in everything)
    main = max(everything, key=lambda each: each.instructions * each.sample.weight)
    floors = {
        "bytes": counted.dram / bandwidth,
        "L2": counted.l2 / machine.l2_bandwidth,
        "issue": instructions / (4 * rates.processors) / rates.clock,
    }
    seconds = max((clocks + tail) / rates.clock, *floors.values())
    waited = sum(run.waits.values()) or 1.0
    unknown = dict(found[0].path.unknown)
    for sample in found:
        unknown |= sample.path.unknown
    prediction = Prediction(
        launch.name,
        launch.grid,
        seconds,
        floors,
        counted.dram,
        counted.requested,
        instructions,
        instructions / rates.processors / max(clocks + tail, 1.0),
        code.registers,
        code.spills,
        code.shared,
        resident,
        code.warps,
        main.barriers / main.tiles,
        max((t.numel() for _, t in project.arguments(launch) if hasattr(t, "numel")), default=0),
        {name: value / waited for name, value in run.waits.items()},
        {name: value / (run.clocks or 1.0) / 4 for name, value in run.pipes.items()},
        len({sample.role for sample in found}),
        tail / rates.clock,
        unknown,
    )
    if timeline:
        prediction.run = run
    return prediction
