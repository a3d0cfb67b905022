"""What a launch costs, known without a GPU: compile it for a named architecture and read the machine code.

``record_launches`` runs any launcher on tensors of the ``meta`` device and keeps the kernels it would have started, with their
arguments; ``compile_launch`` compiles one for sm_80/89/90/100 with the compiler, ptxas and nvdisasm that Triton ships;
``Cost`` is what the machine code says: registers, spills, shared memory, vector widths and the instructions of the hottest loop.

The table of every shipped configuration is in git, effkernels/configs/static_sm90.json, one row a line, each with a digest of what it
depends on. ``python -m effkernels.inspect`` prints it, with the time an element costs at least on a named GPU;
``--update`` compiles the rows whose digest is not there, and drops those that no longer ship.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import tempfile
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from effkernels import tables
from effkernels.configs.gpus import GPUS, Gpu

POINTER_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
TABLES = Path(__file__).parent / "tables"
ROW_FORMAT = 1  # raised when a row's fields or their meaning change
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

    @property
    def threads(self) -> int:
        return 32 * self.options.get("num_warps", 4)

    @property
    def dtype(self) -> str:
        return next(str(v.dtype).removeprefix("torch.") for v in self.arguments.values() if isinstance(v, torch.Tensor))

    def key(self) -> tuple:
        """The configuration: kernel, compile-time arguments, pointer types and options (sizes do not count)."""
        pointers = tuple((k, POINTER_TYPES[v.dtype]) for k, v in self.arguments.items() if isinstance(v, torch.Tensor))
        return self.name, tuple(self.constants.items()), pointers, tuple(sorted(self.options.items()))

    def specialization(self) -> tuple[dict, dict, dict]:
        """Triton's (signature, constants, attributes) of this launch."""
        signature, constants, attributes = {}, {}, {}
        for i, param in enumerate(self.fn.params):
            value = self.arguments[param.name]
            if param.is_constexpr or value is None:
                signature[param.name], constants[param.name] = "constexpr", value
            else:
                signature[param.name] = _type_of(value)
                if _hint(value) and not param.do_not_specialize:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        return signature, constants, attributes

    def digest(self, arch: int = 90) -> str:
        """Of all that the machine code depends on: sources of the kernel and of what it calls, types, constants, options, compiler."""
        signature, constants, attributes = self.specialization()
        parts = (
            ROW_FORMAT,
            triton.__version__,
            arch,
            source_digest(self.fn),
            signature,
            constants,
            attributes,
            sorted(self.options.items()),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def activation_bytes(self) -> int:
        """Bytes of its tensors, each once: what a launch that reads or writes all of them must move at least."""
        tensors = {id(v): v for v in self.arguments.values() if isinstance(v, torch.Tensor)}
        return sum(t.numel() * t.element_size() for t in tensors.values())


def _normal_form(source: str) -> str:
    """The tokens of Python source without comments, docstrings and layout."""
    kept, line = [], []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE:
            if any(kind != tokenize.STRING for kind, _ in line):
                kept += [text for _, text in line] + ["\n"]
            line = []
        elif token.type in (tokenize.INDENT, tokenize.DEDENT):
            kept.append("{" if token.type == tokenize.INDENT else "}")
        elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            line.append((token.type, token.string))
    return " ".join(kept)


def _names(code) -> set[str]:
    """Names that compiled Python refers to, those of nested functions too."""
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if hasattr(c, "co_names")))


@functools.cache
def source_digest(fn) -> str:
    """Of a jitted function's source, comments and place in the file aside, with the jitted functions and constants it reaches.

    (``JITFunction.cache_key`` changes with the line a function stands on.)
    """
    jitted, todo, found = type(fn), [fn], {}
    while todo:
        function = todo.pop()
        if (key := (function.fn.__module__, function.fn.__qualname__)) in found:
            continue
        constants = {}
        for name in sorted(_names(function.fn.__code__)):
            value = function.fn.__globals__.get(name)
            if isinstance(value, jitted):
                todo.append(value)
            elif isinstance(value, (triton.language.constexpr, int, float, str)):
                constants[name] = repr(value)
        found[key] = _normal_form(function.src), constants
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


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
    """Within: kernels are recorded in the list this yields instead of started, so launchers run on ``meta`` tensors.

    Configurations are the rules', whatever tables there are.
    """
    launches: list[Launch] = []

    def run(self, *args, grid, warmup=False, **kwargs):
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments.update({k: v for k, v in kwargs.items() if k in self.arg_names})
        options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
        launches.append(Launch(self, arguments, options, tuple(grid)))

    cls = triton.runtime.jit.JITFunction
    original, cls.run = cls.run, run
    try:
        with tables.rules_only():
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

    def count(self, *prefixes: str) -> int:
        """Instructions of the loop (of the whole kernel without one) that start with one of ``prefixes``, or all."""
        return sum(n for code, n in (self.loop or self.opcodes).items() if code.startswith(prefixes or ""))


