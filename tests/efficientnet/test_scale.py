"""Compound scaling as a tool: budgets, the paper's other networks, the command."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from efficientnet import create_model
from efficientnet.model.config import EfficientNetConfig, scaled_name
from efficientnet.model.profile import count_macs, count_parameters, stage_table
from efficientnet.model.scaling import Scaling, coefficient_grid, compound_scale, largest_phi
from efficientnet.scaling_study.networks import BASES, create_scaled
from efficientnet.scaling_study.table3 import TABLE_3
from support.command_line import assert_one_line


def test_a_name_says_depth_width_and_resolution():
    scaling = Scaling(1.2, 1.1, 258)
    assert scaled_name(scaling) == "efficientnet_d1.2_w1.1_r258"
    config = EfficientNetConfig.from_name("efficientnet_d1.2_w1.1_r258")
    assert config == EfficientNetConfig.from_scaling(scaling, name=config.name)
    assert EfficientNetConfig.from_name("tf_efficientnet_d1.2_w1.1_r258").padding == "same"
    with pytest.raises(ValueError, match="depth, width and resolution as in"):
        EfficientNetConfig.from_name("efficientnet_d1.2.3_w1.1_r258")
    with pytest.raises(ValueError, match="width finite and > 0, got"):
        EfficientNetConfig.from_name("efficientnet_d1_w0_r258")
    with pytest.raises(ValueError, match="unknown model"):
        EfficientNetConfig.from_name("efficientnet_d1.2_w1.1")


def test_largest_phi_is_the_last_that_fits():
    asked = []

    def cost(phi):
        asked.append(phi)
        return 100 * 1.9**phi

    for budget in (100, 101, 190, 1000, 123_456):
        asked.clear()
        phi = largest_phi(cost, budget)
        assert cost(phi) <= budget < cost(phi + 0.01)
        assert max(asked[:-2]) <= max(1.0, 2 * (phi + 0.01))
    assert largest_phi(cost, 99.9) is None
    assert largest_phi(cost, 1e9, phi_max=3.0) == 3.0


@pytest.mark.parametrize("base", ["efficientnet_b0", "resnet50"])
def test_costs_never_fall_as_phi_grows(base):
    """What the bisection relies on."""
    models = [
        create_scaled(base, compound_scale(phi / 20), fused=False, device="meta") for phi in (0, 1, 2, 9, 10, 20, 21)
    ]
    for counted in (count_parameters, count_macs):
        costs = [counted(model) for model in models]
        assert costs == sorted(costs) and costs[0] < costs[-1]


def calibrated(model):
    """Random BatchNorm weights and biases, and running statistics of what the layers then see, so that images make a
    difference.
    """
    torch.manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.momentum = 1.0
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias, 0.0, 0.2)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
    return model.eval()


def load_in_order(model, oracle):
    """The oracle's tensors into the model, one after the other, whatever their names; the shapes must agree."""
    ours, theirs = model.state_dict(), oracle.state_dict()
    assert [tuple(t.shape) for t in ours.values()] == [tuple(t.shape) for t in theirs.values()]
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))


def oracle(base, torchvision, timm):
    if base == "mobilenet_v1":
        return timm.create_model("mobilenetv1_100")
    return getattr(torchvision.models, base)(weights=None)


@pytest.mark.parametrize(
    "base, parameters, gmacs",
    [("mobilenet_v1", 4_231_976, 0.569), ("mobilenet_v2", 3_504_872, 0.301), ("resnet50", 25_557_032, 4.089)],
)
def test_unscaled_networks_are_those_of_the_libraries(torchvision, timm, base, parameters, gmacs):
    """The same parameters, MACs and, with the library's weights, logits."""
    theirs, ours = calibrated(oracle(base, torchvision, timm)), create_scaled(base)
    load_in_order(ours, theirs)
    assert count_parameters(ours) == count_parameters(theirs) == parameters
    assert count_macs(ours) == count_macs(theirs, 224) and round(count_macs(ours) / 1e9, 3) == gmacs
    torch.manual_seed(0)
    images = torch.randn(2, 3, 65, 48)
    with torch.no_grad():
        expected, logits = theirs(images), ours.eval()(images)
    assert (expected[0] - expected[1]).norm() > 0.1 * expected.norm()
    assert (logits - expected).norm() <= 1e-5 * expected.norm()


