"""``python -m benchmarks.digits``: trains B0 on scikit-learn's digits as the README does, with several seeds.

Each run is a process of its own, so its CPU time is all that it took, imports included. Held-out accuracy is the last epoch's.
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

from efficientnet.timing import versions

RESULTS = Path(__file__).parent / "results" / "digits.json"
COMMAND = ("-m", "efficientnet", "train", "--data", "digits")


def run(seed: int) -> dict:
    """{"accuracy", "epochs", "cpu_s"} of one training. Raises RuntimeError with its output if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, *COMMAND, "--seed", str(seed), "--output", folder]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"accuracy": rows[-1]["val_acc"], "epochs": len(rows), "cpu_s": round(cpu, 1)}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits", description="Trains B0 on digits, as the README does.")
    parser.add_argument("--seeds", type=int, default=5, help="runs, of seeds 0, 1, ... (default: 5)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file to write (default: %(default)s)")
    args = parser.parse_args(argv)
    table = {
        "kind": "digits",
        "command": " ".join(("python", *COMMAND, "--seed S")),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": versions(torch.device("cpu")),
        "seeds": {str(seed): run(seed) for seed in tqdm(range(args.seeds), unit="run")},
    }
    args.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
