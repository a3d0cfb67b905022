"""Kernels are compiled before the first step, by other processes. There is no GPU here: Triton compiles for an H100,
or a stand-in of its driver compiles nothing and starts nothing.
"""

import json

import pytest
import torch
from torch import nn

from effkernels import FusedMBConv, warm_up
from support.python import run_python


def test_warm_up_compiles_all_that_a_step_starts_and_changes_nothing():
    """Of a training step and of inference: afterwards Triton compiles nothing more. Modes, buffers, gradients and
    random numbers are as before, and no kernel was started.
    """
    found = run_python(
        """
        import json
        import torch
        from effkernels import FusedMBConv, dispatch, warm_up
        from effkernels.tools import stand_in_driver
        dispatch.platform_problem = lambda *device: None
        dispatch.without_triton_on_cpu = lambda: False
        compiled, compile = [], stand_in_driver._compile
        def noting(source, *args, **rest):
            compiled.append(source.fn.__name__)
            return compile(source, *args, **rest)
        stand_in_driver._compile = noting
        block = FusedMBConv(16, 16, drop_path=0.2)
        block.conv_dw.eval()
        block.conv_dw.weight.grad = torch.ones_like(block.conv_dw.weight)
        x = torch.zeros(2, 16, 8, 8)
        before = {name: value.clone() for name, value in block.state_dict().items()}
        random, found = torch.get_rng_state(), {}
        with stand_in_driver.standing_in() as started:
            for training in (True, False):
                reports, first = [], len(compiled)
                kernels = warm_up(block, x, training, processes=2, report=lambda *done: reports.append(done))
                assert reports == [(i, kernels) for i in range(1, kernels + 1)], reports
                warmed = len(compiled)
                assert started() == 0 and warmed - first >= kernels > 0
                assert block.training and not block.conv_dw.training
                assert torch.equal(random, torch.get_rng_state())
                assert all(torch.equal(v, before[name]) for name, v in block.state_dict().items())
                assert torch.equal(block.conv_dw.weight.grad, torch.ones_like(block.conv_dw.weight))
                assert block.conv_pw.weight.grad is None
                found[training] = kernels, warmed
            assert warm_up(block, x, True) == 0
            for training in (True, False):
                block.train(training)
                with torch.set_grad_enabled(training):
                    out = block(x)
                    if training:
                        out.sum().backward()
            assert started() > 0
            print(json.dumps([len(compiled) - found[False][1], found[True][0], found[False][0]]))
        """,
        TRITON_INTERPRET="0",
    )
    later, training, inference = json.loads(found)
    assert later == 0 and training > inference > 0


def test_processes_fill_the_cache_on_disk(tmp_path):
    """What they compile is found by this process and by every later one; a folder that cannot be written is said, and
    another takes its place.
    """
    code = """
        import json, warnings
        import torch
        import triton
        from effkernels import functional
        from effkernels.compilation import cache_folder, collected, compile_launches
        from effkernels.configs import tables
        from effkernels.parameters import BatchNormParams
        from effkernels.tools.stand_in_driver import compiling_for_h100
        one = torch.nn.BatchNorm2d(8, device="meta").eval().requires_grad_(False)
        with collected() as launches, torch.no_grad():
            for dtype in (torch.float32, torch.bfloat16):
                functional.bn_act_add(torch.empty(2, 8, 4, 4, device="meta", dtype=dtype), BatchNormParams.of(one))
        with compiling_for_h100(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            counts = [len(compile_launches(launches, processes=2)), len(compile_launches(launches, processes=2))]
            print(json.dumps([counts, cache_folder(), [str(w.message) for w in warned if "cache" in str(w.message)]]))
        """
    folder = tmp_path / "cache"
    counts, used, warned = json.loads(run_python(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(folder)))
    assert counts == [2, 0] and used == str(folder) and not warned
    compiled = {path: path.stat().st_mtime_ns for path in folder.rglob("*.cubin")}
    assert len(compiled) == 2
    run_python(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(folder))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.cubin")} == compiled, "a later process reads them"

    file = tmp_path / "file"
    file.write_text("not a folder")
    counts, used, warned = json.loads(run_python(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(file)))
    assert counts == [2, 0] and used != str(file)
    assert len(warned) == 1 and f"cache folder '{file}' cannot be written (" in warned[0]
    assert "TRITON_CACHE_DIR" in warned[0]


def test_bad_input(monkeypatch):
    x = torch.zeros(1, 8, 4, 4)
    with pytest.raises(ValueError, match="model runs no fused kernels for x of shape .*: .*on the CPU"):
        warm_up(FusedMBConv(8, 8), x)
    with pytest.raises(TypeError, match="model must be a Module, got int"):
        warm_up(3, x)
    with pytest.raises(TypeError, match="x must be a Tensor, got list"):
        warm_up(FusedMBConv(8, 8), [x])
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        warm_up(FusedMBConv(8, 8), x, processes=0)
    from effkernels import dispatch

    monkeypatch.setattr(dispatch, "platform_problem", lambda *device: None)
    with pytest.raises(ValueError, match="it has no fused block"):
        warm_up(nn.Conv2d(8, 8, 1), x)
    monkeypatch.setattr(dispatch, "why_not_fused", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match=r"the model does not take x of shape \(1, 3, 4, 4\): .*8"):
        warm_up(FusedMBConv(8, 8), torch.zeros(1, 3, 4, 4))
