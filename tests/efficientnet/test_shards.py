"""Shards of webdataset: what is read, in which order, and that a position within an epoch can be returned to."""

import io
import json
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from efficientnet.data.images import Preprocess
from efficientnet.data.loading import Unreadable
from efficientnet.data.order import TrainingOrder
from efficientnet.data.sets import load_data
from efficientnet.data.shards import ShardLoader, ShardSet, find_shards, numbered
from efficientnet.errors import InputError, Interrupted
from efficientnet.training.run_state import RunStates, read_state
from efficientnet.training.runner import Runner
from efficientnet.training.settings import TrainConfig
from efficientnet.training.trainer import Trainer
from support import processes
from support.command_line import assert_one_line

wds = pytest.importorskip("webdataset", reason="webdataset is not installed")
CLASSES = 3
TINY = "efficientnet_d0.1_w0.5_r32"  # a block a stage, half the channels


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write_shards(root, counts, damage=()):
    """Shards of so many samples; sample i is a grey PNG of value i and class i % 3. ``damage``: sample -> what it is
    instead.
    """
    i = 0
    for number, count in enumerate(counts):
        with wds.TarWriter(str(root / f"s-{number:02d}.tar")) as writer:
            for _ in range(count):
                sample = {"__key__": f"{i:03d}", "png": png(i), "cls": str(i % CLASSES).encode(), "json": b"{}"}
                sample |= dict(damage).get(i, {})
                writer.write({field: value for field, value in sample.items() if value is not None})
                i += 1
    return str(root / f"s-{{00..{len(counts) - 1:02d}}}.tar")


def dataset_of(pattern, num_samples=None):
    """Without augmentation: a pixel is the sample's number."""
    return ShardSet(find_shards(pattern), numbered(CLASSES), num_samples, Preprocess(8))


def values(batches):
    """[sample numbers of each batch]; labels must fit."""
    found = []
    for (images, labels), _ in batches:
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 8, 8)
        found.append(images[:, 0, 0, 0].tolist())
        assert labels.tolist() == [value % CLASSES for value in found[-1]]
    return found


def training(dataset, total, epoch=0, step=0, *, workers=0, rank=0, world=1, accum=1, batch_size=4):
    order = TrainingOrder(total, batch_size, accum, rank, world, 0, lambda epoch: 8)
    order.begin(epoch, step)
    return ShardLoader(dataset, batch_size, order, rank, world, workers)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (2, 2)])
def test_evaluation_reads_each_sample_once(tmp_path, world, workers):
    dataset = dataset_of(write_shards(tmp_path, [5, 3, 4]))  # for the last, fewer shards than readers
    found = [values(ShardLoader(dataset, 2, None, rank, world, workers)) for rank in range(world)]
    assert sorted(value for part in found for batch in part for value in batch) == list(range(12))
    assert all(part for part in found)


