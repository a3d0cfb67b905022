"""Every supported Triton: its interpreter runs the kernels' tests, its compiler compiles them for NVIDIA's and AMD's
GPUs (none is needed).

    python tests/matrix.py [--triton 3.6.0 ...] [--step suite|compile] [--jobs N] [--quick] [--fresh] [--folder DIR]

Each version gets a virtual environment in --folder with that Triton and the NumPy it needs; everything else, PyTorch
too, is that of the Python that runs this (CPU builds of PyTorch come without Triton, so any goes with any here). What
is green is kept in --folder and not run again for the same sources, so that an interrupted run goes on. Ends with a
table; exit code 1 unless all is green.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from effkernels.configs.gpus import ARCHITECTURES

ROOT = Path(__file__).parents[1]
# Triton 3.6's interpreter fails under NumPy 2.4 and newer.
VERSIONS = {"3.6.0": ["numpy==2.3.5"], "3.7.1": [], "3.8.0": []}
TARGETS = {
    **{f"sm_{arch}": ("cuda", arch, 32) for arch in ARCHITECTURES},
    **{arch: ("hip", arch, 64) for arch in ("gfx90a", "gfx942")},
}
# What of tests/effkernels is left out, as no Triton runs in it or none but the default suite's matters: mathematics in
# PyTorch, how other libraries' modules are read, the gate and its errors, PyTorch's own contract (operators,
# torch.compile), inference on a CPU, configurations and their tables, and the machine code of the one Triton that the
# table in git was made with.
LEFT_OUT = set(
    "gradcheck geometry convert convert_kernels convert_networks convert_reasons bad_input dispatch faults contract "
    "library counters "
    "launch tune compile cpu simulator".split()
)
SHARE = "0.25"  # of the property cases
QUICK = {"activations", "functional", "gate", "weight_gradients"}


def selected(quick: bool) -> list[str]:
    names = {
        path.stem.removeprefix("test_"): str(path.relative_to(ROOT))
        for path in sorted(ROOT.glob("tests/effkernels/test_*.py"))
    }
    assert LEFT_OUT | QUICK <= names.keys()
    return [path for name, path in names.items() if (name in QUICK if quick else name not in LEFT_OUT)]


def environment(folder: Path, version: str) -> Path:
    """The Python of a virtual environment with this Triton, made on first use."""
    home = folder / f"triton-{version}"
    python = home / "bin/python"
    if not (home / "complete").exists():
        venv.create(home, with_pip=True, clear=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "--no-deps", f"triton=={version}", *VERSIONS.get(version, [])],
            check=True,
        )
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        Path(site, "base.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after its own packages, which so win
        (home / "complete").touch()
    return python


def run(python, *arguments, **environment_changes):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "EFFKERNELS_BACKEND", "PYTHONPATH")}
    return subprocess.run([python, *arguments], cwd=ROOT, env=env | environment_changes, capture_output=True, text=True)


def suite(python, jobs: int, quick: bool) -> tuple[str, str | None]:
    """(what pytest counted, None if the kernels' tests pass under ``python``, else the end of what it printed)."""
    workers = str(jobs if jobs > 1 else 0)
    done = run(
        python,
        "-m",
        "pytest",
        "-q",
        "-n",
        workers,
        "-p",
        "no:cacheprovider",
        "--cases",
        SHARE,
        "-k",
        "not test_compiled",
        *selected(quick),
        OMP_NUM_THREADS="1",
    )
    counts = (
        re.sub(r",? *\d+ warnings?| in .*", "", done.stdout.strip().splitlines()[-1]) if done.stdout else "no answer"
    )
    return counts, None if done.returncode == 0 else done.stdout[-6000:] + done.stderr[-2000:]


def compile_one(job) -> str | None:
    """None if this process' Triton compiles the launch of this index for the target, else the error."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    index, target = job
    launch = launches()[index]
    options = launch.options
    # No PTX, which is what FAST stands for, and HALVED with it, and no register limit given to its assembler.
    if TARGETS[target][0] == "hip":
        plain = {k: False for k in ("FAST", "HALVED") if k in launch.arguments}
        launch = dataclasses.replace(launch, arguments=launch.arguments | plain)
        options = {k: v for k, v in options.items() if k != "maxnreg"}
    try:
        triton.compile(
            ASTSource(launch.fn, *launch.specialization()), target=GPUTarget(*TARGETS[target]), options=options
        )
    except Exception as error:  # every error of a compiler is an answer here
        return f"{type(error).__name__}: {str(error).strip()[:300]}"
    return None


def launches():
    from effkernels.tools import shipped

    return list({launch.name: launch for launch in reversed(shipped.shipped_launches())}.values())


def compile_here(jobs: int) -> dict:
    """{target: {kernel: error or None}} of one launch of every kernel."""
    names = [launch.name for launch in launches()]
    todo = [(i, target) for target in TARGETS for i in range(len(names))]
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        answers = list(pool.map(compile_one, todo))
    found: dict = {target: {} for target in TARGETS}
    for (i, target), answer in zip(todo, answers, strict=True):
        found[target][names[i]] = answer
    return found


def compiled(python, jobs: int) -> tuple[str, str | None]:
    """("target n/m" of every target, None if every kernel compiles for every target, else the errors)."""
    done = run(python, str(Path(__file__)), "--compile-here", "--jobs", str(jobs), PYTHONPATH=str(ROOT))
    if done.returncode:
        return "no answer", done.stderr[-3000:]
    found = json.loads(done.stdout)
    failed = {target: {k: error for k, error in answers.items() if error} for target, answers in found.items()}
    counts = ", ".join(
        f"{target} {len(answers) - len(failed[target])}/{len(answers)}" for target, answers in found.items()
    )
    return counts, json.dumps({t: errors for t, errors in failed.items() if errors}, indent=1) if any(
        failed.values()
    ) else None


def sources(step: str) -> str:
    """A digest of all that a step's answer depends on, Triton aside."""
    import torch

    digest = hashlib.sha256(torch.__version__.encode())
    for place in (
        ("effkernels", "tests/matrix.py")
        if step == "compile"
        else ("effkernels", "efficientnet", "benchmarks", "tests")
    ):
        for file in sorted([ROOT / place, *(ROOT / place).rglob("*")]):
            if file.suffix in (".py", ".json"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--triton", nargs="+", default=list(VERSIONS), metavar="VERSION", help=f"default: {' '.join(VERSIONS)}"
    )
    parser.add_argument("--step", choices=["suite", "compile"], help="only this one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once (default: one per core)")
    parser.add_argument("--quick", action="store_true", help=f"only the tests of {', '.join(sorted(QUICK))}")
    parser.add_argument("--fresh", action="store_true", help="run again what was green")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/matrix"), help="where virtual environments and answers are kept"
    )
    parser.add_argument("--compile-here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.compile_here:
        print(json.dumps(compile_here(args.jobs)))
        return 0
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    kept, wrong = folder / "green.json", []
    green = json.loads(kept.read_text()) if kept.exists() and not args.fresh else {}
    steps = {
        "suite": lambda python: suite(python, args.jobs, args.quick),
        "compile": lambda python: compiled(python, args.jobs),
    }
    for version in args.triton:
        print(f"Triton {version}", flush=True)
        python = environment(folder, version)
        for step in [args.step] if args.step else steps:
            key = f"{sources(step)} {version} {step}{' quick' * (args.quick and step == 'suite')}"
            counts, problem = (green[key], None) if key in green else steps[step](python)
            print(f"    {step:8}{counts}{' (kept)' * (key in green)}{' NOT GREEN' * (problem is not None)}", flush=True)
            if problem is not None:
                wrong.append(f"Triton {version}, {step}")
                print(problem, flush=True)
            else:
                green[key] = counts
                kept.write_text(json.dumps(green, indent=1) + "\n")
    print(f"not green: {'; '.join(wrong)}" if wrong else "all green")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
