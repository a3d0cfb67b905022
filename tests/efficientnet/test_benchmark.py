"""``efficientnet benchmark``: records under timm's keys, batch sizes that decay, wrong networks that are not timed."""

import csv
import io
import json

import pytest
import torch

from efficientnet import cli, create_model
from efficientnet.data.images import ImageSet
from efficientnet.data.order import Draw
from efficientnet.data.sets import load_data
from efficientnet.devices import out_of_memory
from efficientnet.errors import InputError
from efficientnet.measure import loader, model_benchmark
from efficientnet.measure.loader import Loader
from efficientnet.measure.model_benchmark import Benchmark, BenchmarkConfig, formatted, smaller_batch, with_decay
from efficientnet.model.profile import count_activations

SMALL = {"img_size": 32, "batch_size": 2, "num_warm_iter": 1, "num_bench_iter": 3}
# The columns of timm's results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv, and what its benchmark-infer-*.csv
# have besides.
TIMM = {"model", "{}_samples_per_sec", "{}_step_time", "{}_batch_size", "{}_img_size", "param_count"}
TIMM_INFER = {"infer_gmacs", "infer_macts"}


@pytest.fixture(scope="module")
def bench():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Benchmark(torch.device("cpu"))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_records(bench, mode):
    ours, eager = bench.run(BenchmarkConfig("b0", mode, **SMALL), "eager")
    for record in (ours, eager):
        assert {key.format(mode) for key in TIMM} | (TIMM_INFER if mode == "infer" else set()) <= set(record)
        assert record["model"] == "efficientnet_b0", "timm's name, whatever was typed"
        assert record["param_count"] == 5.29 and record[f"{mode}_batch_size"] == 2 and record[f"{mode}_img_size"] == 32
        time = record[f"{mode}_step_time"]
        assert 0 < record[f"{mode}_step_time_p20"] <= time <= record[f"{mode}_step_time_p80"]
        assert record[f"{mode}_samples_per_sec"] == pytest.approx(2e3 / time, rel=0.01)
        assert record[f"{mode}_gb_per_s"] / 1e-9 / bench.copy_bandwidth == pytest.approx(
            record[f"{mode}_share_of_copy"], abs=0.02
        )
        assert record["dtype"] == "float32" and record["timing"] == "process" and record["torch"] == torch.__version__
    assert (ours["implementation"], eager["implementation"]) == ("ours", "eager")
    assert "PyTorch reference for 16" in ours["backend"] and "backend" not in eager
    assert ours[f"{mode}_speedup"] == pytest.approx(eager[f"{mode}_step_time"] / ours[f"{mode}_step_time"], rel=0.02)
    assert ours[f"{mode}_difference"] < 1e-5 and f"{mode}_peak_memory_mb" not in ours, "memory is a GPU's"
    assert ours.get("infer_gmacs") == (0.01 if mode == "infer" else None)


@pytest.mark.parametrize("name, size, macts", [("b0", 224, 6.75), ("b0", 256, 8.81), ("b1", 240, 10.88)])
def test_activations_are_those_of_timms_results(name, size, macts):
    """Of its benchmark-infer-amp-nhwc-pt240-cu124-rtx3090.csv."""
    assert round(count_activations(create_model(name, device="meta"), size) / 1e6, 2) == macts


def test_the_compiler_starts_afresh_for_each_network(bench, monkeypatch):
    """Eight networks, or eight batch sizes, would reach its limit of recompilations: after it, eager runs under the
    compiler's name.
    """
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr(
        bench, "_measure", lambda config, batch, baseline: (_ for _ in ()).throw(torch.OutOfMemoryError(""))
    )
    for baseline, count in ((None, 0), ("eager", 0), ("compile", 1), ("compile-max-autotune", 2)):
        with pytest.raises(torch.OutOfMemoryError):
            bench.measure(BenchmarkConfig("b0", **SMALL), 2, baseline)
        assert len(resets) == count


