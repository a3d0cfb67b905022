"""What every shipped launch costs, known without a GPU, as a table in git.

The table is effkernels/configs/static_sm90.json, one row a line, each with a digest of what it depends on.
``python -m effkernels.inspect`` prints it, with the time an element costs at least on a named GPU; ``--update``
compiles the rows whose digest is not there, and drops those that no longer ship.
"""

import argparse
import concurrent.futures
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import triton

import effkernels.configs
from effkernels.configs.gpus import ARCHITECTURES, GPUS, Gpu
from effkernels.tools.launches import Launch
from effkernels.tools.machine_code import cost_of
from effkernels.tools.shipped import shipped_launches

TABLES = Path(effkernels.configs.__file__).parent


DEPTHWISE_FORWARD = ("depthwise_forward_kernel", "depthwise_products_kernel")


def per_pass(launch: Launch) -> tuple[float, str] | None:
    """(elements a thread finishes in one pass of the hottest loop or of a kernel without one, the argument they belong
    to), or None.

    None for kernels on vectors and tiles of statistics, and for those whose hottest loop is not all of an element's
    work.
    """
    k = launch.constants
    if launch.name in DEPTHWISE_FORWARD:
        return k["S"] * k["BLOCK_C"] * k["TW"] / launch.threads, "y"
    if launch.name == "depthwise_backward_kernel":
        return k["S"] * k["BLOCK_C"] * k["TW"] * k["STRIDE"] ** 2 * k["UNROLL"] / launch.threads, "x"
    if launch.name in ("statistics_kernel", "apply_kernel", "gradient_sums_kernel", "pool_kernel"):
        return k["BLOCK_ROWS"] * k["BLOCK_C"] / launch.threads, "y"
    if launch.name == "apply_backward_kernel":
        return k["BLOCK_ROWS"] * k["BLOCK_C"] / launch.threads, "dz"
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
        "constants": {
            name: value if value is None or isinstance(value, (int, float, str)) else str(value)
            for name, value in launch.constants.items()
        },
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


# Most instructions an output of the depthwise forward's inner loop may cost on sm_90, without and with BN + activation
# on load.
DEPTHWISE_GOALS = {3: (19, 23), 5: (30, 37)}


def goal_of(row: dict) -> tuple[int, str] | None:
    """(most instructions an output, why a row may need more or ""), for the kernels that have such a goal; else None.

    The goal is for what training runs at stride 1 in bf16. The other reasons are of the formula, not of its code.
    """
    c = row["constants"]
    if row["kernel"] not in DEPTHWISE_FORWARD or c["K"] not in DEPTHWISE_GOALS:
        return None
    reasons = []
    if c["STRIDE"] == 2:
        reasons.append("four inputs an output are loaded, and activated, not one")
    prologue, epilogue = (norm not in c for norm in ("norm1", "norm2"))  # absent arguments are constants
    if epilogue and prologue:
        reasons.append("the output is activated too")
    if row["dtype"] != "bfloat16" and "silu" in (c["ACT1"], c["ACT2"]):
        reasons.append("SiLU is exp and a division: tanh.approx is good to bf16 only")
    return DEPTHWISE_GOALS[c["K"]][prologue], "; ".join(reasons)


def described(row: dict) -> str:
    """What tells a row from others of its kernel."""
    shown = (
        "K",
        "STRIDE",
        "TW",
        "S",
        "BLOCK_M",
        "BLOCK_ROWS",
        "BLOCK_C",
        "BLOCK_N",
        "BLOCK_K",
        "BLOCK_R",
        "BLOCK_E",
        "BLOCK_I",
        "WGRAD",
    )
    constants = row["constants"]
    settings = " ".join(f"{name}={constants[name]}" for name in shown if name in constants)
    absent = " ".join(name for name, value in constants.items() if value is None)
    return f"{row['kernel']} {row['dtype']} {settings}" + (f" without {absent}" if absent else "")


_JOBS: list[Launch] = []


def _job(index_arch) -> dict:
    index, arch = index_arch
    return row_of(_JOBS[index], arch)


def compiled_rows(launches: list[Launch], arch: int = 90, processes: int | None = None) -> Iterator[dict]:
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


def costs(launches: list[Launch], arch: int = 90, processes: int | None = None) -> list[dict]:
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
    """Where the table of a compute capability (90: sm_90) stands."""
    return TABLES / f"static_sm{arch}.json"


def read_table(path: Path) -> dict:
    """{"triton", "arch", "rows"} of ``path``; no rows where there is no file. ValueError, naming the file, if it is not
    such a table."""
    if not path.exists():
        return {"triton": None, "arch": None, "rows": []}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        assert all("digest" in row and "kernel" in row for row in table["rows"]) and "triton" in table
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(
            f"{path} is not a table of static costs; write it again with python -m effkernels.inspect --update"
        ) from error
    return table


def write_table(path: Path, arch: int, rows: Iterable[dict]) -> None:
    """One row a line, in an order that changes little when rows do."""
    lines = sorted((described(row), row["digest"], json.dumps(row, separators=(",", ":"))) for row in rows)
    head = json.dumps({"triton": triton.__version__, "arch": arch})
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        f'{head[:-1]}, "rows": [\n' + ",\n".join(line for *_, line in lines) + "\n]}\n", encoding="utf-8"
    )
    temporary.replace(path)


def update(path: Path, launches: list[Launch], arch: int, processes: int | None = None) -> tuple[int, int]:
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