def test_resnet50_has_the_names_of_torchvision(torchvision):
    ours = create_scaled("resnet50", device="meta").state_dict()
    assert list(ours) == list(torchvision.models.resnet50(weights=None).state_dict())


def test_scaled_mobilenet_v2_is_timms(timm):
    """timm's mobilenetv2_120d is width 1.2, depth 1.4 with stem, first and last stage's depth left alone: the stages
    between agree.
    """
    theirs = timm.create_model("mobilenetv2_120d", device="meta")
    ours = create_scaled("mobilenet_v2", Scaling(1.4, 1.2, 224), fused=False, device="meta")
    for stage in range(2, 6):
        assert len(ours.blocks[stage]) == len(theirs.blocks[stage])
        assert count_parameters(ours.blocks[stage]) == count_parameters(theirs.blocks[stage])


# GMACs of these definitions, row by row, as the README has them beside the paper's.
OURS = {
    "mobilenet_v1": (0.569, 2.216, 2.272, 2.470),
    "mobilenet_v2": (0.301, 1.220, 1.137, 1.199, 1.442),
    "resnet50": (4.089, 14.571, 16.117, 16.351, 15.946),
}


@pytest.mark.parametrize("base", TABLE_3)
def test_table_3(base):
    for row, expected in zip(TABLE_3[base], OURS[base], strict=True):
        model = create_scaled(
            base, Scaling(row.depth, row.width, round(224 * row.resolution)), fused=False, device="meta"
        )
        assert round(count_macs(model) / 1e9, 3) == expected
        # Nothing is rounded there: the paper's figure is met but for its digits.
        if row.what in ("baseline", "resolution"):
            assert abs(expected / row.gmacs - 1) < 0.06


@pytest.mark.parametrize("base", BASES)
def test_rows_add_up_to_the_totals(base):
    model = create_scaled(base, Scaling(1.3, 0.9, 97), num_classes=7, in_chans=4, fused=False, device="meta")
    rows = stage_table(model)
    assert sum(r.params for r in rows) == count_parameters(model)
    assert sum(r.macs for r in rows) == count_macs(model)
    assert rows[0].input_size == (97, 97) and rows[0].output_size == ((25, 25) if base == "resnet50" else (49, 49))
    assert [r.output_size for r in rows] == [r.input_size for r in rows[1:]] + [(1, 1)]


@pytest.mark.parametrize("base", ["mobilenet_v1", "mobilenet_v2", "resnet50"])
def test_scaled_networks_train(base):
    """A few steps on eight images: every parameter has a gradient, and the loss falls."""
    torch.manual_seed(0)
    model = create_scaled(base, Scaling(1.2, 0.25, 32), num_classes=5).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    images, labels, losses = torch.randn(8, 3, 64, 64), torch.arange(8) % 5, []
    for _ in range(10):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


def test_unknown_base():
    with pytest.raises(
        ValueError, match="base must be one of efficientnet_b0, mobilenet_v1, mobilenet_v2, resnet50, got 'vgg'"
    ):
        create_scaled("vgg")


def figures(out):
    """(phi, parameters, MACs summed over the stages) that the command printed."""
    phi = float(re.search(r"at phi ([\d.]+):", out)[1])
    parameters = int(re.search(r"^([\d,]+) parameters", out, re.MULTILINE)[1].replace(",", ""))
    rows = [line.split() for line in out.split("\n\n")[0].splitlines()[1:]]
    return phi, parameters, sum(int(row[-1].replace(",", "")) for row in rows)


def test_scale_by_phi_is_compound_scale(run):  # noqa: F811
    code, out, _ = run("scale", "--phi", 1)
    assert code == 0 and "depth 1.2, width 1.1, resolution 258" in out
    name = re.search(r"a name for create_model and train: (\S+)", out)[1]
    model = create_model(name, fused=False, device="meta")
    assert (model.config.resolution, count_parameters(model), count_macs(model)) == (258, *figures(out)[1:])
    assert count_parameters(create_model(compound_scale(1), fused=False, device="meta")) == count_parameters(model)


