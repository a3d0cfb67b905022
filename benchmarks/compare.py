"""Two results, side by side; a slower or costlier one fails.

``python -m benchmarks.compare OLD.json NEW.json`` takes two files of ``--benchmark-json`` and compares the medians of
the rows that both have, or two tables of static costs. ``python -m benchmarks.compare --static`` compares the present
tree with benchmarks/static.json, without a GPU; ``--static --update`` makes the present tree the new baseline.

The exit code is 0 where nothing is worse, 1 where something is, and 2 for bad input.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks import static

THRESHOLD = 0.1  # of a time: the medians of one version differ by less on a quiet GPU
# Growth that a static figure may have: launches and spills none, bytes half a percent, registers and instructions what
# a new compiler may cost.
TOLERANCES = {"launches": 0.0, "spills": 0.0, "bytes_per_image": 0.005, "read": 0.005, "written": 0.005}
TOLERANCES |= {"registers": 0.1, "instructions": 0.1, "predicted_ms": 0.03, "predicted_us": 0.03}


class Change(NamedTuple):
    """A figure that changed, from ``old`` to ``new``."""

    name: str
    old: float
    new: float
    worse: bool

    def __str__(self):
        percent = f"{100 * (self.new / self.old - 1):+.1f} %" if self.old else "was 0"
        return f"{'worse' if self.worse else 'better':6}  {self.name}: {self.old:.6g} -> {self.new:.6g} ({percent})"


def static_changes(old: dict, new: dict) -> tuple[list[Change], list[str]]:
    """(figures that changed, entries that only one side has) of two tables of static costs; whatever is lower is
    better.
    """
    changes, alone = [], []
    for section in ("networks", "blocks", "kept", "counted", "machine code", "predicted"):
        before, after = old.get(section, {}), new.get(section, {})
        alone += [
            f"{section}: {key} {'is gone' if key in before else 'is new'}" for key in sorted(set(before) ^ set(after))
        ]
        for key in before:
            for field, allowed in TOLERANCES.items():
                if key in after and field in before[key] and before[key][field] != after[key][field]:
                    a, b = before[key][field], after[key][field]
                    changes.append(Change(f"{section}: {key}: {field}", a, b, b > a * (1 + allowed)))
    return changes, alone


def timed_rows(document: dict) -> dict[str, dict]:
    """{name: extra_info} of the measured rows of a --benchmark-json document."""
    return {
        row["fullname"]: row["extra_info"] for row in document["benchmarks"] if "median_ms" in row.get("extra_info", {})
    }


def timed_changes(old: dict, new: dict, threshold: float) -> tuple[list[Change], list[str]]:
    """(medians and peaks that changed by more than ``threshold``, rows that only one side has).

    Raises ValueError where rows of one name ran on different devices, dtypes or batches: their ratio means nothing.
    """
    before, after = timed_rows(old), timed_rows(new)
    changes, alone = (
        [],
        [f"{name} {'is gone' if name in before else 'is new'}" for name in sorted(set(before) ^ set(after))],
    )
    for name in before:
        if name not in after:
            continue
        for field in ("device", "dtype", "batch_size"):
            a, b = before[name].get(field), after[name].get(field)
            if a != b:
                raise ValueError(f"{name}: {field} is {a!r} in the old file and {b!r} in the new one")
        for field in ("median_ms", "peak_memory_mb"):
            a, b = before[name].get(field), after[name].get(field)
            if a and b and not 1 / (1 + threshold) <= b / a <= 1 + threshold:
                changes.append(Change(f"{name}: {field}", a, b, b > a))
    return changes, alone


def compare(old: dict, new: dict, threshold: float = THRESHOLD) -> tuple[list[Change], list[str]]:
    """``static_changes`` or ``timed_changes``. Raises ValueError if the two are not of one kind, or share no row."""
    kinds = [document.get("kind", "timed" if "benchmarks" in document else None) for document in (old, new)]
    if kinds == ["static", "static"]:
        return static_changes(old, new)
    if kinds != ["timed", "timed"]:
        raise ValueError("both files must be of --benchmark-json, or both tables of static costs")
    if not set(timed_rows(old)) & set(timed_rows(new)):
        raise ValueError("the two files share no measured row")
    return timed_changes(old, new, threshold)


def _read(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds no results")
    return document


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description="Fail if NEW is slower or costlier than OLD."
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="JSON", help="OLD.json NEW.json")
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="growth of a median that fails (default: %(default)s)"
    )
    parser.add_argument("--static", action="store_true", help="compare the present tree with benchmarks/static.json")
    parser.add_argument("--update", action="store_true", help="with --static: accept the present tree")
    parser.add_argument(
        "--predict",
        choices=("none", "changed", "all", *static.PREDICTED_MODELS),
        help="with --static: steps to predict again where launches changed: of those accepted (default), of all, or "
        "of one model; after an interruption the same command goes on",
    )
    parser.add_argument(
        "--baseline", type=Path, default=static.BASELINE, help="with --static: another file than benchmarks/static.json"
    )
    args = parser.parse_args(argv)
    if args.static == bool(args.files) or (args.files and len(args.files) != 2):
        parser.error("give OLD.json and NEW.json, or --static")
    for name in ("update", "predict"):
        if getattr(args, name) and not args.static:
            parser.error(f"--{name} goes with --static")
    if args.threshold < 0:
        parser.error(f"--threshold must be at least 0, got {args.threshold}")
    try:
        if args.static:
            old = static.read(args.baseline) if args.baseline.exists() or not args.update else {"kind": "static"}

            def keep(predicted: dict) -> None:
                if args.update:  # an interrupted run has accepted the steps that it predicted
                    static.write(old | {"predicted": predicted}, args.baseline)

            new = static.measure(old, args.predict or "changed", keep)
        else:
            old, new = (_read(path) for path in args.files)
        changes, alone = compare(old, new, args.threshold)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"python -m benchmarks.compare: {error}", file=sys.stderr)
        return 2
    print(*alone, *changes, sep="\n", end="\n" if alone or changes else "")
    if args.update:
        static.write(new, args.baseline)
        print(f"{args.baseline}: accepted, {len(changes)} figures changed")
        return 0
    worse = [change for change in changes if change.worse]
    gone = [line for line in alone if line.endswith("is gone")] if args.static else []
    if worse or gone:
        how = "; accept with python -m benchmarks.compare --static --update" if args.static else ""
        print(f"{len(worse)} figures are worse, {len(gone)} entries are gone{how}")
        return 1
    print("nothing is worse")
    return 0


if __name__ == "__main__":
    sys.exit(main())
