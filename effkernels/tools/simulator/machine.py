"""What a streaming multiprocessor of each architecture can do: pipes, their clocks, latencies and rates, with sources.

[G] NVIDIA, CUDA C++ programming guide, "Arithmetic instructions" (results a clock and SM by compute capability) and the
    technical specifications by compute capability (registers, shared memory, resident warps and programs).
[V] Jia et al., "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking", 2018.
[A] Abdelkhalik et al., "Demystifying the NVIDIA Ampere architecture through microbenchmarking and instruction-level
analysis", 2022.
[H] Luo et al., "Benchmarking and dissecting the NVIDIA Hopper GPU architecture via microbenchmarking", 2024.
[W] NVIDIA's white papers of the A100, Ada and H100 (matrix rates, L2 sizes).
Figures marked "assumed" have no source; the measurements of a GPU are to replace them.
"""

import re
from dataclasses import dataclass, replace

from effkernels.configs.gpus import GPUS
from effkernels.tools.simulator.encoding import Instruction
from effkernels.tools.simulator.translate import expects

# Kinds of operations, for the event loop of ``sm``.
(
    PIPE,
    FMA,
    SHARED,
    LOAD,
    STORE,
    COPY,
    BARRIER,
    WAIT_COPIES,
    COMMIT_COPIES,
    PRODUCT,
    WAIT_PRODUCTS,
    FREE,
    TENSOR_COPY,
    WAIT_TENSORS,
    MARK,
) = range(15)
# Pipes of a scheduler. FMA operations take either of the first two where the architecture has both, integer products
# the second.
FMA_LIGHT, FMA_HEAVY, ALU, SPECIAL, MATRIX, UNIFORM, DOUBLE, MEMORY = range(8)
PIPES = ("FMA light", "FMA", "ALU", "MUFU", "matrix", "uniform", "fp64", "memory issue")

_FMA = {"FFMA", "FMUL", "FADD", "FFMA32I", "FADD32I", "FMUL32I"}
_HALF = {"HFMA2", "HMUL2", "HADD2"}
_DOUBLE = {"DADD", "DMUL", "DFMA", "DSETP"}
_SHARED = {"LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMS", "LDL", "STL"}
_FREE = {
    "BRA",
    "BSSY",
    "BSYNC",
    "NOP",
    "EXIT",
    "WARPSYNC",
    "RET",
    "CALL",
    "BREAK",
    "YIELD",
    "WARPGROUP",
    "FENCE",
    "ERRBAR",
    "CGAERRBAR",
    "CCTL",
    "MEMBAR",
    "USETMAXREG",
    "DEPBAR",
    "UTMACMDFLUSH",
    "UTMACCTL",
    "NANOSLEEP",
    "ACQBULK",
    "PREEXIT",
}
_CONVERSIONS = {"I2F", "F2I", "F2F", "I2I", "FRND"}
_QUARTER = {"S2R", "S2UR", "POPC", "FLO", "BREV", "CS2R"}