def test_a_wrong_network_is_not_timed(bench, monkeypatch):
    build = model_benchmark.create_model

    def wrong(*args, fused, **kwargs):
        model = build(*args, fused=fused, **kwargs)
        if fused:
            model.conv_head.weight.data[:, 3] *= 1.5
        return model

    monkeypatch.setattr(model_benchmark, "create_model", wrong)
    monkeypatch.setattr(bench, "measure", lambda *args: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="outputs differ from plain PyTorch's by .*; not timed"):
        bench.run(BenchmarkConfig("b0", **SMALL))


def memory(error, fits):
    """A measurement of which batches above ``fits`` end with ``error``, and the batches it was asked for."""
    asked = []

    def measure(batch):
        asked.append(batch)
        if batch > fits:
            raise error
        return {"infer_batch_size": batch}

    return measure, asked


def test_the_batch_decays_until_it_fits():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ):
        measure, asked = memory(error, 30)
        said = []
        assert with_decay(measure, 100, say=said.append) == {"infer_batch_size": 24}
        assert asked == [100, 72, 48, 32, 24] and said[0] == "batch size 100 does not fit into memory, trying 72"
    measure, asked = memory(torch.OutOfMemoryError(""), 0)
    with pytest.raises(InputError, match="not even the smallest batch"):
        with_decay(measure, 9)
    assert asked == [9, 6, 4, 3, 2, 1]
    measure, asked = memory(ValueError("another"), 1)
    with pytest.raises(ValueError, match="another"):
        with_decay(measure, 9)
    assert not out_of_memory(RuntimeError("a bug")) and [smaller_batch(n) for n in (256, 8, 1)] == [192, 6, 0]


def test_the_baseline_starts_at_our_batch(bench, monkeypatch):
    asked = []

    def measure(config, batch, baseline=None):
        asked.append((baseline, batch))
        if batch > (8 if baseline is None else 6):
            raise torch.OutOfMemoryError("")
        return {
            "infer_batch_size": batch,
            "infer_samples_per_sec": 10.0 if baseline else 25.0,
            "infer_peak_memory_mb": 4.0,
        }

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "difference", lambda config: 1e-7)
    ours, other = bench.run(BenchmarkConfig("b0", batch_size=12, img_size=32), "compile")
    assert asked == [(None, 12), (None, 8), ("compile", 8), ("compile", 6)]
    assert ours["infer_speedup"] == 2.5 and ours["infer_memory_ratio"] == 1.0 and other["infer_batch_size"] == 6


def test_formats():
    records = [
        {"model": "b0", "implementation": "ours", "a": 1, "torch": "2"},
        {"model": "b0", "implementation": "eager", "a": 2, "torch": "2"},
    ]
    records[0] |= {"backend": "triton", "b": 3}
    assert json.loads(formatted(records, "json")) == records
    rows = list(csv.DictReader(io.StringIO(formatted(records, "csv"))))
    assert rows[0] == {"model": "b0", "implementation": "ours", "a": "1", "torch": "2", "backend": "triton", "b": "3"}
    assert rows[1]["b"] == ""
    table = formatted(records, "md").splitlines()
    assert table[0] == "| model | implementation | a | b |" and table[3] == "| b0 | eager | 2 |  |"
    assert table[-2:] == ["- torch: 2", "- b0: triton"]


