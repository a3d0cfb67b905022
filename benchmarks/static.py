"""What can be known of the kernels without running them on a GPU: launches, bytes, registers and spills, for comparing
two trees.

``benchmarks/static.json`` holds them for the tree that was last accepted. ``python -m benchmarks.compare --static``
compares the present tree with it; ``--update`` accepts the present tree (half a minute, and what has to be predicted
again: about 20 minutes of two cores for all of it). Its sections:

- ``networks``: the launches of one step of B0 to B7 in bf16, PyTorch's own operators among them, and the bytes of all
  their tensors, each once a launch, for one image. They are read off the launchers, which run on the ``meta`` device.
- ``blocks``: the same of each different block of B0 and B4.
- ``kept``: the bytes that a training step of B0 in bf16 keeps for the backward, for one image, and their share of what
  plain layers keep.
- ``counted``: the distinct bytes that each launch of small blocks reads and writes, counted in Triton's interpreter.
- ``machine code``: the most registers, spilled bytes and instructions of each kernel, from
  effkernels/configs/static_sm90.json.
- ``predicted``: the time of steps and of their kernels, by the simulator (docs/performance.md): no measurement.

In training the blocks' weights are fp32, as under autocast; those of the head and classifier are bf16, as autocast
hands them over.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from benchmarks.shapes import Block

ROOT = Path(__file__).parents[1]
BASELINE = Path(__file__).parent / "static.json"
TABLE = ROOT / "effkernels" / "configs" / "static_sm90.json"
NETWORKS = tuple(f"b{i}" for i in range(8))
BATCH = 64
KEPT = ((64, "keep"), (64, "recompute"), (224, "keep"))
# Steps that are predicted: of each model, one image and many, training and inference, on each of three GPUs.
PREDICTED_MODELS = {"b0": 256, "b4": 64, "b7": 16}
PREDICTED = tuple(
    (model, mode, batch, gpu)
    for model, many in PREDICTED_MODELS.items()
    for gpu in ("h200", "a100", "rtx4090")
    for mode in ("train", "infer")
    for batch in (1, many)
)
COUNTED = {"8 to 8, 5x5, stride 1": (8, 8, 5, 1)}  # small: the interpreter is slow


def _summary(launches, operators, images: int) -> dict:
    moved = sum(launch.activation_bytes() for launch in launches) + sum(operator.moved for operator in operators)
    names = Counter(launch.name for launch in launches) + Counter(
        f"aten::{operator.name.split('::')[-1]}" for operator in operators
    )
    return {
        "launches": len(launches) + len(operators),
        "bytes_per_image": round(moved / images),
        "of": dict(sorted(names.items())),
    }


def block_summary(block: "Block", training: bool) -> dict:
    """The summary of one block of benchmarks.shapes."""
    from effkernels import FusedMBConv

    args = block.in_channels, block.out_channels, block.kernel_size, block.stride, block.expand_ratio, block.se_ratio
    module = FusedMBConv(*args, device="meta", dtype=None if training else torch.bfloat16)
    x = torch.empty(BATCH, block.in_channels, block.size, block.size, device="meta", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last).requires_grad_(training)
    from effkernels.tools.simulator.steps import step_launches

    return _summary(*step_launches(module, x, training), BATCH)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Within: the bytes of the storages saved for the backward, each once, without parameters and buffers of
    ``module``.
    """

    def __init__(self, module: torch.nn.Module):
        own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
        self.storages: dict = {}

        def pack(t):
            storage = t.untyped_storage()
            if storage._cdata not in own:
                self.storages[storage._cdata] = (storage.nbytes(), t)  # kept alive, so that no address comes twice
            return t

        super().__init__(pack, lambda t: t)

    def __enter__(self):
        super().__enter__()
        return self

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.storages.values())


def kept(size: int, memory: str) -> dict:
    """The bytes that a training step of B0 on images of ``size`` pixels keeps."""
    from efficientnet import create_model
    from effkernels.tools.simulator.steps import recorded

    x = torch.empty(256, 3, size, size, device="meta", dtype=torch.bfloat16)
    found = {}
    for fused in (True, False):
        model = create_model(
            "efficientnet_b0", num_classes=10, fused=fused, memory=memory, device="meta", dtype=x.dtype
        )
        with Kept(model) as saved, recorded():
            model(x)
        found[fused] = saved.bytes
    return {"bytes_per_image": round(found[True] / len(x)), "of_plain": round(found[True] / found[False], 4)}


def machine_code() -> dict:
    """{kernel and dtype: the most registers, spilled bytes and instructions of its configurations} of the table in
    git.
    """
    found: dict[str, dict] = {}
    for row in json.loads(TABLE.read_text(encoding="utf-8"))["rows"]:
        most = found.setdefault(f"{row['kernel']} {row['dtype']}", {"registers": 0, "spills": 0, "instructions": 0})
        for field in most:
            most[field] = max(most[field], row[field])
    return dict(sorted(found.items()))


