"""The simulator of kernel times: its parts on code written by hand, kernels of known speed, and its counts against the
interpreter's."""

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from support.interpreter import HAS_TRITON, INTERPRET

if not HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)

from effkernels import kernels
from effkernels.configs.gpus import GPUS
from effkernels.tools import cost_table, simulate
from effkernels.tools.networks import network, predict_step
from effkernels.tools.simulator import (
    baselines,
    emulate,
    encoding,
    fit,
    flow,
    project,
    sm,
    steps,
    timeline,
    trace,
    translate,
)
from effkernels.tools.simulator import launch as launches
from effkernels.tools.simulator.encoding import NO_SCOREBOARD
from effkernels.tools.simulator.machine import (
    FMA,
    FMA_HEAVY,
    LOAD,
    MATRIX,
    MEMORY,
    PIPE,
    Machine,
    machine_of,
    with_constants,
)
from effkernels.tools.simulator.steps import held_by_l2
from effkernels.tools.traffic import count_traffic
from support import simulated

H100 = machine_of("h100")
# Cases that the interpreter and the machine code are compared on in every run; the others with --slow.
QUICK = ("narrow block", "head", "squeeze-excite", "weight copies")


def listing(*lines: str) -> dict:
    """A disassembly of instructions that stall for one clock and use no scoreboard; a line that ends with a colon is a
    label."""
    high = 1 << 41 | 7 << 46 | 7 << 49
    text, address = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
            continue
        text.append(f"        /*{address:04x}*/    {line} ;    /* 0x0000000000000000 */")
        text.append(f"                             /* 0x{high:016x} */")
        address += 16
    return {
        "listing": "\n".join(text),
        "registers": 32,
        "spills": 0,
        "parameters": [[0, 0, 8], [1, 8, 4]],
        "base": 0x210,
    }


def code(*lines: str, warps=1) -> encoding.Code:
    return encoding._code(listing(*lines), "by_hand", 90, 0, warps, "")


# ---- encoding and flow -----------------------------------------------------------------------------------------------


def test_fields_of_an_instruction():
    document = listing("FFMA R4, R5, R6.reuse, R4", "EXIT")
    word = 5 << 41 | 2 << 46 | 3 << 49 | 0b101 << 52
    document["listing"] = document["listing"].replace(f"{1 << 41 | 7 << 46 | 7 << 49:016x}", f"{word:016x}", 1)
    first = encoding._code(document, "by_hand", 90, 0, 1, "").instructions[0]
    assert (first.opcode, first.operands) == ("FFMA", ("R4", "R5", "R6", "R4"))
    assert (first.stall, first.sets, first.releases, first.waits) == (5, 2, 3, 5)


@pytest.mark.parametrize(
    "text, written, read",
    [
        ("LDG.E.128 R4, desc[UR6][R2.64+0x10]", {4, 5, 6, 7}, {2, 3, 262, 263}),
        ("IMAD.WIDE.U32 R8, R3, 0x2, R10", {8, 9}, {3, 10, 11}),
        ("@!P1 IADD3.X R5, P2, R6, UR4, RZ, P0, !PT", {5, 322}, {6, 260, 320, 321}),
        ("STS.64 [R3+UR4], R6", set(), {3, 260, 261, 6, 7}),
        ("ISETP.GE.AND P3, PT, R2, R7, !P4", {323}, {2, 7, 324}),
        ("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", set(range(24, 40)), {24, 264, 265}),
    ],
)
def test_registers_written_and_read(text, written, read):
    instruction = code(text).instructions[0]
    assert set(flow.written(instruction)) == written
    assert set(flow.read(instruction)) == read


def test_only_what_a_branch_needs_is_carried_out():
    made = code(
        "MOV R0, 0x3",
        ".L_a:",
        "FADD R4, R4, R5",
        "IADD3 R0, R0, -0x1, RZ",
        "ISETP.NE.AND P0, PT, R0, RZ, PT",
        "@P0 BRA `(.L_a)",
        "EXIT",
    )
    program = translate.Program(made, full=False)
    assert program.needed == {0, 2, 3}


# ---- emulation -------------------------------------------------------------------------------------------------------


def path_of(made, program=0, grid=(4,), full=True, **how):
    return emulate.run(
        made,
        {0x210: 0, 0x214: 1 << 12, 0x218: 37, **dict.fromkeys(range(0, 32, 4), 0)},
        grid,
        program,
        full=full,
        **how,
    )


