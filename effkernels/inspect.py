"""What a launch costs, known without a GPU: compile it for a named architecture and read the machine code.

``record_launches`` runs any launcher on tensors of the ``meta`` device and keeps the kernels it would have started, with their
arguments; ``compile_launch`` compiles one for sm_80/89/90/100 with the compiler, ptxas and nvdisasm that Triton ships;
``Cost`` is what the machine code says: registers, spills, shared memory, vector widths and the instructions of the hottest loop.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import itertools
import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTER_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
BINARIES = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


@dataclass(frozen=True)
class Launch:
    """One kernel start: the jitted function, its arguments by name, compiler options and grid."""

    fn: object
    arguments: dict
    options: dict
    grid: tuple

    @property
    def name(self) -> str:
        return self.fn.__name__

    @property
    def constants(self) -> dict:
        return {p.name: self.arguments[p.name] for p in self.fn.params if p.is_constexpr}

    def key(self) -> tuple:
        """The configuration: kernel, compile-time arguments, pointer types and options (sizes do not count)."""
        pointers = tuple((k, POINTER_TYPES[v.dtype]) for k, v in self.arguments.items() if isinstance(v, torch.Tensor))
        return self.name, tuple(self.constants.items()), pointers, tuple(sorted(self.options.items()))


def _type_of(value) -> str:
    if isinstance(value, torch.Tensor):
        return POINTER_TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"a kernel argument must be a tensor, int, float or bool, got {type(value).__name__}")


def _hint(value) -> bool:
    """Whether Triton would tell the compiler that 16 divides the value (pointers from the allocator are 512-byte aligned)."""
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


@contextlib.contextmanager
def record_launches():
    """Within: kernels are recorded in the list this yields instead of started, so launchers run on ``meta`` tensors."""
    launches: list[Launch] = []

    def run(self, *args, grid, warmup=False, **kwargs):
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments.update({k: v for k, v in kwargs.items() if k in self.arg_names})
        options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
        launches.append(Launch(self, arguments, options, tuple(grid)))

    cls = triton.runtime.jit.JITFunction
    original, cls.run = cls.run, run
    try:
        yield launches
    finally:
        cls.run = original


@dataclass
class Cost:
    """Static cost of a compiled kernel. ``loop`` counts instructions by opcode in its largest innermost loop."""

    name: str
    constants: dict
    dtype: str
    arch: int
    registers: int
    spill_bytes: int
    shared: int
    instructions: int
    loop: dict = field(repr=False)
    opcodes: dict = field(repr=False)

    @property
    def loop_instructions(self) -> int:
        return sum(self.loop.values())

    @property
    def elements_per_thread(self) -> float | None:
        """Elements of the written tensor (of x in the backward) one thread finishes per pass of the loop; depthwise kernels only."""
        k = self.constants
        if not self.name.startswith("depthwise"):
            return None
        return k["S"] * k["BC"] * k["TW"] / 32 * (k["STRIDE"] ** 2 if "backward" in self.name else 1)

    def widths(self, op: str, opcodes=None) -> set[int]:
        """Bytes per thread of the global loads (``LDG``, and ``LDGSTS`` into shared memory) or stores (``STG``), e.g. {16}."""
        found = set()
        for code in self.opcodes if opcodes is None else opcodes:
            if code.split(".")[0] in (("LDG", "LDGSTS") if op == "LDG" else (op,)):
                bits = [int(p) for p in code.split(".")[1:] if p in ("64", "128")]
                small = 2 if ".U16" in code or ".S16" in code else 1 if ".U8" in code else 4
                found.add(bits[0] // 8 if bits else small)
        return found

    def loop_widths(self, op: str) -> set[int]:
        """``widths`` within the loop: the activation tensors, not the parameters."""
        return self.widths(op, self.loop)


def compile_launch(launch: Launch, arch: int = 90):
    """Triton's compiled kernel of ``launch`` for CUDA compute capability ``arch`` (90 = sm_90)."""
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(launch.fn.params):
        value = launch.arguments[param.name]
        hinted = _hint(value) and not param.do_not_specialize
        if param.is_constexpr or value is None:
            signature[param.name], constants[param.name] = "constexpr", value
        else:
            signature[param.name] = _type_of(value)
            if hinted:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.fn, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def cost_of(launch: Launch, arch: int = 90) -> Cost:
    """Compile ``launch`` and read its machine code."""
    kernel = compile_launch(launch, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage = _tool("cuobjdump", "-res-usage", f.name)
        sass = _tool("nvdisasm", "-c", f.name)
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    code, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    opcodes = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in code]
    # A loop is a backward branch; the hottest is the largest that holds no other, of those that load 16 bytes a thread if any does
    # (a program's last steps may loop over partial sums, with narrow loads).
    loops = []
    for i, text in enumerate(code):
        target = re.search(r"\bBRA\b.*?\(?(\.L_\w+)\)?", text)
        if target and labels.get(target[1], i) < i:
            loops.append((labels[target[1]], i))
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    wide = [(a, b) for a, b in inner if any(re.match(r"LDG.*\.128", op) for op in opcodes[a : b + 1])]
    a, b = max(wide or inner, key=lambda ab: ab[1] - ab[0], default=(0, -1))
    dtype = next(str(v.dtype).removeprefix("torch.") for v in launch.arguments.values() if isinstance(v, torch.Tensor))
    return Cost(
        launch.name, launch.constants, dtype, arch, registers, stack, kernel.metadata.shared, len(code),
        dict(collections.Counter(opcodes[a : b + 1])), dict(collections.Counter(opcodes)),
    )  # fmt: skip