@pytest.mark.parametrize(
    "base, option, budget",
    [
        ("efficientnet_b0", "--flops", "700M"),
        ("efficientnet_b0", "--params", "6.1M"),
        ("mobilenet_v1", "--flops", "1.1e9"),
    ],
)
def test_scale_to_a_budget_is_the_largest_that_fits(run, base, option, budget):  # noqa: F811
    code, out, _ = run("scale", "--base", base, option, budget)
    assert code == 0
    phi, parameters, macs = figures(out)
    limit = {"700M": 7e8, "1.1e9": 1.1e9, "6.1M": 6.1e6}[budget]
    larger = figures(run("scale", "--base", base, "--phi", f"{phi + 0.01:.2f}")[1])
    assert (macs if option == "--flops" else parameters) <= limit < larger[2 if option == "--flops" else 1]


def test_scale_to_a_latency(run, monkeypatch):  # noqa: F811
    """Latency stands for what a clock says: here a stopwatch that reads 10 ms for a GMAC."""
    from efficientnet.measure.latency import Latency

    def clock(model, image_size, device, batch_size):
        assert image_size == model.config.resolution and batch_size == 3 and device.type == "cpu"
        return Latency(10 * count_macs(model) / 1e9, 0.5)

    monkeypatch.setattr("efficientnet.measure.latency.measure_latency", clock)
    code, out, err = run("scale", "--latency", 8, "--device", "cpu", "--batch-size", 3)
    phi, _, macs = figures(out)
    assert code == 0 and macs <= 8e8 and f"{macs / 1e8:.2f} ms (interquartile range 0.50) for 3 images" in out
    assert figures(run("scale", "--phi", f"{phi + 0.05:.2f}")[1])[2] > 8e8
    assert re.search(rf"^phi {phi:<5g} +{macs / 1e8:.2f} ms$", err, re.MULTILINE)


def test_measured_latency():
    """Milliseconds of a forward, in eval and without gradients: at least what this one takes, however busy the machine
    is.
    """
    from efficientnet.measure.latency import measure_latency

    class Sleeper(torch.nn.Module):
        def forward(self, x):
            assert x.shape == (3, 3, 16, 16) and not self.training and not torch.is_grad_enabled()
            time.sleep(0.02)

    found = measure_latency(Sleeper(), 16, torch.device("cpu"), batch_size=3, seconds=0.05)
    assert found.ms >= 20 and found.iqr >= 0


def test_scale_prints_the_papers_table(run):  # noqa: F811
    code, out, _ = run("scale", "--base", "mobilenet_v2")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and rows[1] == ["baseline", "1", "1", "1", "(224)", "3,504,872", "0.301", "0.3", "72.0"]
    assert [row[0] for row in rows[1:6]] == ["baseline", "depth", "width", "resolution", "compound"]
    assert "arXiv 1905.11946v5, Table 3" in out


def test_the_grid_has_the_papers_point_and_keeps_to_the_constraint():
    grid = coefficient_grid()
    assert (1.2, 1.1, 1.15) in grid and len(grid) == len(set(grid)) == 51
    assert all(1.9 <= round(a * b**2 * c**2, 9) <= 2 and min(a, b, c) >= 1 for a, b, c in grid)
    # By brute force over a finer lattice of integers, in hundredths.
    fine = range(100, 205, 5)
    expected = [(a, b, c) for a in fine for b in fine for c in fine if 1.9e10 <= a * b**2 * c**2 <= 2e10]
    assert [tuple(round(100 * x) for x in point) for point in grid] == expected
    with pytest.raises(ValueError, match=r"step must be in \[0.01, 0.5\], got 0"):
        coefficient_grid(0)
    with pytest.raises(ValueError, match="at_least and at_most must be in order"):
        coefficient_grid(0.1, 2.0, 1.9)
    with pytest.raises(ValueError, match="leaves no alpha"):
        coefficient_grid(0.3, 1.97, 1.98)


SEARCH = ("scale", "--search", "--step", 0.2)  # three candidates: all into resolution, all into width, all into depth