LOOP = (
    "S2R R0, SR_CTAID.X",
    "IADD3 R0, R0, 0x2, RZ",
    ".L_a:",
    "IADD3 R0, R0, -0x1, RZ",
    "ISETP.NE.AND P0, PT, R0, RZ, PT",
    "@P0 BRA `(.L_a)",
    "EXIT",
)


@pytest.mark.parametrize("program", [0, 3])
def test_trips_depend_on_the_program(program):
    blocks = [block for block, _ in path_of(code(*LOOP), program).events]
    assert blocks == [0, *[1] * (program + 2), 2]


def test_a_division_of_integers():
    """As ptxas makes it: 37 // 5 and its use as a trip count."""
    made = code(
        "LDC R4, c[0x0][0x218]",
        "MOV R7, 0x5",
        "I2F.U32.RP R0, R7",
        "MUFU.RCP R0, R0",
        "IADD3 R2, R0, 0xffffffe, RZ",
        "F2I.FTZ.U32.TRUNC.NTZ R3, R2",
        "IADD3 R6, RZ, -R3, RZ",
        "MOV R2, RZ",
        "IMAD R9, R6, R7, RZ",
        "IMAD.HI.U32 R3, R3, R9, R2",
        "IMAD.HI.U32 R2, R3, R4, RZ",
        "IADD3 R8, -R2, RZ, RZ",
        "IMAD R5, R7, R8, R4",
        "ISETP.GE.U32.AND P0, PT, R5, R7, PT",
        "@P0 IADD3 R2, R2, 0x1, RZ",
        ".L_a:",
        "IADD3 R2, R2, -0x1, RZ",
        "ISETP.GT.AND P0, PT, R2, RZ, PT",
        "@P0 BRA `(.L_a)",
        "EXIT",
    )
    assert sum(block == 1 for block, _ in path_of(made).events) == 7


@pytest.mark.parametrize("kept, blocks", [("0x2", [0, 2]), ("0x1", [0, 1, 2])])
def test_predicates_kept_in_a_register(kept, blocks):
    """UP1 is true and UP0 not; the register of either is compared with 0."""
    made = code(
        "UISETP.NE.AND UP0, UPT, URZ, URZ, UPT",
        "UISETP.EQ.AND UP1, UPT, URZ, URZ, UPT",
        f"UP2UR UR4, UPR, URZ, {kept}",
        "UISETP.NE.AND UP2, UPT, UR4, URZ, UPT",
        "PLOP3.LUT P0, PT, PT, PT, UP2, 0x80, 0x0",
        "@P0 BRA `(.L_a)",
        "NOP",
        ".L_a:",
        "EXIT",
    )
    path = path_of(made)
    assert [block for block, _ in path.events] == blocks and path.unknown == {}


def test_threads_that_part_meet_again():
    made = code(
        "S2R R0, SR_TID.X",
        "ISETP.GE.AND P0, PT, R0, 0x28, PT",
        "@P0 BRA `(.L_a)",
        "IADD3 R1, R0, 0x1, RZ",
        ".L_a:",
        "LDC.64 R2, c[0x0][0x210]",
        "IMAD.WIDE R2, R0, 0x4, R2",
        "@P0 LDG.E R5, desc[UR4][R2.64]",
        "EXIT",
        warps=2,
    )
    path = path_of(made)
    assert path.events == [(0, None), (1, frozenset({0, 1})), (2, None)]
    (request,) = path.requests.values()
    assert (request.executions, request.threads, request.sectors) == (1, 24, 3)  # threads 40 to 63: 96 bytes


def test_bank_conflicts_are_passes():
    made = code(
        "S2R R0, SR_TID.X",
        "SHF.L.U32 R1, R0, 0x3, RZ",
        "LDS R2, [R1]",
        "SHF.L.U32 R1, R0, 0x2, RZ",
        "LDS R2, [R1]",
        "EXIT",
    )
    assert [of.passes for of in path_of(made).shared.values()] == [2.0, 1.0]


ARRIVE = (
    "LDC.64 R2, c[0x0][0x210]",
    "LDG.E R9, desc[UR4][R2.64]",
    "MOV R5, 0x1",
    "ATOMG.E.ADD.STRONG.GPU PT, R6, desc[UR4][R2.64], R5",
    "ISETP.NE.AND P0, PT, R6, 0x1f, PT",
    "@P0 EXIT",
    "STG.E desc[UR4][R2.64], RZ",
    "EXIT",
)


