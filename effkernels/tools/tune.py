"""Measures launch configurations on the present GPU, or predicts them for a named one, and writes the table that
overrides the rules of configs/rules.py there.

``python -m effkernels.tune`` takes each kernel family at the shapes of an EfficientNet's blocks, starts from the rule's
configuration and moves to the fastest neighbour until none is faster. A configuration whose results differ from the
rule's, or that does not compile, is passed over. The table is saved after each shape, and what it already holds is not
measured again, so a run that was interrupted goes on. Each row has a digest of the kernels that it was found for
("code"): where they are other kernels now, the row is named and searched again. Nothing else in the package measures;
see effkernels/configs for how a table is found.

``--simulate`` needs no GPU: times are the simulator's (docs/performance.md), rows are marked ``"source": "simulated"``,
and nothing is run, so results are not compared. A measured row takes the place of a simulated one, never the reverse.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from effkernels.configs import tables
from effkernels.configs.gpus import GPUS
from effkernels.configs.rules import (
    expand_backward_form,
    expand_weight_is_apart,
    product_is_apart,
    project_backward_is_fused,
)

# Fields that are free to change, with the values tried, in order. What other parts of a launch rely on is not here.
FIELDS = {
    "depthwise_forward": {
        "S": (1, 2, 4, 8, 16),
        "TW": (1, 2, 3, 4, 6, 8),
        "TH": (4, 8, 16, 32),
        "stages": (1, 2, 3, 4),
        "warps_per_sm": (4, 8, 12, 16),
    },
    "depthwise_backward": {
        "S": (1, 2, 4),
        "TW": (1, 2, 3, 4, 6, 8),
        "TH": (4, 8, 16, 32),
        "stages": (1, 2),
        "warps_per_sm": (4, 8, 12, 16),
    },
    "elementwise": {"BLOCK_ROWS": (16, 32, 64, 128, 256, 512), "num_warps": (2, 4, 8)},
    "reduction": {"BLOCK_ROWS": (8, 16, 32, 64, 128, 256), "num_warps": (2, 4, 8)},
    "gradient_sums": {"steps": (1, 2, 3, 4, 6), "num_warps": (1, 2, 4)},
    "pointwise_forward": {
        "BLOCK_M": (64, 128, 256),
        "ahead": (1, 2, 3),
        "num_warps": (4, 8),
        "stages": (2, 3, 4),
        "programs_per_sm": (1, 2, 3, 4, 5, 6),
    },
    "project_both": {
        "BLOCK_M": (16, 32, 64),
        "BLOCK_E": (16, 32, 64),
        "stages": (1, 2, 3),
        "programs_per_sm": (4, 8, 12, 16),
    },
    "expand_pass": {"BLOCK_M": (32, 64, 128), "stages": (1, 2, 3, 4), "programs_per_sm": (1, 2, 3, 4, 5)},
    "expand_data": {
        "BLOCK_M": (64, 128),
        "BLOCK_I": (32, 64, 128, 256),
        "num_warps": (4, 8),
        "stages": (1, 2, 3, 4),
        "programs_per_sm": (1, 2, 3, 4),
    },
    "expand_weight": {
        "BLOCK_M": (32, 64, 128),
        "BLOCK_E": (64, 128, 256),
        "num_warps": (4, 8),
        "stages": (1, 2, 3, 4),
        "programs_per_sm": (1, 2, 3),
    },
}
# A configuration is faster if it takes at most this share of the time: less is noise, or what predictions do not tell.
GAIN = {"measured": 0.98, "simulated": 0.95}
MOST = 60  # configurations timed for one shape


@dataclass(frozen=True)
class Workload:
    """One launcher at one shape: ``build(device)`` allocates its arguments and returns the call, which returns what to
    compare."""

    name: str
    family: str
    build: Callable


def neighbours(family: str, config: object) -> list:
    """Configurations that differ from ``config`` in one field, by one step. A step passes over values that the other
    fields do not allow."""
    found = []
    for field, values in FIELDS[family].items():
        steps = [(v, dataclasses.replace(config, **{field: v})) for v in values]
        steps = [(v, step) for v, step in steps if getattr(step, "possible", True)]
        value = getattr(config, field)
        below, above = [step for v, step in steps if v < value], [step for v, step in steps if v > value]
        found += [*below[-1:], *above[:1]]
    return found


def climb(family: str, start: object, times_of: Callable, gain: float) -> tuple[object, float, float]:
    """(fastest configuration, its time, the start's time): steps to the fastest neighbour as long as one takes at most
    ``gain`` of the time.

    times_of(configs) returns the time of each, or None for a configuration that cannot be used.
    """
    times = {start: times_of([start])[0]}
    if times[start] is None:
        raise RuntimeError(f"the rule's own configuration of {family} cannot run: {start}")
    best = start
    while len(times) < MOST:
        new = [config for config in neighbours(family, best) if config not in times][: MOST - len(times)]
        times |= zip(new, times_of(new), strict=True)
        usable = [config for config in neighbours(family, best) if times.get(config) is not None]
        fastest = min(usable, key=times.get, default=best)
        if times[fastest] >= gain * times[best]:
            break
        best = fastest
    return best, times[best], times[start]


def _difference(results, expected) -> float:
    """Largest relative L2 difference of two tuples of tensors; NaN counts as infinite."""
    worst = 0.0
    for a, b in zip(results, expected, strict=True):
        a, b = a.double(), b.double()
        error = ((a - b).norm() / (b.norm() + 1e-30)).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


def changed(config: object, start: object) -> dict:
    """Fields of ``config`` that differ from ``start``."""
    return {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != getattr(start, f.name)
    }


def code_of(launches: list) -> str:
    """A digest of the sources of the kernels that were launched, each once: what a row's times are of."""
    from effkernels.tools.launches import source_digest

    sources = sorted({source_digest(launch.fn) for launch in launches})
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:16]