def test_search_by_macs(run, tmp_path):  # noqa: F811
    """Ranked by how close rounding lets each come to twice the base."""
    output = tmp_path / "r.json"
    code, out, err = run("scale", "--search", "--objective", "macs", "--step", 0.1, "--output", output)
    result = json.loads(output.read_text())
    assert code == 0 and "9/9" in err
    base = count_macs(create_model("b0", fused=False, device="meta"))
    for row in result["rows"][::4]:
        model = create_model(compound_scale(1, row["alpha"], row["beta"], row["gamma"]), fused=False, device="meta")
        assert (row["macs"], row["parameters"]) == (count_macs(model), count_parameters(model))
        assert row["macs_of_base"] == row["macs"] / base
    best = min(result["rows"], key=lambda row: max(row["macs_of_base"] / 2, 2 / row["macs_of_base"]))
    assert (
        result["best"] == best and "9 candidates; the best as options of scale: --alpha 1 --beta 1 --gamma 1.4" in out
    )
    assert out.splitlines()[1].split()[:4] == ["1", "1.0", "1.0", "1.4"]


def test_search_by_latency(run, tmp_path, monkeypatch):  # noqa: F811
    """A clock that makes width dear; networks that round to the same are timed once, and a second run times nothing."""
    from efficientnet.measure.latency import Latency

    timed = []

    def clock(model, image_size, device, batch_size):
        timed.append(count_parameters(model))
        assert batch_size == 2 and model.config.resolution == image_size
        return Latency(count_macs(model) / 1e7 * (1 + model.config.stem_channels / 32), 0.5)

    monkeypatch.setattr("efficientnet.measure.latency.measure_latency", clock)
    argv = (
        "scale",
        "--search",
        "--base",
        "mobilenet_v2",
        "--step",
        0.2,
        "--at-least",
        1.8,
        "--img-size",
        64,
        "--batch-size",
        2,
    )
    argv = (*argv, "--device", "cpu", "--output", tmp_path / "r.json")
    code, out, _ = run(*argv)
    result = json.loads((tmp_path / "r.json").read_text())
    rows = result["rows"]
    assert code == 0 and len(timed) == 3 and len(rows) == 4  # alpha 1.8 and 2 give the same repeats
    assert all(row["ms_per_gmac"] == pytest.approx(row["ms"] / 2 / (row["macs"] / 1e9)) for row in rows)
    assert result["best"]["beta"] == 1.0 and result["search"]["base"] == "mobilenet_v2"
    before = (tmp_path / "r.json").read_text(), len(timed)
    assert run(*argv)[1] == out
    assert ((tmp_path / "r.json").read_text(), len(timed)) == before


