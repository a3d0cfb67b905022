"""What the simulator says of launches that are compiled, in a Python of its own: this one may interpret kernels."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path

import torch
from torch import nn

from effkernels import FusedDepthwiseConvBNAct, FusedMBConv, FusedSqueezeExcite, functional
from effkernels.configs import tables
from effkernels.configs.gpus import GPUS
from effkernels.kernels.weight_copies import weight_copies
from effkernels.parameters import BatchNormParams
from effkernels.tools import tune
from effkernels.tools.launches import record_launches
from effkernels.tools.simulator import launch as launches
from effkernels.tools.simulator import machine, project
from effkernels.tools.simulator.recount import recount
from effkernels.tools.simulator.steps import recorded
from support import known_kernels
from support.python import run_python


class _Calls(nn.Module):
    """A function of x and of this module's parameters."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleDict(layers)

    def forward(self, x):
        return self.function(x, **self.layers)


def _stem_and_block(x, conv, bn, block):
    return block.fused(x, stem=(conv.weight, BatchNormParams.of(bn)), stem_stride=2)


def _head(x, conv, bn):
    return functional.head(x, conv.weight, BatchNormParams.of(bn))


def _norm(x, bn):
    return functional.bn_act_add(x, BatchNormParams.of(bn), residual=torch.ones_like(x))


def _copies(x, conv):
    """Sums of copies of the weight in every form, beside a product that needs a gradient."""
    made = weight_copies([(conv.weight.detach(), form) for form in ("plain", "permuted")], x.dtype)
    return x * made[0].sum()


# {name: (channels and size of x, a module on a device)}: between them every kernel, small enough for the interpreter.
CASES = {
    "narrow block": ((8, 7), lambda device: FusedMBConv(8, 8, 5, 1, 6, device=device)),
    "block of stride 2": ((16, 8), lambda device: FusedMBConv(16, 24, 3, 2, 6, device=device)),
    "block without expansion": ((24, 7), lambda device: FusedMBConv(24, 16, 3, 1, 1, device=device)),
    "wide block": ((48, 5), lambda device: FusedMBConv(48, 40, 3, 1, 6, device=device)),
    "stem and block": (
        (3, 12),
        lambda device: _Calls(
            _stem_and_block,
            conv=nn.Conv2d(3, 16, 3, 2, 1, bias=False, device=device),
            bn=nn.BatchNorm2d(16, device=device),
            block=FusedMBConv(16, 8, 3, 1, 1, device=device),
        ),
    ),
    "head": (
        (16, 5),
        lambda device: _Calls(
            _head, conv=nn.Conv2d(16, 40, 1, bias=False, device=device), bn=nn.BatchNorm2d(40, device=device)
        ),
    ),
    "squeeze-excite": ((24, 6), lambda device: FusedSqueezeExcite(24, 6, device=device)),
    "norm": ((24, 6), lambda device: _Calls(_norm, bn=nn.BatchNorm2d(24, device=device))),
    "depthwise": ((24, 6), lambda device: FusedDepthwiseConvBNAct(24, 3, 1, device=device)),
    "weight copies": ((8, 4), lambda device: _Calls(_copies, conv=nn.Conv2d(24, 40, 1, device=device))),
}


def steps_of(case: str, device: str, watch) -> dict[str, list]:
    """{step: what ``watch()`` yields around it} of a case: "forward", "backward" and "inference"."""
    torch.manual_seed(0)
    (channels, size), build = CASES[case]
    module = build(device)
    x = torch.randn(1, channels, size, size).bfloat16().to(device).contiguous(memory_format=torch.channels_last)
    with watch() as forward:
        out = module(x.requires_grad_())
    gradient = torch.ones_like(out)
    with watch() as backward:
        out.backward(gradient)
    with torch.no_grad(), watch() as inference:
        module.eval()(x)
    return {"forward": forward, "backward": backward, "inference": inference}


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
    found |= {"programs": math.prod(prediction.grid), "spills": prediction.spills}
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


def chains(gpu: str) -> dict:
    """Dependent multiply-adds: clocks of each, for warps a program with and without a barrier."""
    found, rates = {}, GPUS[gpu]
    for warps, barrier in ((4, False), (16, False), (4, True)):
        launch = known_kernels.chain_launch(warps, barrier=barrier, programs=rates.processors)
        found[f"{warps} warps{' barrier' * barrier}"] = launches.predict(launch, gpu).time * rates.clock / 512 / 64
    return found


def other_architectures() -> dict:
    """Of a product and a copy, {GPU: (share of the data sheet's matrix rate, share of the copy bandwidth)}."""
    found = {}
    for gpu, peak in (("a100", 312e12), ("rtx4090", 165e12)):
        product, operations = known_kernels.product_launch(4096, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=4)
        copy, moved = known_kernels.copy_launch()
        rates = operations / launches.predict(product, gpu).time, moved / launches.predict(copy, gpu).time
        found[gpu] = rates[0] / peak, rates[1] / GPUS[gpu].bandwidth
    return found


