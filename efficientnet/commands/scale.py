"""``efficientnet scale``."""

import argparse
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from efficientnet.choices import DEVICES
from efficientnet.commands.common import checking_input, print_stages, print_table
from efficientnet.model.scaling import COEFFICIENTS, check_count
from efficientnet.scaling_study.table3 import TABLE_3

if TYPE_CHECKING:
    from efficientnet.scaling_study.search import Search, SearchConfig

SUMMARY = (
    "Compound scaling: the network of a phi or a budget; the search for alpha, beta and gamma; the paper's other "
    "networks."
)
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
PHI_MAX = 16.0  # 1.92^16 is 34,000 times the cost of B0


def amount(text: str) -> float:
    """A positive number with a unit: 400M, 1.8G, 4.2e9 (B is G)."""
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)([KMGBT]?)", text, re.IGNORECASE)
    try:
        value = float(match[1]) * UNITS[match[2].upper()]
    except (TypeError, ValueError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number > 0 such as 400M, 1.8G or 4.2e9, got {text!r}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--phi", type=float, help="depth alpha^phi, width beta^phi, resolution gamma^phi")
    target.add_argument(
        "--flops", type=amount, help="the largest network of at most so many multiply-accumulates (400M, 1.8G, 4.2e9)"
    )
    target.add_argument("--params", type=amount, help="the largest network of at most so many parameters (8M)")
    target.add_argument(
        "--latency", type=float, metavar="MS", help="the largest network of at most so many measured milliseconds"
    )
    target.add_argument(
        "--search", action="store_true", help="the grid search for alpha, beta and gamma at phi 1, kept in --output"
    )
    parser.add_argument(
        "--base", default="efficientnet_b0", help="efficientnet_b0, mobilenet_v1, mobilenet_v2 or resnet50"
    )
    for name, default in zip(("alpha", "beta", "gamma"), COEFFICIENTS, strict=True):
        parser.add_argument(f"--{name}", type=float, default=default, help="(default: %(default)s, the paper's)")
    parser.add_argument(
        "--img-size", type=int, help="pixels of the unscaled network (default: 224; 32 to search on digits)"
    )
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument(
        "--batch-size", type=int, help="images of a timed forward (default: 1), or of a training step (default: 64)"
    )
    parser.add_argument("--device", default="auto", choices=DEVICES, help="for --latency and --search")

    search = parser.add_argument_group(
        "search", "what is not given takes the defaults of efficientnet.scaling_study.search.SearchConfig"
    )
    search.add_argument(
        "--output", default="scale.json", help="results; the same command continues a search (default: %(default)s)"
    )
    search.add_argument("--objective", help="accuracy, latency or macs (default: accuracy with --data, else latency)")
    search.add_argument("--step", type=float, help="of the grid of alpha, beta and gamma (default: 0.05)")
    search.add_argument("--at-least", type=float, help="lower limit of alpha * beta^2 * gamma^2 (default: 1.9)")
    search.add_argument("--at-most", type=float, help="upper limit (default: 2.0)")
    search.add_argument("--data", help="'digits' or 'imagefolder:PATH', to train every candidate on")
    search.add_argument("--epochs", type=int, help="of each training (default: 3)")
    search.add_argument("--lr", type=float, help="peak learning rate (default: as train)")
    search.add_argument("--seed", type=int, help="of weights, order and augmentation (default: 0)")
    search.add_argument("--amp", help="autocast, as train")
    search.add_argument("--val-fraction", type=float, help="share of each class to hold out (default: as train)")
    search.add_argument("--num-workers", type=int, help="processes that load images (default: 0)")


def run(args: argparse.Namespace) -> None:
    from efficientnet.scaling_study.networks import BASES

    with checking_input():
        if args.base not in BASES:
            raise ValueError(f"base must be one of {', '.join(BASES)}, got {args.base!r}")
        if args.data is not None and not args.search:
            raise ValueError("data is for --search")
        if args.search:
            search = prepare_search(args)
        elif any(target is not None for target in (args.phi, args.flops, args.params, args.latency)):
            print_scaled(args)
            return
        elif args.base in TABLE_3:
            print_paper(args.base)
            return
        else:
            raise ValueError("scale needs one of --phi, --flops, --params, --latency, --search")
    print_search(search.config, search.run())
    print(f"results  {args.output}")


def prepare_search(args: argparse.Namespace) -> "Search":
    """The search that the options describe."""
    from dataclasses import fields

    from efficientnet.scaling_study.search import Search, SearchConfig

    given = {field.name: getattr(args, field.name) for field in fields(SearchConfig)}
    return Search(SearchConfig(**{name: value for name, value in given.items() if value is not None}), args.output)


def print_search(config: "SearchConfig", rows: list[dict], top: int = 10) -> None:
    """Print the best candidates, and the paper's among them."""
    shown = {"accuracy": ("accuracy", "loss"), "latency": ("ms", "ms_per_gmac"), "macs": ("macs_of_base",)}[
        config.objective
    ]
    names = ("alpha", "beta", "gamma")
    table = [("rank", *names, "product", "resolution", "parameters", "MACs", *shown)]
    for rank, row in enumerate(rows, start=1):
        paper = all(abs(row[name] - value) < 1e-9 for name, value in zip(names, COEFFICIENTS, strict=True))
        if rank <= top or paper:
            figures = (f"{row[name]:.4g}" for name in ("product", "resolution"))
            counts = f"{row['parameters']:,}", f"{row['macs']:,}"
            table.append(
                (
                    f"{rank}{' (paper)' if paper else ''}",
                    *(row[n] for n in names),
                    *figures,
                    *counts,
                    *(f"{row[n]:.4f}" for n in shown),
                )
            )
    print_table(table, left=(0,))
    best = " ".join(f"--{name} {rows[0][name]:g}" for name in names)
    print(f"\n{len(rows)} candidates; the best as options of scale: {best}")


def print_scaled(args: argparse.Namespace) -> None:
    """Print the network of a phi, or the largest one of a budget."""
    from efficientnet.model.profile import count_macs, count_parameters, stage_table
    from efficientnet.model.scaling import Scaling, compound_scale, largest_phi
    from efficientnet.scaling_study.networks import create_scaled

    img_size = 224 if args.img_size is None else args.img_size

    def scaling_at(phi):
        depth, width, resolution = compound_scale(
            phi=phi, alpha=args.alpha, beta=args.beta, gamma=args.gamma, base_resolution=img_size
        )
        return Scaling(round(depth, 4), round(width, 4), resolution)  # as the name says it

    def build(phi, fused=False, device="meta"):
        return create_scaled(args.base, scaling_at(phi), num_classes=args.num_classes, fused=fused, device=device)

    def fit(option, budget, unit, cost, step=0.01):
        phi = largest_phi(cost, budget, step, PHI_MAX)
        if phi is None:
            raise ValueError(f"{option} {budget:g} is less than the {cost(0.0):,g} {unit} of the unscaled {args.base}")
        if phi == PHI_MAX:
            raise ValueError(f"{option} {budget:g} is more than any {args.base} up to phi {PHI_MAX:g} needs")
        return phi

    if args.phi is not None:
        phi = args.phi
        if not 0 <= phi <= PHI_MAX:
            raise ValueError(f"phi must be in [0, {PHI_MAX:g}], got {phi!r}")
    elif args.flops is not None:
        phi = fit("flops", args.flops, "multiply-accumulates", lambda phi: count_macs(build(phi)))
    elif args.params is not None:
        phi = fit("params", args.params, "parameters", lambda phi: count_parameters(build(phi)))
    else:
        measure = Stopwatch(args, lambda phi, device: (build(phi, True, device), scaling_at(phi).resolution))
        phi = fit("latency", args.latency, "ms", measure, step=0.05)

    model, scaling = build(phi), scaling_at(phi)
    size = scaling.resolution
    print_stages(stage_table(model))
    print(f"\n{args.base} at phi {phi:g}: depth {scaling.depth:g}, width {scaling.width:g}, resolution {size}")
    print(f"{count_parameters(model):,} parameters, {count_macs(model) / 1e9:.3f} GMACs at {size} x {size}")
    if args.latency is not None:
        print(measure.describe(phi))
    if args.base == "efficientnet_b0":
        print(f"a name for create_model and train: {model.config.name}")


class Stopwatch:
    """The milliseconds of a forward at a phi, measured once each: a cost for ``largest_phi``."""

    def __init__(self, args: argparse.Namespace, build: Callable):
        from efficientnet.devices import pick_device

        if not 0 < args.latency < float("inf"):
            raise ValueError(f"latency must be a finite number of milliseconds > 0, got {args.latency!r}")
        self.batch_size = 1 if args.batch_size is None else args.batch_size
        check_count("batch_size", self.batch_size)
        self.device, self.build, self.measured = pick_device(args.device), build, {}

    def __call__(self, phi: float) -> float:
        from tqdm import tqdm

        from efficientnet.measure.latency import measure_latency

        if phi not in self.measured:
            self.measured[phi] = measure_latency(*self.build(phi, self.device), self.device, self.batch_size)
            tqdm.write(f"phi {phi:<5g} {self.measured[phi].ms:10.2f} ms", file=sys.stderr)
        return self.measured[phi].ms

    def describe(self, phi: float) -> str:
        """What was measured at a phi, and on what."""
        from efficientnet.devices import describe_device

        ms, iqr = self.measured[phi]
        images = "image" if self.batch_size == 1 else "images"
        return (
            f"{ms:.2f} ms (interquartile range {iqr:.2f}) for {self.batch_size} {images} in fp32 on "
            f"{describe_device(self.device)}"
        )


def print_paper(base: str) -> None:
    """Print the paper's Table 3 beside what the definitions here come to."""
    from efficientnet.model.profile import count_macs, count_parameters
    from efficientnet.model.scaling import Scaling
    from efficientnet.scaling_study.networks import create_scaled

    table = [("scaled", "depth", "width", "resolution", "parameters", "GMACs", "paper's GMACs", "paper's top-1 (%)")]
    for row in TABLE_3[base]:
        size = round(224 * row.resolution)
        model = create_scaled(base, Scaling(row.depth, row.width, size), fused=False, device="meta")
        counts = f"{count_parameters(model):,}", f"{count_macs(model) / 1e9:.3f}"
        table.append((row.what, row.depth, row.width, f"{row.resolution} ({size})", *counts, row.gmacs, row.top1))
    print_table(table, left=(0,))
    print(
        "\nThe paper's: arXiv 1905.11946v5, Table 3. It gives no parameters, and multipliers of a compound row only for"
    )
    print("MobileNetV1; those are used for the other two as well.")
