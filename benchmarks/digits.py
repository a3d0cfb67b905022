"""The trainings of B0 on scikit-learn's digits that the README and docs/weights.md report: ``python -m
benchmarks.digits``.

Each run is a process of its own, so its CPU time is all that it took, imports included. The held-out accuracy is that
of the last epoch. ``seeds`` in the file are trainings on all digits. ``transfer`` has {trunk, trained layers: accuracy}
of the digits 5 to 9 with frozen running statistics, for which the random trunk is shown the digits 0 to 4 first.
``classifier`` has {trunk: accuracy} of a classifier on frozen weights, whose statistics follow the digits 5 to 9.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

from efficientnet.measure.timing import versions

RESULTS = Path(__file__).parent / "results" / "digits.json"
COMMAND = ("-m", "efficientnet", "train", "--data")
STATISTICS_ALONE = ("--lr", "1e-20", "--weight-decay", "0", "--bn-momentum", "0.1", "--epochs", "4")


def run(seed: int, output: str, data: str, *options) -> dict:
    """{"accuracy", "epochs", "cpu_s"} of one training. Raises RuntimeError with its output if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, *COMMAND, data, *options, "--seed", str(seed), "--output", output]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    rows = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"accuracy": rows[-1]["val_acc"], "epochs": len(rows), "cpu_s": round(cpu, 1)}


def plain(seed: int) -> dict:
    """One training on all digits."""
    with tempfile.TemporaryDirectory() as folder:
        return run(seed, folder, "digits")


def transfer(seed: int) -> dict:
    """{"digits 0 to 4, until 3": accuracy, ...} of trunks that were trained on five digits or not, frozen as far as
    that.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for trunk, options in (("digits 0 to 4", ()), ("random", STATISTICS_ALONE)):
            run(seed, f"{folder}/{trunk}", "digits:0-4", *options)
            weights = (
                f"{folder}/{trunk}/last.safetensors" if trunk == "random" else f"{folder}/{trunk}/best.safetensors"
            )
            for until in ("3", "head"):
                how = ("--pretrained", weights, "--freeze-until", until)
                found[f"{trunk}, until {until}"] = run(seed, f"{folder}/{trunk} {until}", "digits:5-9", *how)[
                    "accuracy"
                ]
    return found


def classifier(seed: int) -> dict:
    """{"digits 0 to 4": accuracy, "random": ...} of the digits 5 to 9.

    The weights of the trunk stay as the digits 0 to 4, or chance, left them.
    """
    options = ("--freeze-until", "head", "--freeze-bn", "weights", "--drop", "0", "--drop-path", "0")
    with tempfile.TemporaryDirectory() as folder:
        run(seed, f"{folder}/low", "digits:0-4")
        trunks = {"digits 0 to 4": ("--pretrained", f"{folder}/low/best.safetensors"), "random": ()}
        return {
            trunk: run(seed, f"{folder}/{trunk}", "digits:5-9", *more, *options)["accuracy"]
            for trunk, more in trunks.items()
        }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.digits", description="Trains B0 on digits, as the README does."
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs on all digits, of seeds 0, 1, ... (default: 5)")
    parser.add_argument("--transfer-seeds", type=int, default=2, help="runs from digits 0 to 4 to 5 to 9 (default: 2)")
    parser.add_argument("--classifier-seeds", type=int, default=3, help="the same with a classifier alone (default: 3)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file to write (default: %(default)s)")
    args = parser.parse_args(argv)
    table = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    table |= {"kind": "digits", "command": " ".join(("python", *COMMAND, "digits --seed S"))}
    table |= {"date": datetime.now(timezone.utc).date().isoformat(), "versions": versions(torch.device("cpu"))}
    parts = {
        "seeds": (plain, args.seeds),
        "transfer": (transfer, args.transfer_seeds),
        "classifier": (classifier, args.classifier_seeds),
    }
    for name, (one, seeds) in parts.items():
        if seeds:  # 0 leaves what the file has
            table[name] = {str(seed): one(seed) for seed in tqdm(range(seeds), desc=name, unit="seed")}
    args.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