def test_the_program_that_comes_last():
    path = path_of(code(*ARRIVE))
    assert [block for block, _ in path.events] == [0] and path.awaited == {3: 31}
    last = path_of(code(*ARRIVE), arrivals=path.awaited)
    assert [block for block, _ in last.events] == [0, 1]


def test_tickets_are_handed_out_in_order():
    made = code(
        "LDC.64 R2, c[0x0][0x210]",
        "MOV R5, 0x1",
        "ATOMG.E.ADD.STRONG.GPU PT, R6, desc[UR4][R2.64], R5",
        "ISETP.LT.AND P0, PT, R6, 0x2, PT",
        "@P0 EXIT",
        "NOP",
        "EXIT",
    )
    assert [len(path_of(made, program).events) for program in range(4)] == [1, 1, 2, 2]


def test_an_unknown_instruction_is_named_and_counted():
    made = code("FROB R0, R1", "FROB R2, R0", "ISETP.NE.AND P0, PT, R2, RZ, PT", "@P0 EXIT", "NOP", "EXIT")
    assert path_of(made).unknown == {"FROB": 2}
    assert path_of(code("FROB R0, R1", "EXIT")).unknown == {}  # nothing depends on it


def test_a_branch_on_memory_is_named():
    made = code(
        "LDC.64 R2, c[0x0][0x210]",
        "LDG.E R0, desc[UR4][R2.64]",
        "ISETP.NE.AND P0, PT, R0, RZ, PT",
        "@P0 EXIT",
        "NOP",
        "EXIT",
    )
    assert path_of(made).unknown == {"@P0 EXIT depends on values in memory": 1}


# ---- paths and their time --------------------------------------------------------------------------------------------


def test_a_shortened_path_stands_for_the_whole():
    loops = {1: frozenset({1, 2, 3}), 2: frozenset({2})}
    path = [0, *[1, 2, 2, 2, 3] * 100, 4]
    tree = trace.nested(path, loops)
    lengths = [10] * 5
    assert trace.size(tree, lengths, everything=True) == 10 * len(path)
    trace.shorten(tree, lengths, 500)
    assert trace.size(tree, lengths) <= 600
    mark = ("mark",)
    flat = trace.flatten(tree, [[("op", block)] for block in range(5)], mark, [])
    times, clock = [], 0.0
    for operation in flat:  # each block takes 7 clocks
        if operation == mark:
            times.append(clock)
        else:
            clock += 7
    extra, used = trace.skipped_time(tree, times)
    assert used == len(times) and clock + extra == pytest.approx(7 * len(path))


# ---- the SM ----------------------------------------------------------------------------------------------------------


def operation(kind, stall=1, sets=NO_SCOREBOARD, waits=(), clocks=2, pipe=None, **amounts):
    pipe = pipe or (FMA_HEAVY if kind == FMA else MEMORY)
    return sm.Operation(kind, pipe, clocks, 0, stall, sets, NO_SCOREBOARD, waits, **amounts).packed()


def clocks(programs, resident=1, rate=32.0):
    return sm.simulate(H100, programs, resident, rate, rate).clocks


def test_dependent_multiply_adds_stall():
    chain = [operation(FMA, stall=4)] * 1000
    assert clocks([[chain]]) == pytest.approx(4000, abs=8)
    assert clocks([[chain] * 4]) == pytest.approx(4000, abs=8)  # a warp a scheduler
    assert clocks([[chain] * 16]) == pytest.approx(4000, rel=0.05)  # four of them share one, which issues every clock
    assert clocks([[chain] * 32]) == pytest.approx(8000, rel=0.05)


def test_one_pipe_takes_half_the_rate():
    stream = [operation(FMA)] * 1000
    two = clocks([[stream] * 16])
    one = sm.simulate(Machine(80, fma_pipes=1), [[[(0, *stream[0][1:])] * 1000] * 16], 1, 32.0, 32.0).clocks
    assert one == pytest.approx(2 * two, rel=0.05)


def test_loads_wait_for_latency_and_bandwidth():
    one = [operation(LOAD, sets=0, l2=512.0, dram=512.0), operation(FMA, waits=(0,))]
    assert clocks([[one]]) == pytest.approx(H100.memory_latency + 512 / 32, abs=16)
    many = one[:1] * 500 + one[1:]
    assert clocks([[many] * 8]) == pytest.approx(8 * 500 * 512 / 32, rel=0.05)