@functools.cache
def _binary(name: str) -> str:
    path = os.path.join(BINARIES, name)
    if not os.path.exists(path):
        raise RuntimeError(f"Triton {triton.__version__} does not carry {name} (looked for {path}); static costs need it")
    return path


def _tool(name: str, *args: str) -> str:
    return subprocess.run([_binary(name), *args], check=True, capture_output=True, text=True).stdout


def _meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def block_launches(
    dtype, kernel_size, stride, *, channels=96, size=56, images=64, reduced=8, expands=True, squeeze=True, training=True, act="silu"
):
    """Launches of one depthwise block (forward and backward, or inference) at a shape of an MBConv network."""
    from effkernels import library

    def norm():
        return [_meta(channels) for _ in range(4)]

    x = _meta(images, size, size, channels, dtype=dtype)
    weight = _meta(channels, 1, kernel_size, kernel_size)
    w1, b1, m1, v1 = norm() if expands else [None] * 4
    w2, b2, m2, v2 = norm()
    se = [None] * 4
    if squeeze:
        se = [_meta(reduced, channels, 1, 1), _meta(reduced), _meta(channels, reduced, 1, 1), _meta(channels)]
    settings = (stride, "symmetric", act if expands else "identity", act, act if squeeze else "identity", "sigmoid")
    with record_launches() as launches:
        if not training:
            library.depthwise_block_inference(x, weight, w1, b1, m1, v1, w2, b2, m2, v2, *se, *settings, 1e-3, 1e-3)
        else:
            out, *aux = library.depthwise_block(
                x, weight, w1, b1, m1, v1, None, w2, b2, m2, v2, None, *se, *settings, expands, 0.1, 1e-3, True, 0.1, 1e-3
            )
            library.depthwise_block_backward(out, x, weight, w1, b1, w2, b2, *se, *aux, *settings, expands, True, True, True)
    return launches


def norm_launches(dtype, *, channels=40, size=28, images=64, training=True):
    """Launches of BN + drop-path + residual, the end of a block, and of squeeze-excite alone."""
    from effkernels import library

    x, weight, bias, mean, var = _meta(images, size, size, channels, dtype=dtype), *(_meta(channels) for _ in range(4))
    with record_launches() as launches:
        if training:
            mask = _meta(images)
            out, *stats = library.bn_act_add(x, weight, bias, mean, var, None, mask, x, "identity", True, 0.1, 1e-3)
            library.bn_act_add_backward(out, x, weight, bias, *stats, mask, "identity", True, True)
            se = [_meta(10, channels, 1, 1), _meta(10), _meta(channels, 10, 1, 1), _meta(channels)]
            out, *aux = library.squeeze_excite(x, *se, "silu", "sigmoid")
            library.squeeze_excite_backward(out, x, *se, *aux, "silu", "sigmoid", True)
        else:
            library.bn_act_add_inference(x, weight, bias, mean, var, x, "identity", 1e-3)
    return launches