def recorded_code(workload: Workload) -> str:
    """``code_of`` the launches of a workload, which are recorded on ``meta``."""
    from effkernels.tools.launches import record_launches

    with record_launches() as launches:
        workload.build(torch.device("meta"))()
    return code_of(launches)


def measured(device: torch.device, timer: Callable) -> Callable:
    """How ``tune`` times a workload on this GPU. timer(call) returns microseconds."""

    def start(workload: Workload, report):
        code = recorded_code(workload)
        with tables.rules_only():
            call = workload.build(device)
            with tables.watch() as asked:
                expected = call()

        def time(config, rule):
            fields = changed(config, rule)
            with tables.override(workload.family, **fields):
                try:
                    # Sums in another order: the results of one dtype agree to a few of its roundings.
                    if _difference(call(), expected) > (1e-2 if expected[0].element_size() == 2 else 1e-4):
                        return None
                    return timer(call)
                except Exception as error:  # whatever the compiler or the launch has against this one configuration
                    report(f"{workload.family} {fields}: {type(error).__name__}")
                    return None

        return asked, code, lambda configs, rule: [time(config, rule) for config in configs]

    return start


def simulated(gpu: str, predict: Callable) -> Callable:
    """How ``tune`` times a workload without a GPU. predict(launches of each call, gpu) returns the predictions of each
    call's launches, or the error of a call of which one does not compile."""
    from effkernels.tools.launches import record_launches

    def start(workload: Workload, report):
        with record_launches(GPUS[gpu]) as recorded, tables.watch() as asked:
            call = workload.build(torch.device("meta"))
            call()
        code = code_of(recorded)

        def times(configs, rule):
            calls = []
            for config in configs:
                fields = changed(config, rule)
                with tables.override(workload.family, **fields), tables.watch():  # what is watched, rules decide
                    with record_launches(GPUS[gpu]) as launches:
                        call()
                calls.append(launches)
            found = []
            for config, result in zip(configs, predict(calls, gpu), strict=True):
                if isinstance(result, Exception):
                    report(f"{workload.family} {changed(config, rule)}: {result}")
                found.append(None if isinstance(result, Exception) else 1e6 * sum(each.time for each in result))
            return found

        return asked, code, times

    return start