def test_programs_follow_one_another():
    chain = [operation(FMA, stall=4)] * 100
    assert clocks([[chain]] * 4, resident=2) == pytest.approx(2 * clocks([[chain]]) + H100.program_start, rel=0.05)


@pytest.mark.parametrize(
    "registers, shared, warps, programs",
    [(128, 0, 4, 4), (255, 0, 8, 1), (32, 0, 1, 32), (32, 100 * 1024, 4, 2), (32, 0, 16, 4)],
)
def test_programs_that_an_sm_holds(registers, shared, warps, programs):
    assert H100.resident(registers, shared, warps) == programs


# ---- compiled kernels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu, together", [("h200", 4.3), ("a100", 8), ("rtx4090", 4.3)])
def test_chains_of_multiply_adds(gpu, together):
    """4 clocks each. Four warps a scheduler do four times the work in the same time, but for the slots that the loop's
    other instructions take, or, where it has one pipe of 16 lanes, in twice the time."""
    chains = simulated.ask(f"simulated.chains({gpu!r})")
    assert chains["4 warps"] == pytest.approx(4, rel=0.05)
    assert chains["16 warps"] == pytest.approx(together, rel=0.1)
    assert 1.02 * chains["4 warps"] < chains["4 warps barrier"] < 1.3 * chains["4 warps"]


def test_known_kernels_of_other_architectures():
    """cuBLAS reaches 230 to 270 of an A100's 312 TFLOP/s, and 150 to 165 of an RTX 4090's 165; a Triton product without
    groups of warps somewhat less; a copy the bandwidth."""
    shares = simulated.ask("simulated.other_architectures()")
    assert 0.65 < shares["a100"][0] < 0.87
    assert 0.8 < shares["rtx4090"][0] <= 1
    assert all(0.9 <= copy <= 1.001 for _, copy in shares.values())


@pytest.fixture(scope="module")
def known():
    return simulated.ask("simulated.known(slow=False)")


def test_known_kernels(known):
    assert known["product"]["rate"] == pytest.approx(620e12, rel=0.1)
    assert 0.9 * 3.015e12 <= known["copy"]["rate"] <= 1.001 * 3.015e12
    assert 0.9 * 380e12 <= known["attention 64"]["rate"] <= 1.35 * 420e12
    assert all(row["unknown"] == [] for row in known.values())