def test_search_by_training_survives_a_kill(run, image_folder, tmp_path, monkeypatch):  # noqa: F811
    """Killed within its first training and started again, a search ends with the figures of one that never stopped."""
    from efficientnet.training.trainer import Trainer

    resumed = []

    class Spy(Trainer):
        def __init__(self, config):
            super().__init__(config)
            resumed.append((self.output.name, self.step))

    options = (
        *SEARCH,
        "--data",
        f"imagefolder:{image_folder}",
        "--img-size",
        8,
        "--epochs",
        2,
        "--batch-size",
        10,
        "--lr",
        3e-3,
    )
    argv = [str(arg) for arg in (*options, "--device", "cpu", "--output")]
    killed, whole = tmp_path / "killed.json", tmp_path / "whole.json"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "efficientnet", *argv, killed], env=env, stdout=-3, stderr=-3)
    try:
        deadline = time.monotonic() + 120
        while (
            not list(tmp_path.glob("killed.json.runs/*/metrics.jsonl"))
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(tmp_path.rglob("*.train.pt")), "it was to be killed while it trained"
    before = json.loads(killed.read_text())
    unfinished = [path.parent for path in tmp_path.glob("*/*/metrics.jsonl") if path.read_text().count("\n") < 2]
    steps = {
        folder.name: int(re.search(r"\d+", max(path.name for path in folder.rglob("*.train.pt")))[0])
        for folder in unfinished
    }
    monkeypatch.setattr("efficientnet.training.trainer.Trainer", Spy)
    assert before["best"] is None and len(before["rows"]) < 3
    for output in (killed, whole):
        code, out, _ = run(*argv, output)
        assert code == 0 and "3 candidates; the best as options of scale: --alpha" in out
    assert {name: step for name, step in resumed if step} == steps
    result = json.loads(whole.read_text())
    assert json.loads(killed.read_text()) == result
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.json", "whole.json"]
    assert [(row["alpha"], row["beta"], row["gamma"]) for row in result["rows"]] == [
        (1, 1, 1.4),
        (1, 1.4, 1),
        (2, 1, 1),
    ]
    assert all(0 <= row["accuracy"] <= 1 and row["loss"] > 0 for row in result["rows"])

    # What is best: the accuracy decides, then the loss.
    for row, (accuracy, loss) in zip(result["rows"], ((0.2, 1.0), (0.9, 2.0), (0.9, 1.5)), strict=True):
        row |= {"accuracy": accuracy, "loss": loss}
    whole.write_text(json.dumps(result))
    assert "the best as options of scale: --alpha 2 --beta 1 --gamma 1" in run(*argv, whole)[1]
    assert json.loads(whole.read_text())["best"] == result["rows"][2]


def test_a_search_of_other_settings_is_not_continued(run, tmp_path):  # noqa: F811
    output = tmp_path / "r.json"
    argv = (*SEARCH, "--objective", "macs", "--output", output)
    assert run(*argv)[0] == 0
    assert_one_line(run(*argv, "--img-size", 96), r"r.json' is of a search with img_size 224, but this one has 96")
    output.write_text("{}")
    assert_one_line(run(*argv), "r.json' exists and is no result of a search")
    assert output.read_text() == "{}"


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "scale needs one of --phi, --flops, --params, --latency, --search"),
        (["--base", "vgg"], "base must be one of efficientnet_b0, .*resnet50, got 'vgg'"),
        (["--phi", -1], r"phi must be in \[0, 16\], got -1.0"),
        (["--phi", "nan"], r"phi must be in \[0, 16\], got nan"),
        (["--phi", 1, "--flops", "1G"], "not allowed with argument"),
        (["--phi", 1, "--alpha", 3], r"alpha \* beta\^2 \* gamma\^2 must be about 2"),
        (["--phi", 1, "--img-size", 0], "base_resolution must be an integer >= 1, got 0"),
        (["--phi", 1, "--num-classes", -1], "num_classes must be an integer >= 0, got -1"),
        (["--flops", "3x"], "must be a number > 0 such as 400M, 1.8G or 4.2e9, got '3x'"),
        (["--flops", "-1G"], "must be a number > 0|expected one argument"),
        (
            ["--flops", "1M"],
            r"flops 1e\+06 is less than the 3.85815e\+08 multiply-accumulates of the unscaled efficientnet_b0",
        ),
        (["--params", "2M", "--base", "resnet50"], "less than the 2.5557e.07 parameters of the unscaled resnet50"),
        (["--latency", "nan"], "latency must be a finite number of milliseconds > 0, got nan"),
        (["--data", "digits", "--phi", 1], "data is for --search"),
        (["--search", "--data", "mnist"], "data must be .*'mnist'"),
        (["--search", "--objective", "size"], "objective must be one of accuracy, latency, macs, got 'size'"),
        (["--search", "--step", 0], r"step must be in \[0.01, 0.5\], got 0.0"),
        (["--search", "--at-least", 3], "at_least and at_most must be in order"),
        (
            ["--search", "--objective", "accuracy"],
            "data is what objective accuracy is measured on, got objective 'accuracy' and data None",
        ),
        (
            ["--search", "--data", "digits", "--base", "resnet50"],
            "base must be efficientnet_b0 for objective accuracy, got 'resnet50'",
        ),
        (["--search", "--data", "digits", "--epochs", 0], "epochs must be an integer >= 1, got 0"),
        (
            ["--search", "--output", "/no/such/r.json"],
            "output '/no/such/r.json' must be a file in a folder that exists",
        ),
        (["--latency", 5, "--batch-size", 0], "batch_size must be an integer >= 1, got 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, argv, message, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert_one_line(run("scale", *argv), message)
    assert not list(tmp_path.iterdir())