def tune(
    workloads: list[Workload],
    table: dict,
    path: Path,
    start: Callable,
    source: str,
    report: Callable = lambda line: None,
) -> int:
    """Add a row to ``table``, and save it in ``path``, for each workload whose bucket it lacks; how many were added.

    start(workload, report) returns what ``measured`` and ``simulated`` do: (what ``tables.watch`` saw, ``code_of`` the
    kernels, a function of configurations and the rule's one that returns their microseconds). Rows: {"family", "key",
    "config" (fields that differ from the rule's), "us", "rule_us", "workload", "source", "code"}. Measured rows take
    the place of simulated ones, never the reverse; a row of other kernels than today's is named and, unless only a
    measurement could replace it, searched again.
    """
    known = {}
    for row in table["rows"]:
        if tables.source_of(row) == "measured" or (row["family"], row["key"]) not in known:
            known[row["family"], row["key"]] = row
    done, added = set(), 0
    for workload in workloads:
        asked, code, times = start(workload, report)
        asked = [(key, config) for family, key, config in asked if family == workload.family]
        if not asked:
            raise RuntimeError(f"{workload.name} does not ask for a configuration of {workload.family}")
        key, rule = asked[0]
        if (workload.family, key) in done:
            continue
        done.add((workload.family, key))
        if (row := known.get((workload.family, key))) is not None:
            stale = row.get("code") not in (None, code)
            if stale:
                report(f"{workload.family} {key}: {tables.source_of(row)} with other kernels than today's")
            if tables.source_of(row) == "measured" and source == "simulated":
                continue
            if tables.source_of(row) == source and not stale:
                continue
        best, time, rule_time = climb(
            workload.family, rule, lambda configs, times=times, rule=rule: times(configs, rule), GAIN[source]
        )
        row = {
            "family": workload.family,
            "key": key,
            "config": changed(best, rule),
            "us": round(time, 2),
            "rule_us": round(rule_time, 2),
            "workload": workload.name,
            "source": source,
            "code": code,
        }
        table["rows"] = [other for other in table["rows"] if (other["family"], other["key"]) != (workload.family, key)]
        table["rows"].append(row)
        tables.write(path, table)
        added += 1
        report(f"{workload.name}: {rule_time:.1f} -> {time:.1f} us {row['config']}")
    return added


def _random(device, *shape, dtype=torch.float32):
    return torch.randn(shape, device=device).to(dtype)