def test_three_kinds_of_bytes(known):
    """Of the product: DRAM serves each tensor once; through L2 every tile asks for its rows and columns."""
    matrix, tiles = 2 * 8192**2, (8192 // 128) * (8192 // 256)
    assert known["product"]["dram_bytes"] == 3 * matrix
    assert known["product"]["l2_bytes"] == pytest.approx(tiles * 8192 * (128 + 256) * 2 + matrix, rel=1e-3)
    assert known["copy"]["dram_bytes"] == known["copy"]["l2_bytes"] == 4 * 2**28


def test_bytes_are_floors():
    """A copy takes at least its bytes from DRAM at the bandwidth, its requests at L2's, and its instructions."""
    found = simulated.ask("simulated.floors()")
    for time, floors, dram, through in found.values():
        assert set(floors) == {"bytes", "L2", "issue"} and time >= max(floors.values())
        assert dram == through == 4 * 2**24
    assert found["slow L2"][0] == pytest.approx(4 * 2**24 / 1e12, rel=0.1)
    assert found["slow memory"][0] == pytest.approx(4 * 2**24 / (0.1 * GPUS["h200"].bandwidth), rel=0.1)
    assert found["as it is"][0] < 0.5 * found["slow L2"][0]


@pytest.mark.parametrize("size, once", [(10 << 20, True), (30 << 20, False)])
def test_bytes_of_roles_beside_each_other(monkeypatch, size, once):
    """Two roles of a launch that read a tensor: from DRAM once where L2 keeps it, else each on its own."""
    tensor = project.Tensor("x", 1, 0, size, size, storage=5)
    monkeypatch.setattr(project, "tensors", lambda launch: [tensor])
    monkeypatch.setattr(launches, "requested", lambda code, path: {0: (size / 4, {1})})
    made = code("LDG.E R0, desc[UR4][R2.64]", "EXIT")
    roles = [launches.Sample(SimpleNamespace(copies={}), weight=4, role=role) for role in (0, 1)]
    counted = launches.count_bytes(None, made, roles, H100, {})
    assert counted.requested == 2 * size and counted.dram == (size if once else 2 * size)
    assert counted.l2 == (1.5 * size if once else 2 * size)  # half of what is read again counts
    held = launches.count_bytes(None, made, roles, H100, {5: size / 2})
    assert held.dram == counted.dram - size / 2


@pytest.mark.slow
def test_known_kernels_and_their_variants():
    known = simulated.ask("simulated.known(slow=True)")
    assert 0.9 * 480e12 <= known["attention 128"]["rate"] <= 1.35 * 500e12
    # Tiles of a quarter of each side's product ask L2 for two and a half times as much, and half the warps hold the
    # sums in registers.
    assert known["product small tile"]["l2_bytes"] > 2.5 * known["product"]["l2_bytes"]
    assert known["product small tile"]["us"] > 1.1 * known["product"]["us"]
    assert known["product few warps"]["us"] > known["product"]["us"]


@pytest.mark.slow
def test_barriers_cost_time():
    """The machine code of a block's kernels, as it is and with its barriers taken out."""
    times = simulated.ask("simulated.barriers()")
    assert all(without <= 1.03 * with_them for _, with_them, without in times)
    assert any(without < 0.97 * with_them for _, with_them, without in times)


@pytest.fixture(scope="module")
def variants():
    return simulated.ask("simulated.variants()")


def test_half_the_warps_hide_less(variants):
    """The depthwise forward waits for its own results: half as many warps on an SM take 1.2 to 2 times as long."""
    many, few = variants["depthwise, 8 warps an SM"], variants["depthwise, 4 warps an SM"]
    assert few["programs"] < 0.6 * many["programs"]
    assert 1.2 < few["us"] / many["us"] < 2


def test_half_the_warps_of_a_program_spill(variants):
    """With the same 128 registers a thread half the warps cannot hold the sums of a tile."""
    whole, half = variants["expand dgrad, 128 rows"], variants["expand dgrad, half the warps"]
    assert whole["spills"] == 0 < half["spills"]
    assert half["us"] > 1.5 * whole["us"]


def test_a_tile_twice_as_high_reads_less(variants):
    """The matrix of the expand data gradient is read once a tile: half as many tiles ask L2 for less, and need fewer
    instructions."""
    low, high = variants["expand dgrad, 64 rows"], variants["expand dgrad, 128 rows"]
    assert high["l2_bytes"] < 0.95 * low["l2_bytes"]
    assert high["instructions"] < 0.85 * low["instructions"]


def test_barriers_of_our_kernels_cost_time(variants):
    """The project convolution spends a share of its warps' time at barriers; without them it is faster."""
    assert variants["project"]["barrier"] > 0.05 and variants["project without barriers"]["barrier"] == 0
    assert variants["project without barriers"]["us"] < 0.99 * variants["project"]["us"]


def test_a_prediction_is_made_once(tmp_path):
    """It is kept by all that it depends on; here in an empty folder."""
    found = simulated.ask("simulated.kept()", EFFKERNELS_SIMULATOR_CACHE=str(tmp_path))
    assert found["again"] == [True, 1]
    assert found["larger"] == 2
    assert found["slower"] == [True, 3]
    assert found["held"] == [True, 4]
    assert found["version"] == 5
    assert len(list(tmp_path.glob("prediction-*"))) == 5


def counted_in_the_interpreter(monkeypatch, cases):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("EFFKERNELS_BACKEND", "triton")
    return [
        (case, step, launch)
        for case in cases
        for step, made in simulated.steps_of(case, "cpu", count_traffic).items()
        for launch in made
        if launch.arguments
    ]


def check_recount(monkeypatch, cases):
    """Each launch reads and writes the same bytes of each argument; stores, and loads of activations, are as many.

    What the compiler may change is left open: threads that need the same parameter load it each, or once for all (the
    pivot of statistics is one, which is the first pixel of y); a load whose value nobody uses is left out; and an
    addition of 0 to a counter, by which a program waits, is a load.
    """
    interpreted = counted_in_the_interpreter(monkeypatch, cases)
    machine = simulated.ask(f"simulated.recounted({cases})")
    assert [(case, step, launch.name) for case, step, launch in interpreted] == [tuple(row[:3]) for row in machine]
    for (case, step, launch), (*_, arguments, activations) in zip(interpreted, machine, strict=True):
        compared = 0
        for argument, counts in launch.arguments.items():
            where, requested = f"{case} {step} {launch.name} {argument}", launch.requested[argument]
            if argument not in arguments:
                assert argument not in activations and counts[1] == 0, where
                continue
            distinct, (loaded, stored) = arguments[argument]
            assert tuple(distinct) == counts, where
            assert stored == requested[1] or argument == "counters" and 0 < stored <= requested[1], where
            shared = argument not in activations or (launch.name, argument) == ("statistics_kernel", "y")
            assert loaded == requested[0] or shared, where
            compared += (loaded, stored) == requested
        assert compared and set(arguments) <= set(launch.arguments), f"{case} {step} {launch.name}"


def test_every_kernel_is_among_the_cases():
    """Those that ``check_recount`` looks at: whoever adds a kernel adds a case."""
    sources = (Path(kernels.__file__).parent).glob("*.py")
    there = {name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)}
    assert set(simulated.ask("simulated.kernels_of_cases()")) == there and len(there) > 20


