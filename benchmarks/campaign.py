"""The suite within a time limit, most important rows first: ``python -m benchmarks.campaign --minutes N --out DIR``.

Rows that follow one another and share a network's case, or are a network's layers, run in a process of their own. It
writes each row into DIR/rows as soon as it is measured. The campaign watches the process, and ends it when a row takes
too long or the time is up; what is left goes on in another process, as it does when one dies. A row that is not
expected to fit into the remaining time is left out.

On a GPU the tests that need one come first, and after B0 and B4 every launch of B0 beside its predicted time.

The same command with the same DIR goes on: rows that were measured, failed or hung are not run again (``--retry`` runs
the latter two). ``python -m benchmarks.report DIR`` makes tables and plots of them.
"""

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from benchmarks import shapes
from benchmarks.rows import Row, rows_of

ROOT = Path(__file__).parents[1]
MUST = ("b0", "b4")
# Seconds before the end, in which a process is stopped and what became of its row is written.
MARGIN = 3.0
# Seconds that a process needs at most before its first row, for imports, copy bandwidth and float64 results.
START = 25.0
CORRECTNESS = 90.0  # seconds, at most, for the tests that need a GPU
# Steps of B0 whose launches are measured beside their predictions, with the simulator's constants fitted to them, and
# the seconds that one takes at most.
FITTED = ("train", "infer")
FITTING = 150.0
FITTING_END = 10.0  # of these, kept for the processes' end


class Job(NamedTuple):
    """One row: where pytest finds it, how long it is expected to take, in seconds, and its place in the order of
    ``_rank``."""

    node: str
    row: Row
    seconds: float
    group: int = 0

    @property
    def process(self) -> tuple:
        """Jobs for which this is equal may share a process.

        The variants of a network do, whose float64 results are the same, and the layers of a network, which are small.
        """
        share = self.row.case if isinstance(self.row.shape, shapes.Model) else (self.row.model, self.row.training)
        return self.node.partition("::")[0], share