def test_the_command(tmp_path, capsys):
    path = tmp_path / "r.json"
    arguments = (
        "--img-size 32 --batch-size 2 --num-warm-iter 1 --num-bench-iter 2 --results-format json --device cpu "
        "--num-classes 10"
    )
    assert cli.main(["benchmark", "--model", "b0..b1", *arguments.split(), "--results-file", str(path)]) == 0
    out = capsys.readouterr()
    records = json.loads(out.out)
    assert [record["model"] for record in records] == ["efficientnet_b0", "efficientnet_b1"] and json.loads(
        path.read_text()
    ) == records
    assert "b0 infer ours x2" in out.err, "a progress bar"


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_images_for_the_network(image_folder, capsys, monkeypatch, mode):
    """One core's images a second, and how many cores the network's speed takes; ours and the baseline alike."""
    monkeypatch.setattr(loader, "MOST_IMAGES", 40)
    options = f"--model b0 --mode {mode} --img-size 32 --batch-size 2 --num-warm-iter 1 --num-bench-iter 2 --device cpu"
    options += f" --baseline eager --results-format json --data {image_folder}"
    assert cli.main(["benchmark", *options.split()]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["implementation"] for record in records] == ["ours", "eager"]
    for record in records:
        assert record["loader_samples_per_sec"] > 0 and record["loader_cpu_ms"] > 0
        assert record["loader_samples_per_sec"] * record["loader_cpu_ms"] < 1100, "one thread: no more than the clock"
        needed = record[f"{mode}_samples_per_sec"] * record["loader_cpu_ms"] / 1e3
        assert record["loader_cores"] == pytest.approx(needed, abs=0.006)


def test_the_loader_reads_training_crops_or_held_out_images(image_folder, monkeypatch):
    asked, read = [], ImageSet.__getitem__
    monkeypatch.setattr(ImageSet, "__getitem__", lambda self, item: asked.append(item) or read(self, item))
    for training, kind in ((True, Draw), (False, int)):
        asked.clear()
        name = f"imagefolder:{image_folder}"
        measured, data = Loader(name, 32, training), load_data(name, 32)
        assert measured.images.images == (data.train if training else data.val).images
        assert measured._read(30, epoch=0) >= 30
        assert len(asked) >= 30 and all(type(item) is kind for item in asked)


def test_a_loader_without_images(tmp_path):
    for name in ("a", "b"):
        for i in range(12):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{i}.png").write_text("no image")
    with pytest.raises(InputError, match="no image can be read: cannot decode image '.*png'"):
        Loader(f"imagefolder:{tmp_path}", 32, False).measure()


def test_one_network_that_does_not_fit_or_is_wrong_does_not_stop_the_rest(monkeypatch, capsys):
    def run(self, config, baseline):
        if config.model == "b0":
            raise InputError("not even the smallest batch fits")
        if config.model == "b1":
            raise model_benchmark.WrongOutputs("the outputs differ")
        return [{"model": config.model, "implementation": "ours", "infer_step_time": 1.5}]

    monkeypatch.setattr(Benchmark, "run", run)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["benchmark", "--model", "b0", "b1..b3", "--device", "cpu", "--results-format", "json"])
    out = capsys.readouterr()
    assert stopped.value.code == 2 and "b0: not even the smallest batch fits; b1: the outputs differ" in out.err
    assert [(r["model"], "error" in r) for r in json.loads(out.out)] == [
        ("b0", True),
        ("b1", True),
        ("b2", False),
        ("b3", False),
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--model b9", "b9"),
        ("--data no/such/folder", "food101:ROOT, webdataset:SHARDS, got 'no/such/folder'"),
        ("--model b7..b0", "b7..b0"),
        ("--batch-size 0", "batch_size must be an integer >= 1, got 0"),
        ("--mode train --batch-size 1", "batch_size must be an integer >= 2, got 1"),
        ("--img-size 8", "img_size must be an integer >= 32 or two, height and width, got 8"),
        ("--num-bench-iter 1", "num_bench_iter must be an integer >= 2"),
        ("--baseline quick", "invalid choice: 'quick'"),
        ("--cuda-graph --device cpu", "needs a CUDA device"),
        (
            "--results-file /no/such/folder/x --img-size 32 --batch-size 1 --num-warm-iter 1 --num-bench-iter 2",
            "no such folder",
        ),
    ],
)
def test_bad_input(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["benchmark", *arguments.split()])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message.lower() in error.lower() and error.count("\n") == 1
