"""What benchmarks.digits writes, with trainings that only leave a log behind."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import digits

NO_TRANSFER, NO_CLASSIFIER = ("--transfer-seeds", "0"), ("--classifier-seeds", "0")


@pytest.fixture
def trainings(monkeypatch):
    """Options of every training that was started, by name; its accuracy at epoch e of three is 0.5 + e / 10 + seed /
    100.
    """
    started = []

    def train(command, env, **how):
        assert command[1:5] == ["-m", "efficientnet", "train", "--data"] and env["OMP_NUM_THREADS"] == "1"
        options = {"data": command[5], **dict(zip(command[6::2], command[7::2], strict=True))}
        started.append(options)
        output = Path(options["--output"])
        output.mkdir(parents=True, exist_ok=True)
        rows = [{"epoch": e, "val_acc": 0.5 + e / 10 + int(options["--seed"]) / 100} for e in range(3)]
        (output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(digits.subprocess, "run", train)
    return started


def test_the_last_epoch_of_every_seed(trainings, tmp_path):
    out = tmp_path / "digits.json"
    digits.main(["--seeds", "2", *NO_TRANSFER, *NO_CLASSIFIER, "--out", str(out)])
    table = json.loads(out.read_text())
    assert [options["data"] for options in trainings] == ["digits", "digits"]
    assert {seed: (run["accuracy"], run["epochs"]) for seed, run in table["seeds"].items()} == {
        "0": (0.7, 3),
        "1": (0.71, 3),
    }
    assert all(run["cpu_s"] >= 0 for run in table["seeds"].values())
    assert table["kind"] == "digits" and "transfer" not in table and table["versions"]["torch"]


def test_transfer_takes_the_trunk_it_names(trainings, tmp_path):
    """The best of training on digits 0 to 4, and of the random trunk the last: its statistics are all that was
    trained.
    """
    out = tmp_path / "digits.json"
    out.write_text('{"seeds": {"0": {"accuracy": 0.9}}}')
    digits.main(["--seeds", "0", "--transfer-seeds", "1", *NO_CLASSIFIER, "--out", str(out)])
    table = json.loads(out.read_text())
    assert table["seeds"] == {"0": {"accuracy": 0.9}}, "what is not measured again stays"
    assert table["transfer"] == {
        "0": {f"{trunk}, until {until}": 0.7 for trunk in ("digits 0 to 4", "random") for until in ("3", "head")}
    }
    trunk, *heads, random, last, _ = trainings
    assert trunk["data"] == random["data"] == "digits:0-4" and {run["data"] for run in (*heads, last)} == {"digits:5-9"}
    assert "--lr" not in trunk and float(random["--lr"]) < 1e-10
    assert [run["--freeze-until"] for run in heads] == ["3", "head"]
    assert {run["--pretrained"] for run in heads} == {f"{trunk['--output']}/best.safetensors"}
    assert last["--pretrained"] == f"{random['--output']}/last.safetensors"


def test_a_classifier_on_frozen_weights(trainings, tmp_path):
    out = tmp_path / "digits.json"
    digits.main(["--seeds", "0", *NO_TRANSFER, "--classifier-seeds", "2", "--out", str(out)])
    assert json.loads(out.read_text())["classifier"] == {
        "0": {"digits 0 to 4": 0.7, "random": 0.7},
        "1": {"digits 0 to 4": 0.71, "random": 0.71},
    }
    low, trained, random = trainings[:3]
    assert low["data"] == "digits:0-4" and trained["data"] == random["data"] == "digits:5-9"
    assert trained["--pretrained"] == f"{low['--output']}/best.safetensors" and "--pretrained" not in random
    assert trained["--freeze-until"] == random["--freeze-until"] == "head" and random["--freeze-bn"] == "weights"


def test_a_failed_training_is_an_error_with_its_output(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 2, "", "no such option")
    monkeypatch.setattr(digits.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="--data digits .*failed:\nno such option"):
        digits.main(["--seeds", "1", "--out", str(tmp_path / "digits.json")])
    assert not (tmp_path / "digits.json").exists()