@dataclass(frozen=True)
class Machine:
    """One SM of four schedulers. Clocks a warp instruction takes a pipe of its scheduler, latencies in clocks, rates in
    bytes a clock."""

    arch: int
    registers: int = 65536  # [G]
    shared: int = 228 * 1024  # [G] bytes of all programs, of which each takes ``shared_reserved`` more than it asks for
    shared_reserved: int = 1024  # [G]
    most_shared: int = 227 * 1024  # [G] bytes of one program
    most_warps: int = 64  # [G]
    most_programs: int = 32  # [G]
    fma_pipes: int = 2  # [G] 128 fp32 results a clock: two pipes of 16 lanes a scheduler
    fma: int = 2
    integer_product: int = 2  # [G] 64 results a clock
    alu: int = 2  # [G] 64 integer and logic results a clock
    half: int = 2  # [G] 256 fp16 results a clock: HFMA2 in both pipes
    special: int = 8  # [G] 16 results a clock
    conversion: int = 2  # [G] 64 conversions of 32-bit types a clock
    quarter: int = 8  # [G] 16 results a clock: population count, leading zeros; special registers as slow (assumed)
    double: int = 2  # [G] 64 fp64 results a clock
    matrix: float = 6.0  # mma.sync m16n8k16; [H] finds 62 to 68 % of the rate of wgmma, which is 4
    # [W] wgmma, clocks a scheduler for each n * k of m64nNkK: 2048 multiply-adds a clock and SM.
    matrix_group: float = 1 / 32
    matrix_latency: int = 33  # [A] 33 clocks for m16n8k16; [H] 32 for a wgmma of any size beyond its rate
    special_latency: int = 20  # assumed: the scoreboard's way after the pipe, as of [V]'s MUFU of 18 to 23
    shared_latency: int = 29  # [H] 29.0 clocks
    shuffle_passes: float = 2.0  # [G] 32 lanes a clock and SM, in both directions of the crossbar
    uniform_latency: int = 12  # assumed
    l2_latency: int = 262  # [H] 261.5 clocks of an L2 hit
    memory_latency: int = 600  # [H] finds 479 clocks on an H100 PCIe, idle; under load of all SMs (assumed)
    l1_rate: float = 128.0  # [W] bytes a clock of the SM, shared memory and L1
    l2_rate: float = 64.0  # [V], [A] bytes a clock that one SM can take from L2
    barrier: int = 18  # assumed: from the last warp's arrival to the others' next instruction
    store_release: int = 14  # assumed: until the registers of a store may be written
    program_start: int = 200  # assumed: until the first instruction of a program that follows another on an SM
    shared_queue: int = 24  # assumed: clocks of work that may wait for the shared memory
    memory_queue: int = 3000  # assumed: clocks of work that may wait for L2
    memory_share: float = 1.0  # assumed: of a copy's bandwidth, what other kernels reach as well
    l2_bandwidth: float = 5.5e12  # bytes/s of the whole GPU; [H] and others find 5.5 to 5.7 TB/s on an H100
    # Assumed: the share of requests for what other SMs ask for at the same time that L2 serves one by one; if it were
    # all of them, the matrix product of the known kernels could not reach what H100s are reported to.
    l2_again: float = 0.5
    l2_bytes: int = 50 << 20  # [W]

    @property
    def l2_kept(self) -> float:
        """Bytes that a later launch finds in L2: half of it, as both halves of a large L2 may hold a copy (assumed)."""
        return self.l2_bytes / 2

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Programs an SM holds at once. Registers are given in units of 256 a warp [G]."""
        of_registers = self.registers // (-(-registers // 8) * 256 * warps) if registers else self.most_programs
        return max(
            1,
            min(
                of_registers,
                self.shared // (shared + self.shared_reserved),
                self.most_programs,
                self.most_warps // warps,
            ),
        )

    def operation(self, i: Instruction) -> tuple[int, int, float, float]:
        """(kind, pipe, clocks it takes the pipe, latency of a result under a scoreboard)."""
        base, mods = i.base, i.modifiers
        if base in _FMA or (base in _HALF and "MMA" not in mods):
            clocks = self.fma if base in _FMA else self.half
            return (FMA if self.fma_pipes == 2 else PIPE), FMA_HEAVY, clocks, 0
        if base in _HALF or base == "IMAD":
            return PIPE, FMA_HEAVY, self.integer_product, 0
        if base == "MUFU":
            return PIPE, SPECIAL, self.special, self.special_latency
        if base == "SHFL" or base in _SHARED:
            return SHARED, MEMORY, 2, self.shared_latency
        if base == "LDGSTS":
            return COPY, MEMORY, 2, 0
        if base in ("LDG", "LD", "ATOMG", "ATOM"):
            return LOAD, MEMORY, 2, 0
        if base in ("STG", "ST", "RED", "REDG", "UTMASTG", "UTMAREDG"):
            return STORE, MEMORY, 2, 0
        if expects(i):  # stands for the copies that follow at once
            return TENSOR_COPY, MEMORY, 2, 0
        if base == "HMMA":
            return PIPE, MATRIX, self.product(mods), self.matrix_latency
        if base == "HGMMA":
            shape = re.match(r"64x(\d+)x(\d+)", mods[0])
            return PRODUCT, MATRIX, int(shape[1]) * int(shape[2]) * self.matrix_group, self.matrix_latency
        if base == "BAR":
            return (BARRIER if "ARV" not in mods else FREE), ALU, 1, 0
        if base == "LDGDEPBAR":
            return COMMIT_COPIES, ALU, 1, 0
        if base == "DEPBAR" and i.operands and i.operands[0].startswith("SB"):
            return WAIT_COPIES, ALU, 1, 0
        if base == "WARPGROUP" and "DEPBAR" in mods:
            return WAIT_PRODUCTS, ALU, 1, 0
        if base == "SYNCS" and "TRYWAIT" in mods:
            return WAIT_TENSORS, ALU, 2, 20
        if base in _FREE:
            return FREE, ALU, 1, 20
        if base in _DOUBLE:
            return PIPE, DOUBLE, self.double, 20
        if base in _CONVERSIONS:
            return PIPE, SPECIAL if self.conversion > 2 else ALU, self.conversion, self.special_latency
        if base in _QUARTER and not (base == "CS2R"):
            return PIPE, SPECIAL, self.quarter if base != "S2R" else 2, self.special_latency
        if base.startswith("U") or base in ("R2UR", "VOTEU", "LDC", "ELECT"):
            return PIPE, UNIFORM, 2, self.uniform_latency if base != "LDC" else self.shared_latency
        return PIPE, ALU, self.alu, self.uniform_latency

    def product(self, mods: tuple[str, ...]) -> float:
        """Clocks that a mma.sync takes its scheduler's matrix pipe, by its shape and type of operands."""
        scale = {"16816": 1.0, "1688": 0.5, "1684": 0.25, "884": 0.5, "16832": 1.0}[
            next(m for m in mods if m.isdigit())
        ]
        if "TF32" in mods:
            scale *= 2
        return self.matrix * scale