def shipped_launches(full: bool = False) -> list[Launch]:
    """One launch for every configuration the package uses with SiLU on channel counts divisible by 8.

    Without ``full``, blocks that do not expand are compiled in bf16 only, and k = 7 and 9 in training only, in bf16 and fp32 only
    (fp16 shares bf16's launch configuration): a third of the compilations.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    launches = []
    for dtype, k, stride in itertools.product((bf16, fp16, fp32), (3, 5, 7, 9), (1, 2)):
        if full or k <= 5 or dtype != fp16:
            launches += block_launches(dtype, k, stride)
        if full or k <= 5:
            launches += block_launches(dtype, k, stride, training=False)
        if full or (k <= 5 and dtype == bf16):
            launches += block_launches(dtype, k, stride, expands=False)
            launches += block_launches(dtype, k, stride, expands=False, training=False)
    for dtype in (bf16, fp16, fp32) if full else (bf16,):
        for stride in (1, 2):
            launches += block_launches(dtype, 3, stride, squeeze=False) + block_launches(dtype, 3, stride, squeeze=False, training=False)
    for dtype in (bf16, fp16, fp32):
        launches += norm_launches(dtype) + norm_launches(dtype, training=False)
    # Bottleneck widths of B0 (small) to L2 (large).
    for channels, reduced in ((144, 6), (1152, 48), (3840, 160), (8256, 344)):
        launches += block_launches(bf16, 3, 1, channels=channels, size=14, reduced=reduced)
    return list({launch.key(): launch for launch in launches}.values())


def _cost_row(job) -> dict:
    index, arch = job
    cost = cost_of(_SHIPPED[index], arch)
    per_element = cost.loop_instructions / cost.elements_per_thread if cost.elements_per_thread else None
    row = asdict(cost) | {"loop_instructions": cost.loop_instructions, "instructions_per_element": per_element}
    widths = cost.loop_widths if cost.loop else cost.widths
    return row | {"load_bytes": sorted(widths("LDG")), "store_bytes": sorted(widths("STG"))}


_SHIPPED: list[Launch] = []


def costs(launches, arch: int = 90, processes: int | None = None) -> list[dict]:
    """``cost_of`` every launch, as dictionaries, compiled by ``processes`` worker processes (default: one per core)."""
    import multiprocessing

    _SHIPPED[:] = launches
    processes = processes or os.cpu_count()
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_cost_row, [(i, arch) for i in range(len(launches))]))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m effkernels.inspect", description="Static cost of every shipped configuration.")
    parser.add_argument("--arch", type=int, default=90, choices=(80, 86, 89, 90, 100), help="compute capability to compile for")
    parser.add_argument("--full", action="store_true", help="every configuration, not the third that the test suite compiles")
    parser.add_argument("--one-per-kernel", action="store_true", help="only the first configuration of each kernel")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    parser.add_argument("--processes", type=int, help="worker processes (default: one per core)")
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    launches = shipped_launches(args.full)
    if args.one_per_kernel:
        launches = list({launch.name: launch for launch in reversed(launches)}.values())
    rows = costs(launches, args.arch, args.processes)
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'kernel':28} {'dtype':9} {'k':>1} {'s':>1} {'regs':>4} {'spill':>5} {'smem':>6} {'instr/elem':>10} loads stores")
    for row in rows:
        k, s = (row["constants"].get(name, "") for name in ("K", "STRIDE"))
        per = "" if row["instructions_per_element"] is None else f"{row['instructions_per_element']:.1f}"
        loads, stores = (",".join(map(str, row[name])) for name in ("load_bytes", "store_bytes"))
        print(
            f"{row['name']:28} {row['dtype']:9} {k:>1} {s:>1} {row['registers']:4} {row['spill_bytes']:5} {row['shared']:6} "
            f"{per:>10} {loads:5} {stores}"
        )


if __name__ == "__main__":
    main()