def counted() -> dict:
    """The distinct bytes of the launches of small blocks. Triton must be interpreting (TRITON_INTERPRET=1 before its
    import).
    """
    from effkernels import FusedMBConv
    from effkernels.tools.traffic import count_steps

    found = {}
    torch.manual_seed(0)
    for name, (inputs, outputs, k, stride) in COUNTED.items():
        block = FusedMBConv(inputs, outputs, k, stride, 6)
        x = torch.randn(1, inputs, 7, 7).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
        for step, launches in count_steps(block, x).items():
            read, written = (sum(getattr(launch, side) for launch in launches) for side in ("read", "written"))
            found[f"{name}, {step}"] = {"launches": len(launches), "read": read, "written": written}
    return found


def _counted_in_the_interpreter() -> dict:
    """``counted`` in a process of its own: this one compiles kernels or runs them, that one interprets."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.static"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"counting bytes in the interpreter failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def predicted(
    accepted: dict,
    which: str,
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict], None] = lambda so_far: None,
) -> dict:
    """The predicted time of steps, and of each of their kernels: {"b0 train 256 h200": {"predicted_ms", "bytes_ms",
    "operators_ms", "digest"}, "b0 train 256 h200: kernel": {"predicted_us"}}. A step takes what its kernels and
    PyTorch's own operators do.

    which: "none" keeps ``accepted`` as it is; "changed" predicts those of its steps again whose digest, of launches and
    simulator, is another now; "all" also the steps that it lacks; "b0", "b4" or "b7" the same for one model, and keeps
    the others. Each launch that is predicted is kept in the simulator's cache at once, and ``keep`` is given the whole
    table after each step, so an interrupted run goes on. ``say`` is told each step.
    """
    if which == "none":
        return accepted
    from effkernels.tools import networks
    from effkernels.tools.simulate import rows
    from effkernels.tools.simulator import steps

    found = {}
    for number, (model, mode, batch, gpu) in enumerate(PREDICTED, 1):
        key = f"{model} {mode} {batch} {gpu}"
        kept = {name: entry for name, entry in accepted.items() if name == key or name.startswith(f"{key}: ")}
        if which not in ("all", "changed", model) or which == "changed" and not kept:
            found |= kept
            continue
        module, x = networks.network(model, mode == "train", batch)
        launches, operators = steps.step_launches(module, x, mode == "train", gpu)
        digest = steps.digest(launches, operators, gpu)
        if accepted.get(key, {}).get("digest") == digest:
            found |= kept
            continue
        started = time.monotonic()
        step = steps.Step(
            model=model,
            mode=mode,
            batch=batch,
            gpu=gpu,
            predictions=steps.predict_launches(launches, gpu),
            operators=operators,
        )
        times = {"predicted_ms": round(1e3 * step.time, 4), "bytes_ms": round(1e3 * step.bytes_time, 4)}
        times |= {"operators_ms": round(1e3 * step.operators_time, 4)}
        found[key] = times | {"digest": digest}
        found |= {f"{key}: {row['kernel']}": {"predicted_us": round(row["us"], 2)} for row in rows(step.predictions)}
        took = time.monotonic() - started
        say(f"{number} of {len(PREDICTED)}: {key}: {1e3 * step.time:.2f} ms predicted, in {took:.0f} s")
        later = [f"{model} {mode} {batch} {gpu}" for model, mode, batch, gpu in PREDICTED[number:]]
        keep(found | {name: entry for name, entry in accepted.items() if name.partition(": ")[0] in later})
    return found


def measure(
    accepted: dict | None = None, predict: str = "changed", keep: Callable[[dict], None] = lambda so_far: None
) -> dict:
    """All sections, for the present tree.

    accepted is the table that was accepted last, predict says which of its steps to predict again, and keep is given
    the predictions so far, see ``predicted``.

    Raises RuntimeError under TRITON_INTERPRET, where launchers start nothing to record.
    """
    from benchmarks.shapes import blocks
    from effkernels.dispatch import interpreting
    from effkernels.tools.networks import network
    from effkernels.tools.simulator.steps import step_launches

    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: launches are recorded where Triton compiles; unset it")
    networks, found = {}, {}
    for training in (False, True):
        step = "training" if training else "inference"
        for name in NETWORKS:
            model, x = network(name, training, BATCH)
            networks[f"{name} {step}"] = _summary(*step_launches(model, x, training), BATCH)
        for name in ("b0", "b4"):
            for block in blocks(name):
                if (key := f"{name} {block} {step}") not in found:
                    found[key] = block_summary(block, training)
    return {
        "kind": "static",
        "networks": networks,
        "blocks": found,
        "kept": {f"b0, {size} pixels, {memory}": kept(size, memory) for size, memory in KEPT},
        "counted": _counted_in_the_interpreter(),
        "machine code": machine_code(),
        "predicted": predicted(
            (accepted or {}).get("predicted", {}),
            predict,
            say=lambda line: print(line, file=sys.stderr, flush=True),
            keep=keep,
        ),
    }


def read(path: Path) -> dict:
    """A file that ``write`` wrote. Raises ValueError that names it if it is none."""
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict) or table.get("kind") != "static":
        raise ValueError(f"{path} is not a table of static costs")
    return table


def write(table: dict, path: Path = BASELINE) -> None:
    """Write one entry a line, so that a change shows as a few lines. The file is replaced as a whole."""
    parts = [f'"kind": {json.dumps(table["kind"])}']
    for section, entries in table.items():
        if section != "kind":
            lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items())
            parts.append(f"{json.dumps(section)}: {{\n{lines}\n}}")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    print(json.dumps(counted()))