@pytest.mark.skipif(not INTERPRET, reason="the interpreter is off (TRITON_INTERPRET)")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in simulated.CASES]
)
def test_machine_code_and_interpreter_touch_the_same_bytes(monkeypatch, case):
    check_recount(monkeypatch, [case])


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value", [("model", "b9"), ("mode", "test"), ("gpu", "v100"), ("batch", 0)])
def test_bad_names_are_named(name, value):
    arguments = {"model": "b0", "mode": "infer", "batch": 1, "gpu": "h200", name: value}
    with pytest.raises(ValueError, match=rf"{name} must be .*got '?{value}"):
        predict_step(**arguments)


def test_launches_that_cannot_be_predicted_are_named():
    found = simulated.ask("simulated.problems()")
    assert found["wrong"].startswith("wrong does not compile for sm_80: ")
    assert found["wide"].startswith("product needs ") and found["wide"].endswith(
        " bytes of shared memory, a program on sm_80 has at most 166912"
    )
    estimated, unknown, table = found["unknown"]
    assert estimated and set(unknown) == {"FROB"}
    assert re.search(r"^chain .* \*$", table, re.MULTILINE)
    assert table.endswith(f"* estimated from its loops: chain: FROB ({unknown['FROB']})")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch-size", "0"],
        ["--gpu", "v100"],
        ["--model", "b9"],
        ["--mode", "x"],
        ["--processes", "0"],
        ["--kernel", "k"],
        ["--json", "no such folder/x.json"],
        ["--timeline", "x.png", "--kernel", "k", "--json", "x.json"],
    ],
)
def test_bad_arguments_are_named(arguments, capsys):
    with pytest.raises(SystemExit):
        simulate.main(arguments)
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.slow
def test_the_command():
    """Batch 1 of B0's inference: the document's total is that of its kernels."""
    document = simulated.ask("simulated.command(['--mode', 'infer', '--batch-size', '1'])")
    assert (document["model"], document["mode"], document["batch"], document["gpu"]) == ("b0", "infer", 1, "h200")
    assert document["predicted_ms"] == pytest.approx(sum(row["us"] for row in document["kernels"]) / 1e3, rel=0.01)
    assert document["predicted_ms"] > document["bytes_ms"] > 0
    assert document["source"] == "predicted, not measured"