def test_training_order_is_the_epochs_and_covers_the_samples(tmp_path):
    dataset = dataset_of(write_shards(tmp_path, [6, 6, 6, 6]))
    first, again, other = (values(training(dataset, 24, epoch)) for epoch in (0, 0, 1))
    assert first == again != other
    for epoch in (first, other):
        flat = [value for batch in epoch for value in batch]
        assert sorted(flat) == list(range(24)) and flat != sorted(flat)
    # Mixed across shards too.
    assert any(len({value // 6 for value in batch}) > 1 for batch in first)
    seeded = dataset_of(str(tmp_path / "s-*.tar"))
    seeded.seed = 1
    assert values(training(seeded, 24)) != first


def test_processes_and_workers_share_the_shards(tmp_path):
    """Sizes that differ: who is done early begins again, and all have the same number of batches."""
    dataset = dataset_of(write_shards(tmp_path, [9, 3, 9, 3, 9, 3, 9, 3]))

    def shards_of(batches):
        return {sum(value >= edge for edge in (9, 12, 21, 24, 33, 36, 45)) for batch in batches for value in batch}

    for workers in (0, 2):
        parts = [values(training(dataset, 48, rank=rank, world=2, workers=workers)) for rank in range(2)]
        assert [len(part) for part in parts] == [6, 6] and all(len(batch) == 4 for part in parts for batch in part)
        shards = [shards_of(part) for part in parts]
        assert not shards[0] & shards[1]
    firsts = {frozenset(shards_of(values(training(dataset, 48, epoch, world=2)))) for epoch in range(4)}
    assert len(firsts) > 1  # another half in another epoch
    assert values(training(dataset, 48, workers=1)) == values(training(dataset, 48, workers=0))


BAD = {
    3: {"png": png(3)[:40]},
    4: {"png": b"this is text"},
    9: {"cls": b"7"},
    10: {"cls": None},
    15: {"png": None},
}


@pytest.fixture
def damaged(tmp_path):
    """Five samples of 20 cannot be used, and the last of the four shards is cut in its third of five."""
    pattern = write_shards(tmp_path, [5, 5, 5, 5], BAD)
    path = tmp_path / "s-03.tar"
    with tarfile.open(path) as tar:
        size = tar.getmember("017.png").offset_data + 20
    path.write_bytes(path.read_bytes()[:size])
    return pattern


PROBLEMS = [
    "cannot decode image 's-00.tar:003'",
    "cannot decode image 's-00.tar:004'",
    "class of sample 's-01.tar:009' must be a number from 0 to 2, got '7'",
    "sample 's-02.tar:010' must have an image and a class (.cls), got json, png",
    "sample 's-03.tar:015' must have an image and a class (.cls), got cls, json",
    "cannot read shard ",
]
GOOD = set(range(18)) - {3, 4, 9, 10, 15, 17}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_named(damaged, workers):
    dataset = dataset_of(damaged)
    for loader in (ShardLoader(dataset, 3, None, num_workers=workers), training(dataset, 40, workers=workers)):
        problems = {problem for _, found in loader for problem in found}
        assert len(problems) == len(PROBLEMS)
        assert all(any(problem.startswith(start) for problem in problems) for start in PROBLEMS), problems
    evaluated = [batch for batch in ShardLoader(dataset, 3, None, num_workers=workers) if batch[0] is not None]
    assert sorted(value for batch in values(evaluated) for value in batch) == sorted(GOOD)
    batches = values(training(dataset, 40, workers=workers))
    assert [len(batch) for batch in batches] == [4] * 10 and {value for batch in batches for value in batch} == GOOD


def test_unreadable_samples_count_towards_the_limit(damaged):
    runner, dataset = Runner(torch.device("cpu")), dataset_of(damaged)
    said = []
    list(runner.batches(dataset, 3, unreadable=Unreadable(6, said.append)))
    assert len(said) == 6
    with pytest.raises(InputError, match="after 5 others that were skipped"):
        list(runner.batches(dataset, 3, unreadable=Unreadable(5, said.append)))


@pytest.mark.parametrize(("workers", "accum"), [(0, 1), (1, 2), (2, 1), (2, 2)])
def test_an_epoch_can_be_gone_on_with_from_any_update(damaged, workers, accum):
    """Augmented, with samples that cannot be read among the others."""
    dataset = dataset_of(damaged)
    dataset.augment = lambda image: image + torch.randint(0, 2, (1,), dtype=torch.uint8)

    def pixels(step):
        loader = training(dataset, 48, epoch=2, step=step, workers=workers, accum=accum)
        return [images[:, 0, 0, 0].tolist() for (images, _), _ in loader]

    whole = pixels(0)
    assert len(whole) == 12
    for step in range(1, 12 // accum):
        assert pixels(step) == whole[step * accum :]


def test_a_batch_without_a_readable_sample_borrows_from_the_next(tmp_path):
    """And leaves them there: three quarters of the samples are damaged, the epoch goes on from any update as before."""
    dataset = dataset_of(write_shards(tmp_path, [40], {i: {"png": b"text"} for i in range(40) if i % 4}))
    whole = values(training(dataset, 40, batch_size=2))
    drawn = [int(name[-3:]) for step in range(20) for name in training(dataset, 40, batch_size=2).names(0, step)]
    assert sorted(drawn) == list(range(40))
    batches = [drawn[i : i + 2] for i in range(0, 40, 2)]
    assert sum(all(value % 4 for value in batch) for batch in batches) > 3  # so is this how it went
    for at, (batch, found) in enumerate(zip(batches, whole, strict=True)):
        later = [value for value in drawn[2 * at + 2 :] if value % 4 == 0]
        if not all(value % 4 for value in batch):
            assert set(found) <= set(batch)
        elif later:
            assert found == later[:1] * 2
    for step in range(1, 20):
        assert values(training(dataset, 40, step=step, batch_size=2)) == whole[step:]


def test_augmentation_is_drawn_for_each_sample_and_epoch(tmp_path):
    dataset = dataset_of(write_shards(tmp_path, [8]))
    dataset.augment = lambda image: torch.full_like(image, int(torch.randint(0, 200, ())))

    def by_name(epoch):
        loader = training(dataset, 16, epoch)  # 16 of 8: each sample twice
        names = [name for step in range(4) for name in loader.names(epoch, step)]
        pixels = [value for (images, _), _ in loader for value in images[:, 0, 0, 0].tolist()]
        return [{name: pixels[i] for i, name in enumerate(names) if (i < 8) == first} for first in (True, False)]

    passes = by_name(0) + by_name(1)
    assert all(len(drawn) == 8 and len(set(drawn.values())) > 5 for drawn in passes)
    for name in passes[0]:
        assert len({drawn[name] for drawn in passes}) > 1
    assert sum(len({drawn[name] for drawn in passes}) == 4 for name in passes[0]) > 4
    assert by_name(0) == passes[:2]


def test_names_of_an_update(tmp_path):
    dataset = dataset_of(write_shards(tmp_path, [6, 6, 6, 6]))
    for workers in (0, 2):
        loader = training(dataset, 48, epoch=1, workers=workers, accum=2)
        batches = values(loader)
        for step in (0, 3, 5):
            numbers = batches[2 * step] + batches[2 * step + 1]
            assert loader.names(1, step) == [f"s-{number // 6:02d}.tar:{number:03d}" for number in numbers]


def test_nothing_readable_ends(tmp_path):
    dataset = dataset_of(write_shards(tmp_path, [3], {i: {"png": b"text"} for i in range(3)}))
    with pytest.raises(InputError, match="100 samples in a row cannot be read, the last: cannot decode image"):
        list(training(dataset, 8))
    (tmp_path / "s-00.tar").write_bytes(b"")
    with pytest.raises(InputError, match="no sample in shard"):
        list(training(dataset, 8))


@pytest.fixture(scope="module")
def learnable(tmp_path_factory):
    """(training pattern, held-out pattern) of 12 noisy images of each of three colours in four shards."""
    root, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for part, shards in (("train", 4), ("val", 2)):
        for shard in range(shards):
            with wds.TarWriter(str(root / f"{part}-{shard}.tar")) as writer:
                for i in range(9):
                    pixels = rng.normal(60, 40, (20, 24, 3))
                    pixels[..., i % 3] += 120
                    file = io.BytesIO()
                    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG")
                    writer.write({"__key__": f"{shard}-{i}", "jpg": file.getvalue(), "cls": str(i % 3).encode()})
    return f"webdataset:{root}/train-{{0..3}}.tar", f"webdataset:{root}/val-*.tar"


def config_for(learnable, output, **more):
    train, val = learnable
    settings = {
        "model": TINY,
        "img_size": 8,
        "epochs": 2,
        "batch_size": 6,
        "lr": 3e-3,
        "device": "cpu",
        "num_workers": 2,
    }
    settings |= {"output": str(output)}
    return TrainConfig(data=train, val_data=val, **settings | more)


def test_training_from_shards_resumes_within_an_epoch(learnable, tmp_path, capsys):
    config = config_for(learnable, tmp_path / "whole")
    evaluation = Trainer(config).run()
    assert evaluation.total == 18
    assert "36 (in 4 shards) training and 18 (in 2 shards) held-out images" in capsys.readouterr().out

    stopped = Trainer(replace(config, output=str(tmp_path / "stopped")))
    update = stopped._update

    def stop_within_the_second_epoch(batches):
        update(batches)
        if stopped.step == 6 + 3:
            stopped.signal = 15

    stopped._update = stop_within_the_second_epoch
    with pytest.raises(Interrupted):
        stopped.run()
    resumed = replace(config, output=str(tmp_path / "stopped"), resume="auto")
    with pytest.raises(InputError, match="was trained with 2 data workers, but this run has 1"):
        Trainer(replace(resumed, num_workers=0))
    assert Trainer(resumed).run().correct == evaluation.correct
    whole, again = ((tmp_path / name / "last.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert load(whole).keys() == load(again).keys() and all(
        torch.equal(load(whole)[key], load(again)[key]) for key in load(whole)
    )


def test_two_processes_resume_from_shards_within_an_epoch(learnable, tmp_path):
    """The same weights at the end; one process, for which the shards would be shared out otherwise, is refused."""
    settings = {
        "num_workers": 1,
        "batch_size": 3,
        "sched": "step",
        "warmup_epochs": 0.0,
        "checkpoint_interval": 1,
        "checkpoint_hist": 9,
    }
    config = config_for(learnable, tmp_path / "whole", **settings)
    stopped = replace(config, output=str(tmp_path / "stopped"), epochs=1)
    groups = [processes.start_group(2, processes.train, part, log=tmp_path / "log") for part in (config, stopped)]
    (_, whole), (_, other) = processes.results(*groups[0])
    assert all((whole[key] == other[key]).all() for key in whole)
    processes.results(*groups[1])
    states = RunStates(tmp_path / "stopped" / "checkpoints")
    for path in states.paths()[:3]:
        path.unlink()
    assert read_state(states.paths()[0])["step"] == 3  # of the six updates of an epoch
    resumed = replace(config, output=str(tmp_path / "stopped"), resume="auto")
    with pytest.raises(InputError, match="was trained with 2 processes, but this run has 1"):
        Trainer(replace(resumed, batch_size=6))
    (_, again), _ = processes.results(*processes.start_group(2, processes.train, resumed, log=tmp_path / "log"))
    assert all((whole[key] == again[key]).all() for key in whole)


def test_validate_on_shards(run, learnable, image_folder, trained):  # noqa: F811
    """Class numbers stand for the checkpoint's names."""
    train, val = learnable
    code, out, _ = run("validate", "--checkpoint", trained[1] / "last.safetensors", "--data", val, "--json")
    row = json.loads(out)
    assert code == 0 and row["images"] == 18 and [entry["images"] for entry in row["per_class"]] == [6, 6, 6]
    assert [entry["class"] for entry in row["per_class"]] == ["blue", "green", "red"]


def test_shards_from_a_command(learnable):
    """Not local: streams that webdataset opens, whose samples nobody can count beforehand."""
    train, val = (
        "webdataset:" + "::".join(f"pipe:cat {path}" for path in find_shards(data.partition(":")[2]))
        for data in learnable
    )
    with pytest.raises(InputError, match="classes of 'pipe:cat .*' cannot be counted beforehand: give --num-classes"):
        load_data(train, 8, val_data=val)
    with pytest.raises(
        InputError, match="samples of 'webdataset:pipe:.*' cannot be counted beforehand: give --train-num-samples"
    ):
        load_data(train, 8, val_data=val, num_classes=3)
    data = load_data(train, 8, val_data=val, num_classes=3, num_samples=36)
    local = load_data(learnable[0], 8, val_data=learnable[1])
    for loader, other in (
        (ShardLoader(of.val, 4) for of in (data, local)),
        (ShardLoader(of.train, 4) for of in (data, local)),
    ):
        for ((images, labels), _), ((expected, expected_labels), _) in zip(loader, other, strict=True):
            assert torch.equal(images, expected) and torch.equal(labels, expected_labels)
    assert len(list(training(data.train, 36))) == 9


def test_bad_input(run, learnable, tmp_path):  # noqa: F811
    train, val = learnable
    (tmp_path / "text.tar").write_text("no tar file" * 100)
    with wds.TarWriter(str(tmp_path / "one.tar")) as writer:
        writer.write({"__key__": "a", "png": png(0), "cls": b"0"})
    for argv, message in [
        (["--data", train], "data 'webdataset:.*' cannot be split: name its held-out images with --val-data"),
        (["--data", f"webdataset:{tmp_path}/none-{{0..3}}.tar"], "shard '.*none-0.tar' does not exist"),
        (["--data", f"webdataset:{tmp_path}/none-*.tar"], r"shard '.*none-\*.tar' does not exist"),
        (["--data", f"webdataset:{tmp_path}/text.tar"], "shard '.*text.tar' is no tar file"),
        (["--data", f"webdataset:{tmp_path}/one.tar"], "must have samples of 2 classes or more, got 1 of 1"),
        (["--data", f"{train}::{train.removeprefix('webdataset:')}"], "names a shard twice"),
        (
            ["--data", train, "--val-data", val, "--num-workers", 5],
            "4 shards are too few for 1 processes with 5 loading processes each",
        ),
        (["--data", train, "--val-data", "digits"], "val_data 'digits' has other classes than data 'webdataset:"),
        (["--data", "digits", "--num-classes", 5], "num_classes is for webdataset:SHARDS only, and data is 'digits'"),
        (
            ["--data", "digits", "--train-num-samples", 5],
            "train_num_samples is for webdataset:SHARDS only, and data is 'digits'",
        ),
        (["--data", "webdataset:"], "data must be one of digits"),
    ]:
        assert_one_line(run("train", "--output", tmp_path / "out", "--img-size", 8, *argv), message)
    assert not (tmp_path / "out").exists()


def test_without_webdataset(run, learnable, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    assert_one_line(
        run("train", "--data", learnable[0]), r'webdataset is not installed; pip install "effkernels\[train\]"'
    )
