"""SyncBatchNorm on the kernels: two processes, with batches of different sizes, against one process of both batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from support.interpreter import HAS_TRITON, INTERPRET
from support.truth import assert_close_to_truth, relative_error

if not HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)
if not INTERPRET:
    pytest.skip("the interpreter is off (TRITON_INTERPRET)", allow_module_level=True)

SHARES = (3, 2)  # images of each process


def network(fused):
    """Stem with a first block, a block of every part, and the head."""
    from efficientnet.model.config import EfficientNetConfig, StageConfig
    from efficientnet.model.network import EfficientNet

    torch.manual_seed(0)
    stages = (StageConfig(3, 1, 1, 16, 1), StageConfig(3, 1, 2, 16, 2))
    model = EfficientNet(EfficientNetConfig(stages=stages, stem_channels=8, head_channels=24), 5, 3, 0.0, 0.0, fused)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    return model.train()


def batch():
    torch.manual_seed(1)
    return torch.randn(sum(SHARES), 3, 9, 8) + 0.5, torch.randn(sum(SHARES), 5)


def step(model, x, gradient):
    """Outputs, gradients of parameters (sums over the batch) and buffers."""
    out = model(x)
    out.backward(gradient.to(out.dtype))
    grads = {f"d {name}": p.grad for name, p in model.named_parameters()}
    return {"out": out.detach()} | grads | {name: b for name, b in model.named_buffers() if b.is_floating_point()}


def one_process(rank, address, path, dtype):
    """What each of the processes does (this file, run as a script)."""
    dtype = getattr(torch, dtype)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=len(SHARES))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network(fused=True)).to(dtype)
    assert all(block.why_not_fused() is None for stage in model.blocks for block in stage)
    first = sum(SHARES[:rank])
    x, gradient = (t[first : first + SHARES[rank]] for t in batch())
    torch.save(step(model, x.to(dtype), gradient), path)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_two_processes_are_one(dtype, tmp_path, device):
    if device != "cpu":
        pytest.skip("two processes of the interpreter")
    tests = Path(__file__).parent
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tests.parents[1]), str(tests), str(tests.parent)]),
        "OMP_NUM_THREADS": "1",
    }
    commands = [
        [
            sys.executable,
            __file__,
            str(rank),
            f"file://{tmp_path}/meeting",
            str(tmp_path / f"{rank}.pt"),
            str(dtype).split(".")[1],
        ]
        for rank in range(len(SHARES))
    ]
    processes = [
        subprocess.Popen(c, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(SHARES))]
    fused, cancelled = {}, {}
    for name, value in parts[0].items():
        if name == "out":
            fused[name] = torch.cat([part[name] for part in parts])
        elif name.startswith("d "):
            shares = [part[name].double() for part in parts]
            fused[name] = sum(shares)
            cancelled[name] = torch.stack(shares).norm() / fused[name].norm()
        else:
            assert torch.equal(value, parts[1][name]), f"{name} differs between the processes"
            fused[name] = value
    x, gradient = batch()
    eager = step(network(fused=False).to(dtype), x.to(dtype), gradient)
    truth = step(network(fused=False).to(dtype).double(), x.to(dtype).double(), gradient.double())
    # A constant of every channel, which the next BatchNorm takes away: zero but for rounding, and that has no error to
    # be twice of.
    for result in (fused, eager, truth):
        for norm in ("blocks.0.0.bn2", "blocks.1.0.bn3"):
            constant = result.pop(f"d {norm}.bias").double().norm()
            rounding = constant / result[f"d {norm}.weight"].double().norm()
            assert rounding < 8 * torch.finfo(dtype).eps, (norm, rounding)
    # Gradients of two processes may cancel, by a factor of 8 those of blocks.1.1.bn1.bias: their rounding is then as
    # much larger beside the sum than that of one process, which adds the same pixels in another order.
    for name, factor in cancelled.items():
        if name in fused and factor > 2:
            error, plain = (relative_error(result.pop(name), truth[name]) for result in (fused, eager))
            del truth[name]
            assert error <= factor * plain + 1e-6, (name, error, plain, factor)
    assert_close_to_truth(fused, eager, truth)


if __name__ == "__main__":
    one_process(int(sys.argv[1]), *sys.argv[2:])