def sample(rows: list[dict], one_in: int = 60) -> list[dict]:
    """The rows to check by compiling: the shortest of each kernel, and one in ``one_in``, others whenever a kernel
    changes."""
    shortest = {}
    for row in sorted(rows, key=lambda row: (row["instructions"], row["digest"])):
        shortest.setdefault(row["kernel"], row)
    drawn = [row for row in rows if int(row["digest"], 16) % one_in == 0]
    return list({row["digest"]: row for row in (*shortest.values(), *drawn)}.values())


def table_lines(
    launches: list[Launch], rows: list[dict], gpu: Gpu, arch: int, predictions: list | None = None
) -> list[str]:
    """The table for people: machine code, then each resource's floor in picoseconds an element and the one that binds.

    With ``predictions``, one for each launch, also the microseconds that the launch is predicted to take.
    """
    by_digest = {row["digest"]: row for row in rows}
    floors = ("bytes", "issue", "FMA", "SFU")
    lines = [
        f"{'kernel':28} {'dtype':9} {'k':>1} {'s':>1} {'regs':>4} {'spill':>5} {'smem':>6} {'instr/elem':>10} "
        f"{'loads':8} {'stores':6} "
        + " ".join(f"{name + ' ps':>8}" for name in floors)
        + (f" {'predicted us':>12}" if predictions else "")
        + f" {'binds':5} goal for instr/elem"
    ]
    for launch, prediction in zip(launches, predictions or [None] * len(launches), strict=True):
        row = by_digest[launch.digest(arch)]
        k, s = (row["constants"].get(name, "") for name in ("K", "STRIDE"))
        loads, stores = (",".join(map(str, row[name])) for name in ("loads", "stores"))
        per, times = "", " " * (9 * len(floors) - 1) if predictions else ""
        if row["per_element"] is not None:
            per = f"{row['per_element']:.1f}"
            bound = gpu.floors(row, launch.activation_bytes() / launch.arguments[per_pass(launch)[1]].numel())
            times = " ".join(f"{bound[name]:8.2f}" for name in floors)
        if prediction is not None:
            times += f" {1e6 * prediction.time:12.1f}"
        if row["per_element"] is not None:
            times += f" {max(bound, key=bound.get):5}"
        if (goal := goal_of(row)) is not None:
            over = row["per_element"] - goal[0]
            times += f" {goal[0]}" + (f", {over:.1f} over: {goal[1]}" if over > 0 else "")
        lines.append(
            f"{row['kernel']:28} {row['dtype']:9} {k:>1} {s:>1} {row['registers']:4} {row['spills']:5} "
            f"{row['shared']:6} "
            f"{per:>10} {loads:8} {stores:6} {times}".rstrip()
        )
    return lines


def main(argv: list[str] | None = None, predict: Callable | None = None) -> None:
    """predict(launches, gpu) gives a prediction for each launch; None: ``--predict`` is not offered."""
    parser = argparse.ArgumentParser(
        prog="python -m effkernels.inspect", description="Static cost of every shipped configuration."
    )
    parser.add_argument("--arch", type=int, default=90, choices=ARCHITECTURES, help="compute capability to compile for")
    parser.add_argument(
        "--gpu", choices=GPUS, default="h200", help="whose rates the floors are computed with (default: h200)"
    )
    parser.add_argument(
        "--update", action="store_true", help="compile what the table in git lacks, write it, and say what changed"
    )
    parser.add_argument(
        "--check", action="store_true", help="compile nothing: print as JSON which configurations have no current row"
    )
    parser.add_argument(
        "--sample", action="store_true", help="compile the sample of the table that the test suite compiles"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="also blocks of B4 and B7, of fp16 and fp32, and larger kernels, which the table in git does not hold",
    )
    parser.add_argument("--one-per-kernel", action="store_true", help="only the first configuration of each kernel")
    parser.add_argument("--fresh", action="store_true", help="compile all of them, whatever the table says")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    parser.add_argument(
        "--table", type=Path, help="the table's file (default: effkernels/configs/static_sm<arch>.json)"
    )
    parser.add_argument("--processes", type=int, help="worker processes (default: one per core)")
    if predict is not None:
        parser.add_argument(
            "--predict", action="store_true", help="also the time of each launch on --gpu, predicted (seconds each)"
        )
    args = parser.parse_args(argv)
    predicts = predict is not None and args.predict
    if predicts and (args.update or args.check):
        parser.error("--predict is for the table that is printed, not for --update or --check")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    path = args.table or table_path(args.arch)
    launches = shipped_launches(args.full)
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
        missing = [
            described({"kernel": launch.name, "dtype": launch.dtype, "constants": launch.constants})
            for launch, digest in zip(launches, digests, strict=True)
            if digest not in known
        ]
        stale = [described(row) for row in table["rows"] if row["digest"] not in set(digests)]
        print(
            json.dumps({"table": table["triton"], "installed": triton.__version__, "missing": missing, "stale": stale})
        )
        return
    if args.sample:
        drawn = {row["digest"] for row in sample([known[digest] for digest in digests if digest in known])}
        launches = [launch for launch, digest in zip(launches, digests, strict=True) if digest in drawn]
        known = {}
    todo = [launch for launch in launches if launch.digest(args.arch) not in known]
    known |= {row["digest"]: row for row in compiled_rows(todo, args.arch, args.processes)}
    rows = [known[launch.digest(args.arch)] for launch in launches]
    predictions = predict(launches, args.gpu) if predicts else None
    if predicts:
        rows = [row | {"predicted_us": 1e6 * each.time} for row, each in zip(rows, predictions, strict=True)]
    print(
        json.dumps(rows)
        if args.json
        else "\n".join(
            table_lines(launches=launches, rows=rows, gpu=GPUS[args.gpu], arch=args.arch, predictions=predictions)
        )
    )


if __name__ == "__main__":
    main()