def floors() -> dict:
    """{machine: (seconds, floors, bytes from DRAM, bytes through L2)} of a copy: as it is, with a slow L2 and slow
    memory."""
    found, h200 = {}, machine.machine_of("h200")
    launch, _ = known_kernels.copy_launch(1 << 24)
    changes = {"as it is": {}, "slow L2": {"l2_bandwidth": 1e12}, "slow memory": {"memory_share": 0.1}}
    for name, constants in changes.items():
        it = launches.predict(launch, "h200", machine=machine.with_constants(h200, **constants))
        found[name] = it.time, it.floors, it.dram_bytes, it.l2_bytes
    return found


def problems() -> dict:
    """What is said of a launch that does not compile, of one that asks for too much shared memory, and of one with
    instructions that are not known: whether it is estimated, which they are, and its row of the table."""
    from effkernels.tools import simulate

    found = {}
    wide, _ = known_kernels.product_launch(1024, BLOCK_M=256, BLOCK_N=256, BLOCK_K=128)
    for name, launch in (("wrong", known_kernels.wrong_launch()), ("wide", wide)):
        try:
            launches.predict(launch, "a100")
        except RuntimeError as error:
            found[name] = str(error)

    def unknown(code):
        changed = [dataclasses.replace(i, opcode="FROB") if "ISETP" in i.base else i for i in code.instructions]
        return dataclasses.replace(code, instructions=changed, digest=f"{code.digest} unknown", memo={})

    with _changed(unknown):
        prediction = launches.predict(known_kernels.chain_launch(4), "h200")
    found["unknown"] = prediction.estimated, prediction.unknown, simulate.table(simulate.rows([prediction]))
    return found


@contextlib.contextmanager
def _launches():
    with recorded() as (made, _):
        yield made


def recorded_cases(cases: list[str]) -> list:
    """(case, step, launch) of every launch of the cases, on tensors of the meta device, as on a device of one SM."""
    from effkernels.configs import rules

    rules.processor_count = lambda device: 1
    return [
        (case, step, launch)
        for case in cases
        for step, made in steps_of(case, "meta", _launches).items()
        for launch in made
    ]


def kernels_of_cases() -> list[str]:
    return sorted({launch.name for *_, launch in recorded_cases(list(CASES))})


def recounted(cases: list[str]) -> list:
    """[case, step, kernel, {argument: counts}, names of its activations] of every launch, from the machine code."""
    found = []
    for case, step, launch in recorded_cases(cases):
        activations = [name for name, t in launch.tensors.items() if t.dtype == torch.bfloat16 and t.dim() == 4]
        found.append([case, step, launch.name, recount(launch), activations])
    return found


def without_barriers(code):
    """The code of which every barrier is a no-operation."""
    instructions = [
        dataclasses.replace(i, opcode="NOP", operands=()) if i.base == "BAR" else i for i in code.instructions
    ]
    return dataclasses.replace(code, instructions=instructions, digest=f"{code.digest} without barriers", memo={})


@contextlib.contextmanager
def _changed(change):
    """Within: kernels run the code that ``change`` makes of theirs."""
    code_of = launches.code_of
    launches.code_of = lambda launch, arch: change(code_of(launch, arch))
    try:
        yield
    finally:
        launches.code_of = code_of


def barriers() -> list:
    """[kernel, us as it is, us without its barriers] of the launches of an inference block with many tiles."""
    found = []
    block = FusedMBConv(24, 40, 5, 2, 6, device="meta", dtype=torch.bfloat16).eval()
    x = torch.empty(64, 24, 56, 56, device="meta", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), recorded() as (made, _):
        block(x)
    for launch in made:
        found.append([launch.name, 1e6 * launches.predict(launch, "h200").time])
        with _changed(without_barriers):
            found[-1].append(1e6 * launches.predict(launch, "h200").time)
    return found


def variants() -> dict:
    """What is predicted of kernels of B0's blocks, as they are and with another configuration or code."""
    meta = torch.device("meta")
    early = tune.block_workloads(torch.bfloat16, 64, 16, 24, 3, 2, 6, 112, meta)
    late = tune.block_workloads(torch.bfloat16, 256, 80, 112, 5, 1, 6, 14, meta)

    def row(workloads, family, kernel, **fields):
        workload = next(workload for workload in workloads if workload.family == family)
        with record_launches(GPUS["h200"]) as made, tables.watch(), tables.override(family, **fields):
            workload.build(meta)()
        launch = next(launch for launch in made if launch.name == kernel)
        return _row(launches.predict(launch, "h200"))

    found = {}
    for warps in (8, 4):
        found[f"depthwise, {warps} warps an SM"] = row(
            early, "depthwise_forward", "depthwise_forward_kernel", warps_per_sm=warps
        )
    for rows in (64, 128):
        found[f"expand dgrad, {rows} rows"] = row(late, "expand_data", "expand_data_kernel", BLOCK_M=rows)
    found["expand dgrad, half the warps"] = row(late, "expand_data", "expand_data_kernel", num_warps=4)
    found["project"] = row(early, "pointwise_forward", "pointwise_forward_kernel")
    with _changed(without_barriers):
        found["project without barriers"] = row(early, "pointwise_forward", "pointwise_forward_kernel")
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
