"""Floors of a network's kernels: by hand, and as the command prints and draws them."""

import json

import pytest
import torch

from benchmarks import plan, results, shapes
from benchmarks.schedule_bytes import works
from efficientnet import create_model
from efficientnet.measure import roofline
from efficientnet.measure.roofline import block_works, floors, model_works
from efficientnet.model.profile import count_macs
from effkernels.configs.gpus import GPUS, Gpu, gpu_of

BLOCK = shapes.blocks("b0")[1]  # 16 -> 96 -> 24, 3x3 at stride 2, 112 pixels
UNIT = Gpu("unit", bandwidth=1.0, processors=1, clock=1.0, matrix=1.0)


@pytest.mark.parametrize("name", ["b0", "b4"])
def test_multiply_accumulates_are_the_networks_own(name):
    """All but squeeze-excite's and the classifier's, which the schedule leaves out as too small."""
    model = create_model(name, fused=False, device="meta")
    counted = sum(work.products + work.taps for work in model_works(model, False))
    assert 0.99 * count_macs(model) < counted < count_macs(model)
    assert [work._replace(block=None) for work in works(shapes.model(name), False)] == [
        work._replace(block=None) for work in model_works(model, False)
    ]


def test_floors_by_hand():
    expand, depthwise, project = block_works(BLOCK, False)
    e1, e2 = 96 * 112**2, 96 * 56**2
    assert (expand.elements, expand.products, expand.taps, expand.activations) == (16 * 112**2 + e1, 16 * e1, 0, e1)
    assert (depthwise.elements, depthwise.products, depthwise.taps) == (e1 + e2, 0, 9 * e2)
    assert project.products == 24 * e2
    times = floors(depthwise, UNIT, 2, torch.bfloat16, weights=96 * 9, instructions=10 * e2)
    expected = {
        "bytes": 2 * (2 * (e1 + e2) + 864),
        "matrix": 0,
        "FMA": 2 * 9 * e2 / 128,
        "SFU": 2 * e2 / 16,
        "issue": 20 * e2 / 128,
    }
    assert times == pytest.approx(expected)
    wide = floors(expand, UNIT, 1, torch.float32)  # no 16-bit matrix units, two special functions an activation
    assert (wide["matrix"], wide["FMA"], wide["SFU"]) == (0, 16 * e1 / 128, 2 * e1 / 16)


def test_a_step_is_the_sum_of_its_kernels():
    for training in (False, True):
        *lines, step = plan.plan("b0", training, GPUS["h200"], 256)
        assert step.floor == pytest.approx(sum(line.floor for line in lines))
        assert step.floor >= max(step.times.values()), "no resource takes longer than the floor"
        moved = 2 * roofline.elements(works(shapes.model("b0"), training))
        assert step.times["bytes"] == pytest.approx((256 * moved + (40 if training else 2) * 5.28e6) / 4.3e12, rel=0.01)
        assert all(line.measured is None and line.share is None for line in (*lines, step))
    slower = plan.plan("b0", False, GPUS["a100"], 256)[-1]
    assert slower.floor > 2 * plan.plan("b0", False, GPUS["h200"], 256)[-1].floor


def test_a_depthwise_that_transforms_on_load_is_bound_by_issue_slots():
    lines = {line.kernel: line for line in plan.plan("b0", True, GPUS["h200"], 256)}
    assert lines["depthwise backward"].binds == "issue" and lines["expand"].binds == "bytes"


def row(**info):
    extra = {
        "device": "NVIDIA H200",
        "cuda": "13.0",
        "dtype": "bfloat16",
        "batch_size": 256,
        "variant": "ours",
        "step": "inference",
    } | info
    return {"fullname": json.dumps(info, sort_keys=True), "extra_info": extra}


def test_measured_times_stand_beside(tmp_path, capsys):
    model = shapes.model("b0")
    measured = [row(shape=str(model), median_ms=4.0)]
    measured += [row(shape=str(shapes.kernel_of("expand", block)), median_ms=0.1) for block in shapes.blocks("b0")]
    measured.append(row(shape=str(shapes.blocks("b0")[0].depthwise), median_ms=0.1))  # one of many: no sum
    (tmp_path / "r.json").write_text(json.dumps({"benchmarks": measured}))
    rows = results.load(tmp_path)
    lines = {line.kernel: line for line in plan.plan("b0", False, GPUS["h200"], 256, rows=rows)}
    assert lines["step"].measured == pytest.approx(4e-3) and 0.3 < lines["step"].share < 0.5
    assert lines["expand"].measured == pytest.approx(15 * 1e-4) and lines["depthwise"].measured is None
    how = ["--mode", "infer", "--results", str(tmp_path), "--plot", str(tmp_path / "roof.png")]
    assert plan.main(how) == 0
    shown = capsys.readouterr().out
    assert (
        "| step | 49 | 27.42 |" in shown
        and "| 4.000 | " in shown
        and "| depthwise |" in shown
        and results.NOT_YET in shown
    )
    assert (tmp_path / "roof.png").read_bytes()[:4] == b"\x89PNG"
    plan.main([*how, "--gpu", "a100"])  # measured on another GPU
    assert "4.000" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "device, name",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_a_gpu_is_known_by_its_name(device, name):
    assert gpu_of(device) is (GPUS[name] if name else None)


def test_later_results_replace_earlier_ones(tmp_path):
    assert results.load(tmp_path / "none") == [] == results.load(tmp_path)
    for i, name in enumerate("ab"):
        rows = [{"fullname": "row", "extra_info": {"median_ms": i, "shape": "s"}}]
        (tmp_path / f"{name}.json").write_text(json.dumps({"benchmarks": rows}))
    (tmp_path / "state.json").write_text("[]")
    (found,) = results.load(tmp_path)
    assert (
        found["median_ms"] == 1
        and results.find([found], shape="s") is found
        and results.find([found], shape="t") is None
    )
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ValueError, match="state.json is not JSON"):
        results.load(tmp_path)


@pytest.mark.parametrize("option", ["--bandwidth", "--clock", "--batch-size"])
def test_bad_rates(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        plan.main([option, "-1"])
    assert stopped.value.code == 2 and f"{option} must be above 0, got -1" in capsys.readouterr().err


def test_a_prediction_stands_below_the_floors(monkeypatch, capsys):
    pytest.importorskip("triton")
    from effkernels.tools import networks
    from effkernels.tools.simulator.steps import Step
    from effkernels.tools.traffic import Operator

    def predict_step(model, mode, batch, gpu):
        assert (model, mode, batch, gpu) == ("b0", "infer", 256, "h100")
        moved = Operator("aten::mm", 3.015e9, 0, 0)  # a millisecond of the bandwidth
        return Step(model, mode, batch, gpu, [], [moved])

    monkeypatch.setattr(networks, "predict_step", predict_step)
    plan.main(["--mode", "infer", "--gpu", "h100", "--predict"])
    assert "predicted, not measured: 1.000 ms, " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        plan.main(["--predict", "--dtype", "float32"])
    assert "--predict knows bfloat16 only, got --dtype float32" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plan.main(["--predict", "--clock", "1.5"])
    assert "--predict takes the figures of --gpu h200: leave --clock out" in capsys.readouterr().err
