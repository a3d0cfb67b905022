"""Measures launch configurations on the present GPU and writes the table that overrides the rules of configs/rules.py
there.

``python -m effkernels.tune`` takes each kernel family at the shapes of an EfficientNet's blocks, starts from the rule's
configuration and moves to the fastest neighbour until none is faster. A configuration whose results differ from the
rule's, or that does not compile, is passed over. The table is saved after each shape, and what it already holds is not
measured again, so a run that was interrupted goes on. Nothing else in the package measures; see effkernels/configs for
how a table is found.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from effkernels.configs import tables
from effkernels.configs.rules import expand_backward_form, project_backward_is_fused

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
GAIN = 0.98  # a configuration is faster if it takes at most this share of the time: less is noise
MOST = 60  # configurations measured for one shape


@dataclass(frozen=True)
class Workload:
    """One launcher at one shape: ``build(device)`` allocates its arguments and returns the call, which returns what to
    compare."""

    name: str
    family: str
    build: Callable


def neighbours(family: str, config) -> list:
    """Configurations that differ from ``config`` in one field, by one step."""
    found = []
    for field, values in FIELDS[family].items():
        value = getattr(config, field)
        below, above = [v for v in values if v < value], [v for v in values if v > value]
        found += [dataclasses.replace(config, **{field: v}) for v in (*below[-1:], *above[:1])]
    return found


def climb(family: str, start, measure: Callable):
    """(fastest configuration, its time, the start's time): steps to the fastest neighbour as long as one is faster.

    measure(config) returns a time, or None for a configuration that cannot be used.
    """
    times = {start: measure(start)}
    if times[start] is None:
        raise RuntimeError(f"the rule's own configuration of {family} cannot run: {start}")
    best = start
    while len(times) < MOST:
        for config in neighbours(family, best):
            if config not in times and len(times) < MOST:
                times[config] = measure(config)
        usable = [config for config in neighbours(family, best) if times.get(config) is not None]
        fastest = min(usable, key=times.get, default=best)
        if times[fastest] >= GAIN * times[best]:
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


def changed(config, start) -> dict:
    """Fields of ``config`` that differ from ``start``."""
    return {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != getattr(start, f.name)
    }


def tune(workloads, table: dict, path: Path, device, timer: Callable, report: Callable = lambda line: None) -> int:
    """Add a row to ``table``, and save it in ``path``, for each workload whose bucket it lacks; how many were added.

    timer(call) returns microseconds. Rows: {"family", "key", "config" (fields that differ from the rule's), "us",
    "rule_us", "workload"}.
    """
    known = {(row["family"], row["key"]) for row in table["rows"]}
    added = 0
    for workload in workloads:
        with tables.rules_only():
            call = workload.build(device)
            with tables.watch() as asked:
                expected = call()
        asked = [(key, config) for family, key, config in asked if family == workload.family]
        if not asked:
            raise RuntimeError(f"{workload.name} does not ask for a configuration of {workload.family}")
        key, start = asked[0]
        if (workload.family, key) in known:
            continue

        def measure(config, call=call, expected=expected, start=start, family=workload.family):
            with tables.override(family, **changed(config, start)):
                try:
                    # Sums in another order: the results of one dtype agree to a few of its roundings.
                    if _difference(call(), expected) > (1e-2 if expected[0].element_size() == 2 else 1e-4):
                        return None
                    return timer(call)
                except Exception as error:  # whatever the compiler or the launch has against this one configuration
                    report(f"{family} {changed(config, start)}: {type(error).__name__}")
                    return None

        best, time, rule_time = climb(workload.family, start, measure)
        row = {
            "family": workload.family,
            "key": key,
            "config": changed(best, start),
            "us": round(time, 2),
            "rule_us": round(rule_time, 2),
        }
        table["rows"].append(row | {"workload": workload.name})
        tables.write(path, table)
        known.add((workload.family, key))
        added += 1
        report(f"{workload.name}: {rule_time:.1f} -> {time:.1f} us {row['config']}")
    return added


def _random(device, *shape, dtype=torch.float32):
    return torch.randn(shape, device=device).to(dtype)


def block_workloads(dtype, batch, inputs, outputs, k, stride, ratio, size) -> list[Workload]:
    """Every launcher with a tunable family that one MBConv block calls."""
    E, out_size = round(inputs * ratio), -(-size // stride)
    e1, e2 = (batch, size, size, E), (batch, out_size, out_size, E)
    pads = ((k - 1) // 2,) * 4
    name = f"{inputs}-{E}-{outputs} k{k} s{stride} {size}px x{batch} {str(dtype).removeprefix('torch.')}"

    def batch_norm(device, C):
        from effkernels.kernels.norm import BatchNorm

        return BatchNorm(_random(device, C), _random(device, C), _random(device, C), torch.rand(C, device=device) + 0.5)

    def depthwise_forward(device):
        from effkernels.kernels import depthwise

        x, w = _random(device, *e1, dtype=dtype), _random(device, E, 1, k, k)
        how = {"prologue": batch_norm(device, E), "act1": "silu"} if ratio > 1 else {}
        return lambda: (depthwise.depthwise_forward(x, w, stride, pads, partial_statistics=True, **how)[0],)

    def depthwise_backward(device):
        from effkernels.kernels import depthwise

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
            dx, partials, *_ = depthwise.depthwise_backward(dq, x, w, stride, pads, **how)
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

    made = [("depthwise_forward", depthwise_forward), ("pointwise_forward", project), ("elementwise", elementwise)]
    made += [("reduction", reduction), ("depthwise_backward", depthwise_backward)]
    fused = project_backward_is_fused(outputs, dtype, "silu")
    made.append(("project_both", project_backward) if fused else ("gradient_sums", gradient_sums))
    if ratio > 1:
        made.append(("pointwise_forward", expand))
        forms = {"pass": [expand_pass], "split": [expand_data, expand_weight], "library": []}
        device = torch.device("cuda" if torch.cuda.is_available() else "meta")
        made += [(build.__name__, build) for build in forms[expand_backward_form(E, inputs, dtype, device)]]
    return [Workload(f"{build.__name__} {name}", family, build) for family, build in made]


def workloads(widths, dtypes, batches) -> list[Workload]:
    """Those of every different block of the networks of these width coefficients."""
    from effkernels.tools.shipped import family_blocks

    found = {}
    for width in widths:
        for block in family_blocks(width):
            for dtype in dtypes:
                for batch in batches:
                    found |= {(w.family, w.name): w for w in block_workloads(dtype, batch, *block)}
    return list(found.values())


def _microseconds(call) -> float:
    from triton.testing import do_bench

    return 1000 * do_bench(call, warmup=10, rep=50, return_mode="median")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m effkernels.tune", description="Measure launch configurations on the present GPU."
    )
    parser.add_argument(
        "--output", type=Path, help="the table (default: EFFKERNELS_TABLE, or the package's own of this architecture)"
    )
    parser.add_argument(
        "--widths", type=float, nargs="+", default=[1.0], help="width coefficients of the networks (default: 1, B0)"
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--batches", type=int, nargs="+", default=[128], help="images in a batch (default: 128)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("python -m effkernels.tune: no CUDA GPU here, and tuning measures on one", file=sys.stderr)
        return 2
    import triton

    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    path = args.output or tables.default_path(capability)
    gpu = torch.cuda.get_device_name(device)
    table = {
        "gpu": gpu,
        "capability": list(capability),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": [],
    }
    if path.exists():
        table = tables.read(path, capability)
        if table.get("gpu") != gpu:
            print(
                f"python -m effkernels.tune: {path} was measured on {table.get('gpu')}, this is {gpu}", file=sys.stderr
            )
            return 2
    todo = workloads(args.widths, [getattr(torch, name) for name in args.dtypes], args.batches)
    try:
        from tqdm import tqdm
    except ImportError:
        progress, say = todo, print
    else:
        progress = tqdm(todo, unit="shape", disable=None)
        say = progress.write
    added = tune(progress, table, path, device, _microseconds, say)
    faster = [row["rule_us"] / row["us"] for row in table["rows"] if row["config"]]
    best = f", up to {max(faster):.2f} times as fast" if faster else ""
    print(f"{path}: {added} rows added, {len(table['rows'])} in all; {len(faster)} beat the rule{best}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