MACHINES = {
    90: Machine(90),
    80: Machine(
        80,
        shared=164 * 1024,  # [G]
        most_shared=163 * 1024,  # [G]
        fma_pipes=1,  # [G] 64 fp32 results a clock: one pipe
        half=2,  # [G] 256 fp16 and 128 bf16 results a clock
        matrix=8.0,  # [W] 312 TFLOP/s: 1024 multiply-adds a clock and SM
        shared_latency=23,  # [A] 23 clocks
        l2_latency=200,  # [A] 200 clocks
        memory_latency=430,  # [A] 290 clocks idle; under load (assumed)
        l2_bandwidth=3.7e12,  # [W] 5120 bytes a clock at 1.41 GHz are 7.2; half of it is reached (assumed)
        l2_bytes=40 << 20,  # [W]
    ),
    89: Machine(
        89,
        shared=100 * 1024,  # [G]
        most_shared=99 * 1024,  # [G]
        most_warps=48,  # [G]
        most_programs=24,  # [G]
        double=64,  # [G] 2 fp64 results a clock
        matrix=32.0,  # [W] 165 TFLOP/s with fp32 sums: 256 multiply-adds a clock and SM
        half=2,  # [G] 256 fp16 results a clock
        shared_latency=30,  # assumed as Hopper's
        l2_latency=270,  # assumed as Hopper's
        memory_latency=650,  # assumed
        l2_bandwidth=4.0e12,  # assumed
        l2_bytes=72 << 20,  # [W]
    ),
}


def machine_of(gpu: str) -> Machine:
    """The machine of a named GPU. ValueError, naming what is known, if it is none, or of a generation that has no
    figures here."""
    if gpu not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {gpu!r}")
    major, minor = GPUS[gpu].capability
    if 10 * major + minor not in MACHINES:
        known = ", ".join(f"sm_{arch}" for arch in sorted(MACHINES))
        raise ValueError(f"gpu {gpu!r} is of sm_{major}{minor}, for which there is no machine; there are {known}")
    return MACHINES[10 * major + minor]


def with_constants(machine: Machine, **constants) -> Machine:
    """The machine with figures that were measured, such as ``barrier`` or ``memory_latency``."""
    return replace(machine, **constants)