def compile_launch(launch: Launch, arch: int = 90):
    """Triton's compiled kernel of ``launch`` for CUDA compute capability ``arch`` (90 = sm_90)."""
    signature, constants, attributes = launch.specialization()
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
    return Cost(
        launch.name, launch.constants, launch.dtype, arch, registers, stack, kernel.metadata.shared, len(code),
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
            library.depthwise_block_backward(out, x, weight, w1, b1, w2, b2, *se, *aux, *settings, expands, True, [True] * 10)
    return launches


def norm_launches(dtype, *, channels=40, size=28, images=64, training=True):
    """Launches of BN + drop-path + residual, the end of a block, and of squeeze-excite alone."""
    from effkernels import library

    x, weight, bias, mean, var = _meta(images, size, size, channels, dtype=dtype), *(_meta(channels) for _ in range(4))
    with record_launches() as launches:
        if training:
            mask = _meta(images)
            out, *stats = library.bn_act_add(x, weight, bias, mean, var, None, mask, torch.empty_like(x), "identity", True, 0.1, 1e-3)
            library.bn_act_add_backward(out, x, weight, bias, *stats, mask, "identity", True, True)
            se = [_meta(10, channels, 1, 1), _meta(10), _meta(channels, 10, 1, 1), _meta(channels)]
            out, *aux = library.squeeze_excite(x, *se, "silu", "sigmoid")
            library.squeeze_excite_backward(out, x, *se, *aux, "silu", "sigmoid", [True] * 5)
        else:
            library.bn_act_add_inference(x, weight, bias, mean, var, torch.empty_like(x), "identity", 1e-3)
    return launches


def call_launches(call, x, backward: bool) -> list[Launch]:
    """Launches of ``call(x)`` on x [N, C, H, W] of the ``meta`` device, and of its backward."""
    with record_launches() as launches, torch.set_grad_enabled(backward):
        out = call(x.to(memory_format=torch.channels_last).requires_grad_(backward))
        if backward:
            out.backward(torch.empty_like(out))
    return launches


@functools.cache
def family_blocks(width: float) -> list[tuple]:
    """(in, out channels, kernel size, stride, expand ratio, image size) of the different blocks of an EfficientNet (Tan & Le, 2019,
    table 1) of a width coefficient: 1 is B0 and B1, 1.4 B4, 2 B7, 4.3 L2."""

    def rounded(channels):
        multiple = max(8, int(channels * width + 4) // 8 * 8)
        return multiple + 8 if multiple < 0.9 * channels * width else multiple

    blocks, inputs, size = [], rounded(32), 112
    for ratio, channels, k, stride in (
        (1, 16, 3, 1),
        (6, 24, 3, 2),
        (6, 40, 5, 2),
        (6, 80, 3, 2),
        (6, 112, 5, 1),
        (6, 192, 5, 2),
        (6, 320, 3, 1),
    ):
        blocks.append((inputs, rounded(channels), k, stride, ratio, size))
        inputs, size = rounded(channels), size // stride
        blocks.append((inputs, inputs, k, 1, ratio, size))
    return blocks


def mbconv_launches(dtype, inputs, outputs, k, stride, ratio, size, *, training, frozen=False, images=64, **how) -> list[Launch]:
    """Launches of one whole MBConv block; frozen: training with running statistics."""
    from effkernels import FusedMBConv

    block = FusedMBConv(inputs, outputs, k, stride, ratio, device="meta", **how).train(training and not frozen)
    block.why_not_fused = lambda x=None: None  # meta tensors are no reason here
    return call_launches(block, _meta(images, inputs, size, size, dtype=dtype), training)


def stem_and_head_launches(dtype, channels, inputs, features, *, training, images=64) -> list[Launch]:
    """Launches of a network's first convolution, on normalised images of the compute dtype, in training also as its first block's, and
    of its last."""
    from effkernels import FusedMBConv, functional
    from effkernels.parameters import BatchNormParams

    def norm(channels):
        return BatchNormParams.of(torch.nn.BatchNorm2d(channels, device="meta").train(training))

    weight, first = torch.nn.Parameter(_meta(channels, 3, 3, 3)), norm(channels)
    pixels = _meta(images, 3, 224, 224, dtype=dtype)
    launches = call_launches(lambda x: functional.stem(x, weight, first), pixels, training)
    if training:
        block = FusedMBConv(channels, channels // 2, 3, 1, 1, device="meta")
        launches += call_launches(lambda x: block.fused(x, stem=(weight, first), stem_stride=2), pixels, True)
    last, conv = norm(features), torch.nn.Parameter(_meta(features, inputs, 1, 1))
    return launches + call_launches(lambda x: functional.head(x, conv, last), _meta(images, inputs, 7, 7, dtype=dtype), training)


def shipped_launches(full: bool = False) -> list[Launch]:
    """One launch for every configuration the package uses with SiLU on channel counts divisible by 8: blocks of EfficientNet's family
    in every dtype, with and without residual, drop-path and squeeze-excite, and single layers with k up to 9.

    Without ``full`` a part that compiles in minutes: blocks of B0 in bf16, layers that do not expand in bf16 only, k = 7 and 9 in
    training only, in bf16 and fp32 only (fp16 shares bf16's launch configuration).
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    launches = []
    for width, dtype in itertools.product(
        (1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 4.3) if full else (1.0,), (bf16, fp16, fp32) if full else (bf16,)
    ):
        for inputs, outputs, k, stride, *rest in family_blocks(width):
            drop_paths = (0.0, 0.2) if stride == 1 and inputs == outputs else (0.0,)
            for drop_path in drop_paths:
                launches += mbconv_launches(dtype, inputs, outputs, k, stride, *rest, training=True, drop_path=drop_path)
            launches += mbconv_launches(dtype, inputs, outputs, k, stride, *rest, training=False)
    for dtype, training in itertools.product((bf16, fp16, fp32) if full else (bf16,), (True, False)):
        launches += mbconv_launches(dtype, 24, 40, 3, 2, 6, 56, training=training, se_ratio=0.0)
        for channels, inputs, features in ((32, 320, 1280), (64, 640, 2560)):
            launches += stem_and_head_launches(dtype, channels, inputs, features, training=training)
        if training:
            for how in ({"memory": "recompute"}, {"frozen": True}, {"frozen": True, "memory": "recompute"}):
                launches += mbconv_launches(dtype, 40, 40, 5, 1, 6, 28, training=True, **how)
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


def per_pass(launch: Launch) -> tuple[float, str] | None:
    """(elements a thread finishes in one pass of the hottest loop or of a kernel without one, the argument they belong to), or None.

    None for kernels on vectors and tiles of statistics, and for those whose hottest loop is not all of an element's work.
    """
    k = launch.constants
    if launch.name == "depthwise_forward_kernel":
        return k["S"] * k["BC"] * k["TW"] / launch.threads, "y"
    if launch.name == "depthwise_backward_kernel":
        return k["S"] * k["BC"] * k["TW"] * k["STRIDE"] ** 2 / launch.threads, "x"
    if launch.name in ("statistics_kernel", "apply_kernel", "gradient_sums_kernel", "pool_kernel"):
        return k["BR"] * k["BC"] / launch.threads, "y"
    if launch.name == "apply_backward_kernel":
        return k["BR"] * k["BC"] / launch.threads, "dz"
    return None


def row_of(launch: Launch, arch: int = 90) -> dict:
    """One row of the table: ``launch`` compiled."""
    cost = cost_of(launch, arch)
    elements = per_pass(launch)

    def per_element(*prefixes):
        return None if elements is None else round(cost.count(*prefixes) / elements[0], 2)

    widths = cost.loop_widths if cost.loop else cost.widths
    return {
        "digest": launch.digest(arch),
        "kernel": launch.name,
        "dtype": launch.dtype,
        "constants": {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in launch.constants.items()},
        "options": dict(sorted(launch.options.items())),
        "registers": cost.registers,
        "spills": cost.spill_bytes,
        "shared": cost.shared,
        "instructions": cost.instructions,
        "loop": sum(cost.loop.values()),
        "per_element": per_element(),
        "fma": per_element("FFMA", "FADD", "FMUL"),
        "mufu": per_element("MUFU"),
        "special": sorted({code.split(".")[1] for code in cost.opcodes if code.startswith("MUFU")}),
        "loads": sorted(widths("LDG")),
        "stores": sorted(widths("STG")),
    }


# Most instructions an output of the depthwise forward's inner loop may cost on sm_90, without and with BN + activation on load.
DEPTHWISE_GOALS = {3: (24, 32), 5: (45, 56)}


def goal_of(row: dict) -> tuple[int, str] | None:
    """(most instructions an output, why a row may need more or ""), for the kernels that have such a goal; else None.

    The goal is for what training runs at stride 1 in bf16. The other reasons are of the formula, not of its code.
    """
    c = row["constants"]
    if row["kernel"] != "depthwise_forward_kernel" or c["K"] not in DEPTHWISE_GOALS:
        return None
    reasons = []
    if c["STRIDE"] == 2:
        reasons.append("four inputs an output are loaded, and activated, not one")
    if c["EPILOGUE"] and c["PROLOGUE"]:
        reasons.append("the output is activated too")
    if row["dtype"] != "bfloat16" and "silu" in (c["ACT1"], c["ACT2"]):
        reasons.append("SiLU is exp and a division: tanh.approx is good to bf16 only")
    return DEPTHWISE_GOALS[c["K"]][bool(c["PROLOGUE"])], "; ".join(reasons)


def described(row: dict) -> str:
    """What tells a row from others of its kernel."""
    shown = ("K", "STRIDE", "TW", "S", "BC", "BR", "BM", "BN", "BK", "RB", "PROLOGUE", "EPILOGUE", "BN1", "WGRAD")
    settings = " ".join(f"{name}={row['constants'][name]}" for name in shown if name in row["constants"])
    return f"{row['kernel']} {row['dtype']} {settings}"


_JOBS: list[Launch] = []


def _job(index_arch) -> dict:
    index, arch = index_arch
    return row_of(_JOBS[index], arch)


def compiled_rows(launches, arch: int = 90, processes: int | None = None):
    """``row_of`` every launch as they become ready, from ``processes`` worker processes (default: one per core)."""
    import multiprocessing

    _JOBS[:] = launches
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(processes or os.cpu_count(), mp_context=context) as pool:
        jobs = [pool.submit(_job, (i, arch)) for i in range(len(launches))]
        try:
            for job in _progress(concurrent.futures.as_completed(jobs), len(jobs)):
                yield job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def costs(launches, arch: int = 90, processes: int | None = None) -> list[dict]:
    """``row_of`` every launch, in order."""
    by_digest = {row["digest"]: row for row in compiled_rows(launches, arch, processes)}
    return [by_digest[launch.digest(arch)] for launch in launches]


def _progress(iterable, total: int):
    try:
        from tqdm import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, total=total, unit="kernel", disable=None, smoothing=0)  # None: silent unless in a terminal


def table_path(arch: int) -> Path:
    return TABLES / f"static_sm{arch}.json"


def read_table(path: Path) -> dict:
    """{"triton", "arch", "rows"} of ``path``; no rows where there is no file. ValueError, naming the file, if it is not such a table."""
    if not path.exists():
        return {"triton": None, "arch": None, "rows": []}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        assert all("digest" in row and "kernel" in row for row in table["rows"]) and "triton" in table
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is not a table of static costs; write it again with python -m effkernels.inspect --update") from error
    return table


def write_table(path: Path, arch: int, rows) -> None:
    """One row a line, in an order that changes little when rows do."""
    lines = sorted((described(row), row["digest"], json.dumps(row, separators=(",", ":"))) for row in rows)
    head = json.dumps({"triton": triton.__version__, "arch": arch})
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f'{head[:-1]}, "rows": [\n' + ",\n".join(line for *_, line in lines) + "\n]}\n", encoding="utf-8")
    temporary.replace(path)


def update(path: Path, launches, arch: int, processes: int | None = None) -> tuple[int, int]:
    """Bring the table up to date: (rows compiled, rows dropped). Saved as it goes, so that it can be interrupted."""
    wanted = {launch.digest(arch): launch for launch in launches}
    old = read_table(path)["rows"]
    rows = {row["digest"]: row for row in old if row["digest"] in wanted}
    dropped = len(old) - len(rows)
    todo = [launch for digest, launch in wanted.items() if digest not in rows]
    try:
        for i, row in enumerate(compiled_rows(todo, arch, processes), 1):
            rows[row["digest"]] = row
            if i % 20 == 0:
                write_table(path, arch, rows.values())
    finally:
        write_table(path, arch, rows.values())
    return len(todo), dropped


def sample(rows, one_in: int = 60) -> list[dict]:
    """The rows to check by compiling: the shortest of each kernel, and one in ``one_in``, others whenever a kernel changes."""
    shortest = {}
    for row in sorted(rows, key=lambda row: (row["instructions"], row["digest"])):
        shortest.setdefault(row["kernel"], row)
    drawn = [row for row in rows if int(row["digest"], 16) % one_in == 0]
    return list({row["digest"]: row for row in (*shortest.values(), *drawn)}.values())


def table_lines(launches, rows, gpu: Gpu, arch: int) -> list[str]:
    """The table for people: machine code, then each resource's floor in picoseconds an element and the one that binds."""
    by_digest = {row["digest"]: row for row in rows}
    floors = ("bytes", "issue", "FMA", "SFU")
    lines = [
        f"{'kernel':28} {'dtype':9} {'k':>1} {'s':>1} {'regs':>4} {'spill':>5} {'smem':>6} {'instr/elem':>10} {'loads':8} {'stores':6} "
        + " ".join(f"{name + ' ps':>8}" for name in floors)
        + f" {'binds':5} goal for instr/elem"
    ]
    for launch in launches:
        row = by_digest[launch.digest(arch)]
        k, s = (row["constants"].get(name, "") for name in ("K", "STRIDE"))
        loads, stores = (",".join(map(str, row[name])) for name in ("loads", "stores"))
        per, times = "", ""
        if row["per_element"] is not None:
            per = f"{row['per_element']:.1f}"
            bound = gpu.floors(row, launch.activation_bytes() / launch.arguments[per_pass(launch)[1]].numel())
            times = " ".join(f"{bound[name]:8.2f}" for name in floors) + f" {max(bound, key=bound.get):5}"
        if (goal := goal_of(row)) is not None:
            over = row["per_element"] - goal[0]
            times += f" {goal[0]}" + (f", {over:.1f} over: {goal[1]}" if over > 0 else "")
        lines.append(
            f"{row['kernel']:28} {row['dtype']:9} {k:>1} {s:>1} {row['registers']:4} {row['spills']:5} {row['shared']:6} "
            f"{per:>10} {loads:8} {stores:6} {times}".rstrip()
        )
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m effkernels.inspect", description="Static cost of every shipped configuration.")
    parser.add_argument("--arch", type=int, default=90, choices=(80, 86, 89, 90, 100), help="compute capability to compile for")
    parser.add_argument("--gpu", choices=GPUS, default="h200", help="whose rates the floors are computed with (default: h200)")
    parser.add_argument("--update", action="store_true", help="compile what the table in git lacks, write it, and say what changed")
    parser.add_argument("--check", action="store_true", help="compile nothing: print as JSON which configurations have no current row")
    parser.add_argument("--sample", action="store_true", help="compile the sample of the table that the test suite compiles")
    parser.add_argument("--reduced", action="store_true", help="a third of the configurations")
    parser.add_argument("--one-per-kernel", action="store_true", help="only the first configuration of each kernel")
    parser.add_argument("--fresh", action="store_true", help="compile all of them, whatever the table says")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    parser.add_argument("--table", type=Path, help="the table's file (default: effkernels/configs/static_sm<arch>.json)")
    parser.add_argument("--processes", type=int, help="worker processes (default: one per core)")
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    path = args.table or table_path(args.arch)
    launches = shipped_launches(not args.reduced)
    if args.update:
        compiled, dropped = update(path, launches, args.arch, args.processes)
        print(f"{path}: {compiled} rows compiled, {dropped} dropped, {len(read_table(path)['rows'])} in all")
        return
    if args.one_per_kernel:
        launches = list({launch.name: launch for launch in reversed(launches)}.values())
    table = read_table(path)
    known = {} if args.fresh else {row["digest"]: row for row in table["rows"]}
    digests = [launch.digest(args.arch) for launch in launches]
    if args.check:
        missing = [described({"kernel": launch.name, "dtype": launch.dtype, "constants": launch.constants})
                   for launch, digest in zip(launches, digests, strict=True) if digest not in known]  # fmt: skip
        stale = [described(row) for row in table["rows"] if row["digest"] not in set(digests)]
        print(json.dumps({"table": table["triton"], "installed": triton.__version__, "missing": missing, "stale": stale}))
        return
    if args.sample:
        drawn = {row["digest"] for row in sample([known[digest] for digest in digests if digest in known])}
        launches = [launch for launch, digest in zip(launches, digests, strict=True) if digest in drawn]
        known = {}
    todo = [launch for launch in launches if launch.digest(args.arch) not in known]
    known |= {row["digest"]: row for row in compiled_rows(todo, args.arch, args.processes)}
    rows = [known[launch.digest(args.arch)] for launch in launches]
    print(json.dumps(rows) if args.json else "\n".join(table_lines(launches, rows, GPUS[args.gpu], args.arch)))


if __name__ == "__main__":
    main()