def block_workloads(
    dtype: torch.dtype,
    batch: int,
    inputs: int,
    outputs: int,
    k: int,
    stride: int,
    ratio: float,
    size: int,
    device: torch.device | None = None,
) -> list[Workload]:
    """Every launcher with a tunable family that one MBConv block calls on a device: this GPU, or ``meta``."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "meta")
    E, out_size = round(inputs * ratio), -(-size // stride)
    e1, e2 = (batch, size, size, E), (batch, out_size, out_size, E)
    pads = ((k - 1) // 2,) * 4
    name = f"{inputs}-{E}-{outputs} k{k} s{stride} {size}px x{batch} {str(dtype).removeprefix('torch.')}"

    def batch_norm(device, C):
        from effkernels.kernels.norm import BatchNorm

        return BatchNorm(_random(device, C), _random(device, C), _random(device, C), torch.rand(C, device=device) + 0.5)

    def depthwise_forward(device):
        from effkernels.kernels.depthwise_forward import depthwise_forward as launch

        x, w = _random(device, *e1, dtype=dtype), _random(device, E, 1, k, k)
        how = {"prologue": batch_norm(device, E), "act1": "silu"} if ratio > 1 else {}
        return lambda: (launch(x, w, stride, pads, partial_statistics=True, **how)[0],)

    def depthwise_backward(device):
        from effkernels.kernels.depthwise_backward import depthwise_backward as launch

        dq, y, x = (_random(device, *shape, dtype=dtype) for shape in (e2, e2, e1))
        w, gates, dpool = _random(device, E, 1, k, k), torch.rand(batch, E, device=device), _random(device, batch, E)
        how = {
            "norm2": batch_norm(device, E),
            "y2": y,
            "terms2": (_random(device, E), _random(device, E)),
            "act2": "silu",
        }
        how |= {"gates": gates, "dpool": dpool} | (
            {"norm1": batch_norm(device, E), "act1": "silu"} if ratio > 1 else {}
        )

        def call():
            dx, partials, *_ = launch(dq=dq, x=x, weight=w, stride=stride, pads=pads, **how)
            return dx, partials[:, : k * k].sum(0)

        return call

    def expand(device):
        from effkernels.kernels.pointwise_forward import pointwise_forward
        from effkernels.kernels.weight_copies import forward_weights

        x = _random(device, batch, size, size, inputs, dtype=dtype)
        (w,) = forward_weights([(_random(device, E, inputs, 1, 1), batch * size * size, False)], dtype)
        return lambda: (pointwise_forward(x, w, partial_statistics=True)[0],)

    def project(device):
        from effkernels.kernels.pointwise_forward import pointwise_forward
        from effkernels.kernels.weight_copies import forward_weights

        x, gates = _random(device, *e2, dtype=dtype), torch.rand(batch, E, device=device)
        (w,) = forward_weights([(_random(device, outputs, E, 1, 1), x[..., 0].numel(), True)], dtype)
        how = {"prologue": batch_norm(device, E), "act1": "silu", "gates": gates}
        return lambda: (pointwise_forward(x, w, partial_statistics=True, **how)[0],)

    def project_backward(device):
        from effkernels.kernels import project_backward

        dout, y3 = (_random(device, *e2[:3], outputs, dtype=dtype) for _ in range(2))
        y2, w, gates = (
            _random(device, *e2, dtype=dtype),
            _random(device, outputs, E, 1, 1),
            torch.rand(batch, E, device=device),
        )
        terms = _random(device, outputs), _random(device, outputs)
        how = {
            "norm3": batch_norm(device, outputs),
            "terms3": terms,
            "norm2": batch_norm(device, E),
            "act": "silu",
            "gates": gates,
        }

        def call():
            dq, sums, partials = project_backward.project_backward(dout, y3, y2, w, **how)
            return dq, sums.sum(1), partials.sum(0)

        return call

    def expand_pass(device, **needs):
        from effkernels.kernels.expand_backward import expand_backward

        dz, x, w = (_random(device, *shape, dtype=dtype) for shape in (e1, (*e1[:3], inputs), (E, inputs)))
        how = {"norm1": batch_norm(device, E), "terms1": (_random(device, E), _random(device, E))}

        def call():
            dx, *partials = expand_backward(dz, x, w, **how, **needs)
            return (*(() if dx is None else (dx,)), *(t.sum(0) for t in partials if t is not None))

        return call

    def expand_data(device):
        return expand_pass(device, need_dw=False)

    def expand_weight(device):
        return expand_pass(device, need_dx=False)

    def elementwise(device):
        from effkernels.kernels import batchnorm

        y, residual = (_random(device, *e2[:3], outputs, dtype=dtype) for _ in range(2))
        norm = batch_norm(device, outputs)
        return lambda: (batchnorm.apply(y, norm, residual=residual),)

    def reduction(device):
        from effkernels.kernels import batchnorm

        dout, y = (_random(device, *e2[:3], outputs, dtype=dtype) for _ in range(2))
        norm, counters = batch_norm(device, outputs), torch.zeros(outputs, dtype=torch.int32, device=device)
        return lambda: batchnorm.gradient_reduce(dout, y, norm, counters=counters)[:2]

    def gradient_sums(device):
        from effkernels.kernels import batchnorm

        dq, y2 = (_random(device, *e2, dtype=dtype) for _ in range(2))
        how = {"act": "silu", "gates": torch.rand(batch, E, device=device), "for_gate": True, "activated": True}
        norm = batch_norm(device, E)

        def call():
            sums, q = batchnorm.gradient_sums(dq, y2, norm, **how)
            return sums.sum(1), q

        return call

    made = [("depthwise_forward", depthwise_forward), ("elementwise", elementwise)]
    if not product_is_apart(K=E, N=outputs, rows=batch * out_size**2, transforms=True, dtype=dtype):
        made.append(("pointwise_forward", project))
    made += [("reduction", reduction), ("depthwise_backward", depthwise_backward)]
    fused = project_backward_is_fused(outputs, dtype, "silu")
    made.append(("project_both", project_backward) if fused else ("gradient_sums", gradient_sums))
    if ratio > 1:
        if not product_is_apart(K=inputs, N=E, rows=batch * size**2, transforms=False, dtype=dtype):
            made.append(("pointwise_forward", expand))
        split = [expand_data] if expand_weight_is_apart(inputs, dtype) else [expand_data, expand_weight]
        forms = {"pass": [expand_pass], "split": split, "library": []}
        made += [(build.__name__, build) for build in forms[expand_backward_form(E, inputs, dtype, device)]]
    return [Workload(f"{build.__name__} {name}", family, build) for family, build in made]


def workloads(
    widths: Iterable[float], dtypes: Iterable[torch.dtype], batches: Iterable[int], device: torch.device | None = None
) -> list[Workload]:
    """Those of every different block of the networks of these width coefficients, as ``block_workloads`` has them."""
    from effkernels.tools.shipped import family_blocks

    found = {}
    for width in widths:
        for block in family_blocks(width):
            for dtype in dtypes:
                for batch in batches:
                    found |= {(w.family, w.name): w for w in block_workloads(dtype, batch, *block, device)}
    return list(found.values())


def _microseconds(call) -> float:
    from triton.testing import do_bench

    return 1000 * do_bench(call, warmup=10, rep=50, return_mode="median")


def _table(path: Path, capability, gpu: str, source: str) -> dict:
    """The table in ``path``, or a new one. ValueError where rows measured on another GPU are in it."""
    import triton

    head = {"gpu": gpu, "capability": list(capability), "torch": torch.__version__, "triton": triton.__version__}
    if not path.exists():
        return head | {"rows": []}
    table = tables.read(path, capability)
    if any(tables.source_of(row) == "measured" for row in table["rows"]):
        if source == "measured" and table.get("gpu") != gpu:
            raise ValueError(f"{path} was measured on {table.get('gpu')}, this is {gpu}")
        return table
    return table | head


def main(argv: list[str] | None = None, predict: Callable | None = None) -> int:
    """predict: as ``simulated`` takes it; None: ``--simulate`` is not offered."""
    parser = argparse.ArgumentParser(
        prog="python -m effkernels.tune", description="Measure launch configurations on the present GPU."
    )
    parser.add_argument(
        "--output", type=Path, help="the table (default: EFFKERNELS_TABLE, or the package's own of this architecture)"
    )
    parser.add_argument(
        "--widths",
        type=float,
        nargs="+",
        default=[1.0],
        help="width coefficients of the networks (default: 1, B0 and B1; 1.1 to 2 are B2 to B7)",
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--batches", type=int, nargs="+", default=[128], help="images in a batch (default: 128)")
    parser.add_argument("--families", nargs="+", default=sorted(FIELDS), choices=sorted(FIELDS), help="default: all")
    if predict is not None:
        parser.add_argument("--simulate", action="store_true", help="predict instead of measuring; needs no GPU")
        parser.add_argument("--gpu", default="h200", choices=tuple(GPUS), help="with --simulate (default: h200)")
    args = parser.parse_args(argv)
    for name in ("widths", "batches"):
        if min(getattr(args, name)) <= 0:
            parser.error(f"--{name} must be above 0, got {min(getattr(args, name))}")
    simulates = predict is not None and args.simulate
    if not simulates and not torch.cuda.is_available():
        also = "; --simulate predicts without one" if predict is not None else ""
        print(f"python -m effkernels.tune: no CUDA GPU here, and tuning measures on one{also}", file=sys.stderr)
        return 2
    if simulates:
        if os.environ.get("TRITON_INTERPRET"):
            parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
        device, source, start = torch.device("meta"), "simulated", simulated(args.gpu, predict)
        capability, gpu = GPUS[args.gpu].capability, GPUS[args.gpu].name
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        source, start = "measured", measured(device, _microseconds)
        capability, gpu = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    path = args.output or tables.default_path(capability)
    try:
        table = _table(path, capability, gpu, source)
    except ValueError as error:
        print(f"python -m effkernels.tune: {error}", file=sys.stderr)
        return 2
    with tables.meta_is(GPUS[args.gpu]) if simulates else contextlib.nullcontext():
        todo = workloads(args.widths, [getattr(torch, name) for name in args.dtypes], args.batches, device)
    todo = [workload for workload in todo if workload.family in args.families]
    try:
        from tqdm import tqdm
    except ImportError:
        progress, say = todo, print
    else:
        progress = tqdm(todo, unit="shape", disable=None)
        say = progress.write
    added = tune(workloads=progress, table=table, path=path, start=start, source=source, report=say)
    faster = [row["rule_us"] / row["us"] for row in table["rows"] if row["config"]]
    best = f", up to {max(faster):.2f} times as fast" if faster else ""
    how = ", predicted, not measured" if simulates else ""
    print(f"{path}: {added} rows added, {len(table['rows'])} in all; {len(faster)} beat the rule{best}{how}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