def write(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _file(node: str) -> str:
    return re.sub(r"[^\w.-]+", "_", node.removeprefix("benchmarks/"))


def begin(folder: Path, node: str) -> None:
    """Say that this row is next. The measuring process calls it."""
    write(folder / "current", node)


def save_row(folder: Path, node: str, extra_info: dict) -> None:
    """Write a row that is measured, in the form of --benchmark-json. The measuring process calls it."""
    write(
        folder / "rows" / f"{_file(node)}.json",
        json.dumps({"benchmarks": [{"fullname": node, "extra_info": extra_info}]}, indent=1),
    )


def _seconds(row: Row, kind: str, gpu: bool) -> float:
    """The expected time of a row in seconds: a guess, on the safe side."""
    whole = isinstance(row.shape, shapes.Model)
    large = 1 + max(0, int(row.model[1]) - 4) / 3 if whole else 1
    if not gpu:
        return 15 if whole else 3
    if row.variant.compile_mode is None:
        return (10 if whole else 3) * large
    slow = 3 if row.variant.compile_mode == "max-autotune" else 1
    return (45 if whole else 15) * slow * (1.5 if row.training else 1) * large


def _rank(row: Row, kind: str) -> tuple:
    """What is measured first, as a key to sort by.

    It is B0 and B4 as whole networks, then their latency, their kernels and blocks, other modes of the compiler, and at
    last the other networks.
    """
    main = row.variant.library is None and row.variant.compile_mode in (None, "default")
    must = row.model in MUST
    group = {"model": 0, "latency": 1}.get(kind, 2)
    if not must:
        group = {"model": 4, "latency": 5}.get(kind, 6)
    elif not main:
        group = 3 if kind in ("model", "latency") else 6
    elif group == 2 and row.variant.compile_mode:
        group = 6
    if kind not in ("model", "latency"):
        return group, row.model, row.training, kind
    order = ("ours", "channels_last", "compile-default", "eager")
    name = row.variant.name
    return group, row.model, row.training, kind, order.index(name) if name in order else len(order)


def jobs(gpu: bool, only: str = "") -> list[Job]:
    """Every row that can be measured here and whose name matches the regular expression ``only``, the most important
    first.
    """
    found = []
    for path in sorted((ROOT / "benchmarks").glob("test_*.py")):
        module, kind = importlib.import_module(f"benchmarks.{path.stem}"), path.stem.removeprefix("test_")
        for row in rows_of(module):
            node = f"benchmarks/{path.name}::{path.stem}[{row}]"
            if re.search(only, node) and row.problem(SimpleNamespace(is_gpu=gpu)) is None:
                rank = _rank(row, kind)
                found.append((rank, Job(node, row, _seconds(row, kind, gpu), rank[0])))
    return [job for _, job in sorted(found, key=lambda ranked: ranked[0])]


class Campaign:
    """A campaign in ``folder`` that ends at ``deadline``, a value of time.monotonic.

    Args:
        command: ``command(nodes)`` is the command line of the process that measures these rows. None: pytest.
        say: is told what happens.
    """

    def __init__(
        self,
        folder: Path,
        deadline: float,
        command: Callable[[list[str]], list[str]] | None = None,
        say: Callable[[str], None] = print,
    ):
        self.folder, self.deadline, self.say = Path(folder), deadline, say
        self.command = command or self._pytest
        self.state_file = self.folder / "state.json"
        self.state: dict[str, str] = {}
        if self.state_file.exists():
            try:
                self.state = dict(json.loads(self.state_file.read_text(encoding="utf-8"))["rows"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.state_file} is not a campaign's state; remove it, or choose another folder"
                ) from error

    @property
    def remaining(self) -> float:
        """The seconds that are left."""
        return self.deadline - MARGIN - time.monotonic()

    def _pytest(self, nodes) -> list[str]:
        how = [
            "-q",
            "-p",
            "no:cacheprovider",
            "--benchmark-only",
            "--benchmark-columns=median",
            f"--save-rows={self.folder.resolve()}",
        ]
        return [sys.executable, "-m", "pytest", *how, *nodes]

    def _mark(self, node: str, what: str) -> None:
        self.state[node] = what
        write(self.state_file, json.dumps({"rows": self.state}, indent=1))

    def measured(self, node: str) -> bool:
        """Whether a row is in the folder."""
        return (self.folder / "rows" / f"{_file(node)}.json").exists()

    def run(self, todo: list[Job]) -> None:
        """Measure the rows in order, until all are done or the time is up."""
        todo = [job for job in todo if not self.measured(job.node) and job.node not in self.state]
        while todo:
            batch = self._next(todo)
            if not batch:
                self.say(f"{len(todo)} rows left: none fits into the remaining {max(0, self.remaining):.0f} s")
                return
            self._measure(batch)
            todo = [job for job in todo if not self.measured(job.node) and job.node not in self.state]

    def _next(self, todo: list[Job]) -> list[Job]:
        """The first row that fits, with those right after it that may share its process and fit too."""
        batch, left = [], self.remaining - START
        for job in todo:
            if batch and job.process != batch[0].process:
                break
            if job.seconds <= left:
                batch.append(job)
                left -= job.seconds
        return batch

    def _measure(self, batch: list[Job]) -> None:
        """One process for the rows of ``batch``. It is ended when a row takes five times what was expected, or the time
        is up.
        """
        nodes = [job.node for job in batch]
        limits = {job.node: 5 * job.seconds + 2 * START for job in batch}
        current = self.folder / "current"
        current.unlink(missing_ok=True)
        log = self.folder / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.say(
            f"{batch[0].node.split('[')[0]} {batch[0].row.case}: {', '.join(str(job.row.variant) for job in batch)}"
        )
        with log.open("a", encoding="utf-8") as out:
            environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
            process = subprocess.Popen(
                self.command(nodes),
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        seen, since, ended = "", time.monotonic(), ""
        try:
            while process.poll() is None:
                now = current.read_text(encoding="utf-8") if current.exists() else ""
                if now != seen:
                    seen, since = now, time.monotonic()
                if self.remaining <= 0:
                    ended = "the time is up"
                elif time.monotonic() - since > limits.get(seen, 3 * START):
                    ended = f"hung: took over {limits.get(seen, 3 * START):.0f} s"
                if ended:
                    break
                time.sleep(0.1)
        finally:
            _stop(process)
        seen = current.read_text(encoding="utf-8") if current.exists() else ""
        if not seen and not ended and not any(self.measured(node) for node in nodes):
            for node in nodes:  # not one row was begun: the process itself cannot run, and would not the next time
                self._mark(node, f"the process ended before it, with exit code {process.returncode}; see {log.name}")
            return
        if ended == "the time is up":
            return
        last = nodes.index(seen) if seen in nodes else 0
        for i, node in enumerate(nodes[: last + 1]):
            if not self.measured(node) and node not in self.state:
                died = process.returncode < 0 and i == last
                self._mark(
                    node,
                    ended or f"the process died with exit code {process.returncode}" if died else "failed; see log.txt",
                )
                self.say(f"  {node}: {self.state[node]}")

    def correctness(self) -> None:
        """Run the tests that need a GPU, once. What they said is in DIR/correctness.json."""
        path = self.folder / "correctness.json"
        if path.exists() or self.remaining < 2 * START:
            return
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/effkernels"]
        started = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            said, _ = process.communicate(timeout=min(CORRECTNESS, self.remaining))
            result = {"exit_code": process.returncode, "summary": said.strip().splitlines()[-1] if said.strip() else ""}
        except subprocess.TimeoutExpired:
            result = {"exit_code": None, "summary": "stopped: took too long"}
        finally:
            _stop(process)
        write(path, json.dumps(result | {"seconds": time.monotonic() - started}))
        self.say(f"tests on the GPU: {result['summary']}")

    def predictions(self) -> None:
        """Measure each launch of B0's steps beside its prediction, and fit the simulator's constants to it
        (benchmarks/fitted.py), within ``FITTING`` seconds each.

        What was measured is in DIR/fitted-train.json and DIR/fitted-infer.json at once, what was fitted as soon as it
        is; where the time ends before, the same campaign goes on with it when it is started again.
        """
        for mode in FITTED:
            path = self.folder / f"fitted-{mode}.json"
            limit = min(FITTING, self.remaining)
            if fit_is_whole(path) or limit < FITTING / 2:
                continue
            command = [sys.executable, "-m", "benchmarks.fitted", "--mode", mode, "--out", str(path.resolve())]
            command += ["--seconds", f"{limit - FITTING_END:.0f}"]
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )
            try:
                said, _ = process.communicate(timeout=limit)
                self.say(f"b0 {mode}, measured beside predicted:\n{said.rstrip()}")
            except subprocess.TimeoutExpired:
                kept = f"what it had is in {path.name}" if path.exists() else "it had nothing yet"
                self.say(f"b0 {mode}, measured beside predicted: stopped, took too long; {kept}")
            finally:
                _stop(process)


def fit_is_whole(path: Path) -> bool:
    """Whether a file of benchmarks.fitted has all that it was to have: no trial is left."""
    return path.exists() and json.loads(path.read_text(encoding="utf-8")).get("left") == 0


def _stop(process) -> None:
    """End a process that was started with a session of its own, and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.campaign", description="Measure the most important rows in N minutes."
    )
    parser.add_argument("--minutes", type=float, required=True, help="when to end, whatever is left")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; give it again to go on")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose name matches")
    parser.add_argument(
        "--cpu", action="store_true", help="inference on the CPU beside other libraries (benchmarks.cpu)"
    )
    parser.add_argument("--retry", action="store_true", help="also run again what failed or hung before")
    parser.add_argument("--list", action="store_true", help="print the rows in order, and measure nothing")
    args = parser.parse_args(argv)
    started = time.monotonic()
    if not 0 < args.minutes < 1e4:
        parser.error(f"--minutes must be above 0, got {args.minutes}")
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: the interpreter's times mean nothing; unset it")
    try:
        re.compile(args.only)
    except re.error as error:
        parser.error(f"--only {args.only!r} is no regular expression: {error}")
    if args.cpu:
        from benchmarks import cpu

        args.out.mkdir(parents=True, exist_ok=True)
        seconds = str(60 * args.minutes / cpu.ROWS / 2)  # about as much goes into building and warming up
        return cpu.main(["--out", str(args.out / cpu.RESULTS.name), "--seconds", seconds])
    gpu = torch.cuda.is_available()
    todo = jobs(gpu, args.only)
    if args.list:
        print(*(f"{job.seconds:5.0f} s  {job.node}" for job in todo), sep="\n")
        return 0
    try:
        campaign = Campaign(args.out, started + 60 * args.minutes)
    except ValueError as error:
        print(f"python -m benchmarks.campaign: {error}", file=sys.stderr)
        return 2
    if args.retry:
        campaign.state = {}
    if gpu and not args.only:
        campaign.correctness()
        campaign.run([job for job in todo if job.group == 0])
        campaign.predictions()
    campaign.run(todo)
    done = sum(campaign.measured(job.node) for job in todo)
    bad = sum(job.node in campaign.state for job in todo)
    print(f"{args.out}: {done} of {len(todo)} rows measured, {bad} failed, in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
