"""What the simulator says of launches that are compiled, in a Python of its own: this one may interpret kernels."""

import dataclasses
import json
from pathlib import Path

import torch

from effkernels import FusedMBConv
from effkernels.tools.simulator import launch as launches
from effkernels.tools.simulator import machine, project
from effkernels.tools.simulator.recount import recount
from effkernels.tools.simulator.steps import recorded
from support import known_kernels
from support.python import run_python

# (in, out channels, kernel size, stride, expand ratio, image size) of blocks that are small enough for the interpreter.
BLOCKS = ((8, 8, 5, 1, 6, 7), (16, 24, 3, 2, 6, 8), (24, 16, 3, 1, 1, 7))


TESTS = Path(__file__).parents[1]


def ask(call: str, **environment):
    """The JSON value of ``call``, an expression with this module as ``simulated``, in an ``environment``."""
    code = f"""
        import json, sys
        sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]
        from support import simulated
        print(json.dumps({call}))
    """
    return json.loads(run_python(code, **environment))


def _row(prediction, work=None) -> dict:
    found = {
        "us": 1e6 * prediction.time,
        "bytes_us": 1e6 * prediction.bytes_time,
        "ipc": prediction.instructions_per_clock,
    }
    found |= {"resident": prediction.resident, "barrier": prediction.waits["barrier"], "l2_bytes": prediction.l2_bytes}
    found |= {
        "dram_bytes": prediction.dram_bytes,
        "unknown": list(prediction.unknown),
        "instructions": prediction.instructions,
    }
    return found | ({"rate": work / prediction.time} if work else {})


def known(slow: bool) -> dict:
    """The known kernels on an H100; slow: also variants that only take longer to compile."""
    found = {}
    cases = {"product": known_kernels.product_launch(), "copy": known_kernels.copy_launch()}
    cases |= {"attention 64": known_kernels.attention_launch(64, 64, 4)}
    if slow:
        cases |= {"attention 128": known_kernels.attention_launch(128, 128, 8)}
        cases |= {"product small tile": known_kernels.product_launch(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4)}
        cases |= {"product few warps": known_kernels.product_launch(num_warps=4)}
    for name, (launch, work) in cases.items():
        found[name] = _row(launches.predict(launch, "h100"), work)
    return found


def chains() -> dict:
    """Dependent multiply-adds: clocks of each, for warps a program with and without a barrier."""
    found = {}
    for warps, barrier in ((4, False), (16, False), (4, True)):
        prediction = launches.predict(known_kernels.chain_launch(warps, barrier=barrier), "h200")
        found[f"{warps} warps{' barrier' * barrier}"] = prediction.time * 1.755e9 / 512 / 64
    return found


def block_launches(inputs, outputs, k, stride, ratio, size, images=1) -> dict[str, list]:
    """Launches of a block by step, on tensors of the meta device, as on a device of one SM."""
    from effkernels.configs import rules

    rules.processor_count = lambda device: 1
    block = FusedMBConv(inputs, outputs, k, stride, ratio, device="meta")
    x = torch.empty(images, inputs, size, size, device="meta", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with recorded() as (forward, _):
        out = block(x)
    with recorded() as (backward, _):
        out.backward(torch.empty_like(out))
    with torch.no_grad(), recorded() as (inference, _):
        block.eval()(x)
    return {"forward": forward, "backward": backward, "inference": inference}


def recounted(count: int) -> list:
    """[step, kernel, {argument: counts}, names of its activations] of every launch of the first ``count`` blocks, from
    the machine code."""
    found = []
    for block in BLOCKS[:count]:
        for step, made in block_launches(*block).items():
            for launch in made:
                activations = [name for name, tensor in launch.tensors.items() if tensor.dtype == torch.bfloat16]
                found.append([step, launch.name, recount(launch), activations])
    return found


def without_barriers(code):
    """The code of which every barrier is a no-operation."""
    instructions = [
        dataclasses.replace(i, opcode="NOP", operands=()) if i.base == "BAR" else i for i in code.instructions
    ]
    return dataclasses.replace(code, instructions=instructions, memo={})


def barriers() -> list:
    """[kernel, us as it is, us without its barriers] of the launches of an inference block with many tiles."""
    found, code_of = [], launches.code_of
    block = FusedMBConv(24, 40, 5, 2, 6, device="meta", dtype=torch.bfloat16).eval()
    x = torch.empty(64, 24, 56, 56, device="meta", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), recorded() as (made, _):
        block(x)
    for launch in made:
        times = []
        for change in (lambda code: code, without_barriers):
            launches.code_of = lambda launch, arch, change=change: change(code_of(launch, arch))
            times.append(1e6 * launches.predict(launch, "h200").time)
        found.append([launch.name, *times])
    return found


def kept() -> dict:
    """How many predictions of a copy were made after asking again, for other arguments, with other figures, with its
    tensors in L2 and of another simulator; and whether the result is then the same, slower, or less from DRAM."""
    counts, predicted = [], launches._predicted
    launches._predicted = lambda *args, **how: counts.append(1) or predicted(*args, **how)
    (small, _), (large, _) = known_kernels.copy_launch(1 << 20), known_kernels.copy_launch(1 << 21)
    found = {}
    first = launches.predict(small, "h200")
    found["again"] = launches.predict(small, "h200") == first, len(counts)
    launches.predict(large, "h200")
    found["larger"] = len(counts)
    slower = machine.with_constants(machine.machine_of("h200"), memory_latency=5000)
    found["slower"] = launches.predict(small, "h200", machine=slower).time > first.time, len(counts)
    held = {tensor.storage: tensor.bytes for tensor in project.tensors(small)}
    found["held"] = launches.predict(small, "h200", cached=held).dram_bytes < first.dram_bytes, len(counts)
    project.version = lambda: "another"
    launches.predict(small, "h200")
    found["version"] = len(counts)
    return found


def command(arguments: list[str]) -> dict:
    """What the command writes as JSON."""
    import contextlib
    import io
    import tempfile

    from effkernels.tools import simulate

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder) / "prediction.json"
        assert simulate.main([*arguments, "--json", str(path)]) == 0
        return json.loads(path.read_text(encoding="utf-8"))