def test_shipped_launches_beside_their_predictions(monkeypatch, capsys):
    """``effkernels.inspect --predict``: a column of the table, and a field of each row of ``--json``."""
    row = {"digest": "a", "kernel": "a_kernel", "dtype": "bfloat16", "constants": {}, "per_element": None}
    row |= {"registers": 32, "spills": 0, "shared": 0, "loads": [16], "stores": [16]}
    monkeypatch.setattr(cost_table.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(cost_table, "shipped_launches", lambda full: [_Launch("a")])
    monkeypatch.setattr(cost_table, "read_table", lambda path: {"triton": "", "arch": 90, "rows": [row]})
    asked = []

    def predict(launches, gpu):
        asked.append(gpu)
        return [SimpleNamespace(time=2.5e-6) for _ in launches]

    cost_table.main(["--predict", "--gpu", "a100"], predict)
    head, line = capsys.readouterr().out.splitlines()
    assert "predicted us" in head and line.split()[-1] == "2.5" and asked == ["a100"]
    cost_table.main(["--predict", "--json"], predict)
    assert json.loads(capsys.readouterr().out)[0]["predicted_us"] == 2.5
    cost_table.main(["--json"], predict)
    assert "predicted_us" not in json.loads(capsys.readouterr().out)[0] and len(asked) == 2
    with pytest.raises(SystemExit):
        cost_table.main(["--predict", "--check"], predict)
    assert "--predict is for the table that is printed" in capsys.readouterr().err


def test_what_l2_holds_from_launches_before():
    class Launch:
        def __init__(self, *tensors):
            self.tensors = tensors

    from effkernels.tools.simulator import project

    small, large = project.Tensor("s", 1, 0, 10, 10, storage=7), project.Tensor("l", 2, 0, 1000, 1000, storage=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(project, "tensors", lambda launch: launch.tensors)
        assert held_by_l2([Launch(small), Launch(small), Launch(large), Launch(small)], 100) == [
            {},
            {7: 10},
            {7: 10},
            {},
        ]


# ---- torch.compile, and pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_passes_of_torch_compile(training):
    """Of B0's second block, in whole tensors: x, e1 and e2 before and after the depthwise, out."""
    model, _ = network("b0", training, 1)
    block = baselines._geometries(model, 112)[1]
    x, e1, e2, out = 16 * 112**2, 96 * 112**2, 96 * 56**2, 24 * 56**2
    passes = x + 4 * e1 + 5 * e2 + 3 * out
    if training:
        passes = (x + 5 * e1 + 6 * e2 + 4 * out) + (7 * out + 11 * e2 + 9 * e1 + 2 * x)
    assert sum(kernel.elements for kernel in baselines._block(block, training)) == passes
    assert sum(kernel.flops for kernel in baselines._block(block, training)) == 2 * (16 * e1 + 96 * out) * (
        3 if training else 1
    )
    seconds = baselines.seconds(model, training, 256, GPUS["h200"])
    assert seconds > 256 * 2 * passes / GPUS["h200"].bandwidth


def test_a_picture_of_an_sm(tmp_path):
    pytest.importorskip("matplotlib")
    product = operation(PIPE, pipe=MATRIX, clocks=6.0)
    load = operation(LOAD, sets=0, passes=4.0, l2=512.0, dram=512.0)
    programs = [[[load, operation(FMA, waits=(0,)), product, operation(FMA, stall=4)] * 20] * 4] * 2
    run = sm.simulate(H100, programs, 2, 32.0, 32.0, timeline=True)
    assert sum(event.what == "issue" for event in run.timeline) == run.instructions == 2 * 4 * 80
    assert {event.what for event in run.timeline} >= {"issue", "memory", "matrix", "FMA light", "L2", "DRAM"}
    edges = np.linspace(0, run.clocks + 100, 11)
    shares = timeline.taken(run.timeline, edges)
    clocks = {name: share.sum() * (edges[1] - edges[0]) for name, share in shares.items()}
    assert clocks["matrix"] == pytest.approx(2 * 4 * 20 * 6.0 / 4), "a quarter for each of four schedulers' pipes"
    assert clocks["DRAM"] == pytest.approx(run.dram / 32.0)
    assert clocks["shared memory, L1"] == pytest.approx(run.passes)
    assert all((share <= 1 + 1e-9).all() for share in shares.values())
    timeline.draw(tmp_path / "sm.png", SimpleNamespace(run=run), "two programs")
    assert (tmp_path / "sm.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="without a timeline"):
        timeline.draw(tmp_path / "none.png", SimpleNamespace(run=None), "nothing")


@pytest.mark.parametrize(
    "text, named",
    [
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", "matrix products"),
        ("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "matrix products"),
        ("FFMA R4, R5, R6, R4", "fp32, integer products"),
        ("LOP3.LUT R4, R5, R6, RZ, 0xc0, !PT", "integer and logic"),
        ("MUFU.EX2 R4, R5", "special functions"),
        ("LDS R4, [R5]", "shared memory"),
        ("LDG.E.128 R4, desc[UR6][R2.64]", "global memory"),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "branches, barriers, waits"),
    ],
)
@pytest.mark.parametrize("gpu", ["h200", "a100"])
def test_classes_of_instructions_in_the_picture(text, named, gpu):
    kind, pipe, *_ = machine_of(gpu).operation(code(text).instructions[0])
    assert timeline.class_of(kind, pipe) == named


# ---- what predictions depend on --------------------------------------------------------------------------------------


def test_words_and_types_make_no_prediction_stale():
    plain = "def f(a, b=2):\n    return a + b\n"
    said = (
        '"""A module."""\nfrom collections.abc import Callable\n\n\n'
        'def f(a: int, b: int = 2) -> int:\n    """Adds."""  # both\n    return a + b\n'
    )
    assert project.deciding(said) == project.deciding(plain)
    assert project.deciding(plain.replace("2", "3")) != project.deciding(plain)
    assert project.deciding("class A:\n    x: int = 1") != project.deciding("class A:\n    x: int = 2")
    assert project.deciding("from a import b as f") != project.deciding("from a import c as f")


def test_a_generation_without_a_machine_is_named(monkeypatch):
    monkeypatch.setitem(GPUS, "b200", replace(GPUS["h200"], capability=(10, 0)))
    with pytest.raises(ValueError, match="gpu 'b200' is of sm_100, .*there are sm_80, sm_89, sm_90"):
        machine_of("b200")
    with pytest.raises(ValueError, match="gpu must be one of h200, .*got 'mi300'"):
        machine_of("mi300")


# ---- measured beside predicted ---------------------------------------------------------------------------------------


class _Launch:
    def __init__(self, name, grid=(1,)):
        self.name, self.grid = name, grid

    def digest(self, arch):
        return self.name


def test_measured_times_find_their_launches():
    a, b = _Launch("a"), _Launch("b")
    assert fit.paired([a, b, a], {"a": [1.0, 3.0], "b": [2.0]}) == [(a, 1.0), (b, 2.0), (a, 3.0)]
    with pytest.raises(ValueError, match="a ran 1 times, 2 launches were recorded"):
        fit.paired([a, b, a], {"a": [1.0], "b": [2.0]})


@pytest.fixture
def fitted(monkeypatch):
    """fitted(**how) fits launches whose time is their barriers' and their latency's, measured on a machine with slower
    barriers; ``pools`` counts the pools of processes."""
    counts = {"a": (100, 1), "b": (10, 20), "c": (1, 1)}
    launches, pools = [_Launch("c"), _Launch("a"), _Launch("b"), _Launch("a")], []

    def seconds(launch, machine):
        barriers, loads = counts[launch.name]
        return 1e-9 * (barriers * machine.barrier + loads * machine.memory_latency)

    @contextlib.contextmanager
    def predictor(launches, gpu, held):
        assert list(held) == [{launch.name: 1} for launch in launches], "what L2 held in the step, not among the chosen"
        pools.append(len(launches))
        yield lambda machine: [SimpleNamespace(time=seconds(launch, machine)) for launch in launches]

    monkeypatch.setattr(steps, "predictor", predictor)
    monkeypatch.setattr(steps, "held_by_l2", lambda launches, capacity: [{launch.name: 1} for launch in launches])
    monkeypatch.setattr(steps, "identity", lambda launch, machine, cached: launch.name)
    truth = with_constants(H100, barrier=2 * H100.barrier)
    pairs = [(launch, seconds(launch, truth)) for launch in launches]
    return SimpleNamespace(fit=lambda **how: fit.fit(pairs, "h100", **how), pools=pools)


def test_a_fit_finds_the_constant_that_was_off(fitted):
    kept = []
    found = fitted.fit(keep=kept.append)
    assert found["constants"] == {"barrier": 2 * H100.barrier} and found["after"] < 0.1 * found["before"]
    assert (found["compared"], found["left"], found["trials"]) == (3, 0, 1 + len(fit.FITTED) * len(fit.FACTORS))
    assert fitted.pools == [3], "one pool of processes for all trials"
    assert len(kept) == 1 + len(fit.FITTED) and kept[-1] == found
    assert kept[0]["constants"] == {} and kept[0]["after"] == kept[0]["before"] == found["before"]


def test_a_fit_ends_in_time(fitted, monkeypatch):
    """Each trial takes two seconds here: one for the predictions as they are, nine more within twenty seconds, of which
    six are of the first constant."""
    now = iter(range(1000))
    monkeypatch.setattr(fit.time, "monotonic", lambda: float(next(now)))
    kept = []
    found = fitted.fit(keep=kept.append, deadline=20.0)
    assert found["trials"] == 10 and found["trials"] - 1 + found["left"] == len(fit.FITTED) * len(fit.FACTORS)
    assert len(kept) == 2 and found["constants"] == {}
