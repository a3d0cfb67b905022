"""Every supported Triton: its interpreter runs the kernels' tests, its compiler compiles them for NVIDIA's and AMD's GPUs (none is needed).

    python tests/matrix.py [--triton 3.6.0 ...] [--folder DIR] [--step suite|compile] [--quick]

Each version gets a virtual environment in --folder with that Triton and the NumPy it needs; everything else, PyTorch too, is that of
the Python that runs this (CPU builds of PyTorch come without Triton, so any goes with any here). Exit code 1 unless all is as
docs/numerics.md says: what a version cannot do stands in UNABLE.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Triton 3.6's interpreter fails under NumPy 2.4 and newer.
VERSIONS = {"3.6.0": ["numpy==2.3.5"], "3.7.1": [], "3.8.0": []}
TARGETS = {
    **{f"sm_{arch}": ("cuda", arch, 32) for arch in (80, 86, 89, 90, 100)},
    **{arch: ("hip", arch, 64) for arch in ("gfx90a", "gfx942")},
}
# What fails, by version ("*": each) and target, with the kernels.
# bf16's rounding in this kernel is inline PTX.
UNABLE: dict[tuple[str, str], set] = {("*", arch): {"expand_depthwise_kernel"} for arch in ("gfx90a", "gfx942")}
SUITE = [
    f"tests/effkernels/test_{name}.py"
    for name in (
        "activations batchnorm counted_traffic depthwise expand_depthwise functional gate library mbconv modules pointwise properties "
        "reference squeeze_excite stem weight_gradients"
    ).split()
]
QUICK = [f"tests/effkernels/test_{name}.py" for name in ("activations", "functional", "gate", "weight_gradients")]


def environment(folder: Path, version: str) -> Path:
    """The Python of a virtual environment with this Triton, made on first use."""
    home = folder / f"triton-{version}"
    python = home / "bin/python"
    if not (home / "complete").exists():
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", f"triton=={version}", *VERSIONS.get(version, [])], check=True)
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True, text=True
        ).stdout.strip()
        Path(site, "base.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after its own packages, which so win
        (home / "complete").touch()
    return python


def run(python, *arguments, **environment_changes):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "EFFKERNELS_BACKEND", "PYTHONPATH")}
    return subprocess.run([python, *arguments], cwd=ROOT, env=env | environment_changes, capture_output=True, text=True)


def suite(python, quick: bool) -> str | None:
    """None if the kernels' tests pass under ``python``, else the end of what pytest printed."""
    done = run(python, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *(QUICK if quick else SUITE))
    print("   ", done.stdout.strip().splitlines()[-1] if done.stdout else done.stderr[-500:], flush=True)
    return None if done.returncode == 0 else done.stdout[-6000:] + done.stderr[-2000:]


def compile_one(job) -> str | None:
    """None if this process' Triton compiles the launch of this index for the target, else the error."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    index, target = job
    launch = launches()[index]
    options = launch.options
    if TARGETS[target][0] == "hip":  # no PTX, and no register limit given to its assembler
        launch = dataclasses.replace(launch, arguments={k: False if k == "FAST" else v for k, v in launch.arguments.items()})
        options = {k: v for k, v in options.items() if k != "maxnreg"}
    try:
        triton.compile(ASTSource(launch.fn, *launch.specialization()), target=GPUTarget(*TARGETS[target]), options=options)
    except Exception as error:  # every error of a compiler is an answer here
        return f"{type(error).__name__}: {str(error).strip()[:300]}"
    return None


def launches():
    from effkernels import inspect

    return list({launch.name: launch for launch in reversed(inspect.shipped_launches())}.values())


def compile_here() -> dict:
    """{target: {kernel: error or None}} of one launch of every kernel."""
    names = [launch.name for launch in launches()]
    jobs = [(i, target) for target in TARGETS for i in range(len(names))]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        answers = list(pool.map(compile_one, jobs))
    found: dict = {target: {} for target in TARGETS}
    for (i, target), answer in zip(jobs, answers, strict=True):
        found[target][names[i]] = answer
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--triton", nargs="+", default=list(VERSIONS), metavar="VERSION", help=f"default: {' '.join(VERSIONS)}")
    parser.add_argument("--folder", type=Path, default=Path("runs/matrix"), help="where virtual environments are kept")
    parser.add_argument("--step", choices=["suite", "compile"], help="only this one")
    parser.add_argument("--quick", action="store_true", help="four of the test files")
    parser.add_argument("--compile-here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.compile_here:
        print(json.dumps(compile_here()))
        return 0
    wrong = []
    for version in args.triton:
        print(f"Triton {version}", flush=True)
        python = environment(args.folder.resolve(), version)
        if args.step != "compile" and (problem := suite(python, args.quick)):
            wrong.append(f"Triton {version}, tests:\n{problem}")
        if args.step != "suite":
            done = run(python, str(Path(__file__)), "--compile-here", PYTHONPATH=str(ROOT))
            if done.returncode:
                wrong.append(f"Triton {version}, compiling:\n{done.stderr[-3000:]}")
                continue
            for target, answers in json.loads(done.stdout).items():
                failed = {kernel: error for kernel, error in answers.items() if error}
                print(f"    {target}: {len(answers) - len(failed)} of {len(answers)} kernels compile", flush=True)
                known = UNABLE.get((version, target), UNABLE.get(("*", target), set()))
                if set(failed) != known:
                    wrong.append(f"Triton {version}, {target}: not as expected ({sorted(known)}): {json.dumps(failed, indent=1)}")
    print("\n".join(wrong) if wrong else "all as expected")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
