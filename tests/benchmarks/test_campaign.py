"""A campaign ends on time, keeps what was measured, and goes on where it stopped, also when a row hangs or its process
dies.
"""

import json
import sys
import time

import pytest

from benchmarks import campaign, results, shapes
from benchmarks.campaign import Campaign, Job
from benchmarks.rows import Row
from benchmarks.variants import CHANNELS_LAST, EAGER, OURS

SHAPE = shapes.blocks("b0")[0]

# Stands in for pytest: leaves files as the fixture does; a row named "hang" sleeps, "die" kills the process, "fail"
# leaves no result.
WORKER = """
import json, os, sys, time
folder, *pairs = sys.argv[1:]
for node, path in zip(pairs[::2], pairs[1::2]):
    with open(folder + "/current", "w") as current:
        current.write(node)
    with open(folder + "/runs", "a") as runs:
        runs.write(node + "\\n")
    if "hang" in node:
        time.sleep(600)
    if "die" in node:
        os.kill(os.getpid(), 9)
    if "fail" not in node:
        time.sleep(0.3)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as out:
            json.dump({"benchmarks": [{"fullname": node, "extra_info": {"median_ms": 1.0, "device": node}}]}, out)
"""


def job(name, training=False, seconds=1.0, variant=OURS):
    return Job(f"benchmarks/test_block.py::test_block[{name}]", Row("b0", SHAPE, training, variant), seconds)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(seconds) makes a campaign with the worker above, without what real processes need to get ready."""
    monkeypatch.setattr(campaign, "START", 0.5)
    monkeypatch.setattr(campaign, "MARGIN", 0.3)

    def make(seconds, said=None):
        def command(nodes):
            pairs = [part for node in nodes for part in (node, str(tmp_path / "rows" / f"{campaign._file(node)}.json"))]
            return [sys.executable, "-S", "-c", WORKER, str(tmp_path), *pairs]

        say = (lambda line: said.append(line)) if said is not None else (lambda line: None)
        return Campaign(tmp_path, time.monotonic() + seconds, command, say)

    return make


def runs(folder):
    return [line.split("[")[1][:-1] for line in (folder / "runs").read_text().splitlines()]


def measured(folder):
    return sorted(row["device"].split("[")[1][:-1] for row in results.load(folder))


def test_rows_run_in_order_and_once(start, tmp_path):
    todo = [job("a"), job("b"), job("c", training=True), job("d")]
    said = []
    start(60, said).run(todo)
    assert runs(tmp_path) == ["a", "b", "c", "d"] and len(said) == 3, "a and b in one process; d not before c"
    assert measured(tmp_path) == ["a", "b", "c", "d"]
    start(60).run([*todo, job("e")])
    assert runs(tmp_path) == ["a", "b", "c", "d", "e"]


def test_a_row_that_fails_or_dies_does_not_stop_the_rest(start, tmp_path):
    todo = [job("a"), job("fail"), job("b"), job("die"), job("c")]
    one = start(60)
    one.run(todo)
    assert measured(tmp_path) == ["a", "b", "c"]
    assert {node.split("[")[1][:-1]: what for node, what in one.state.items()} == {
        "fail": "failed; see log.txt",
        "die": "the process died with exit code -9",
    }
    start(60).run(todo)
    assert runs(tmp_path) == ["a", "fail", "b", "die", "c"], "neither is run again"


def test_a_row_that_hangs_is_ended(start, tmp_path):
    said = []
    one = start(60, said)
    began = time.monotonic()
    one.run([job("a"), job("hang", seconds=0.2), job("b")])
    assert time.monotonic() - began < 300
    assert measured(tmp_path) == ["a", "b"]
    assert [what for what in one.state.values()] == ["hung: took over 2 s"] and "hung" in "".join(said)


def test_the_end_is_kept_when_a_row_hangs(start, tmp_path):
    began = time.monotonic()
    one = start(4)
    one.run([job("a"), job("hang", seconds=2)])
    assert time.monotonic() - began < 300
    assert measured(tmp_path) == ["a"] and one.state == {}, "the time was up: it may be tried again"


def test_rows_that_do_not_fit_are_left_out(start, tmp_path):
    said = []
    start(5, said).run([job("long", seconds=100), job("short", training=True, seconds=0.2)])
    assert runs(tmp_path) == ["short"] and said[-1].startswith("1 rows left: none fits")


def test_a_process_that_cannot_start_is_not_tried_for_ever(start):
    one = start(60)
    one.command = lambda nodes: [sys.executable, "-c", "raise SystemExit(4)"]
    one.run([job("a"), job("b")])
    assert len(one.state) == 2 and all("exit code 4" in what for what in one.state.values())


def test_launches_beside_their_predictions(start, tmp_path, monkeypatch):
    """Each step in a process of its own that writes into the campaign's folder, until no trial is left; what it prints
    is passed on.
    """
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, sys; where = sys.argv[sys.argv.index('--out') + 1]; again = os.path.exists(where)\n"
        "json.dump({'left': 0 if again or 'infer' in where else 3}, open(where, 'w'))\n"
        "print('a_kernel measured 2.0 us, predicted 1.0 us', *sys.argv[1:])\n"
    )
    popen, said = campaign.subprocess.Popen, []

    def run_worker(command, **how):
        assert command[:3] == [sys.executable, "-m", "benchmarks.fitted"]
        return popen([sys.executable, str(worker), *command[3:]], **how)

    monkeypatch.setattr(campaign.subprocess, "Popen", run_worker)
    start(200, said).predictions()
    assert [line.split(",")[0] for line in said] == ["b0 train", "b0 infer"]
    assert all("a_kernel measured 2.0 us, predicted 1.0 us --mode" in line for line in said)
    assert all(line.endswith("--seconds 140") for line in said)
    assert {path.name for path in tmp_path.glob("fitted-*")} == {"fitted-train.json", "fitted-infer.json"}
    start(200, said).predictions()
    assert [line.split(",")[0] for line in said[2:]] == ["b0 train"], "what is whole is not done again"
    start(200, said).predictions()
    assert len(said) == 3


def test_a_fit_that_takes_too_long_keeps_what_it_had(start, tmp_path, monkeypatch):
    popen, said = campaign.subprocess.Popen, []
    worker = "import sys, time; open(sys.argv[sys.argv.index('--out') + 1], 'w').write('{}'); time.sleep(60)"
    monkeypatch.setattr(campaign, "FITTING", 1.0)
    monkeypatch.setattr(
        campaign.subprocess, "Popen", lambda command, **how: popen([sys.executable, "-c", worker, *command[3:]], **how)
    )
    start(100, said).predictions()
    assert [line.split(": ")[1] for line in said] == [
        f"stopped, took too long; what it had is in fitted-{mode}.json" for mode in ("train", "infer")
    ]


def test_a_damaged_state_is_named(tmp_path):
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(ValueError, match="state.json is not a campaign's state"):
        Campaign(tmp_path, 0)
    assert campaign.main(["--minutes", "1", "--out", str(tmp_path), "--only", "nothing-of-this-name"]) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [(["--minutes", "0"], "minutes must be above 0"), (["--minutes", "1", "--only", "("], "--only")],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        campaign.main([*arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_most_important_rows_come_first():
    on_gpu = [str(job.row) for job in campaign.jobs(gpu=True)]
    assert on_gpu[:4] == [
        f"b0-224px-inference-{name}" for name in ("ours", "channels_last", "compile-default", "eager")
    ]
    first = {
        name: on_gpu.index(f"{name}-ours")
        for name in ("b0-224px-training", "b4-380px-inference", "b4-380px-training", "b7-600px-inference")
    }
    assert list(first) == sorted(first, key=first.get)
    assert len(on_gpu) == len(set(on_gpu)) + 4 * 8, "a latency row is told from a model's by its file"


def test_one_call_of_nine_minutes_gives_the_must_have_rows(tmp_path, monkeypatch):
    """B0 and B4 whole, as fast as the expected times say, after the tests on the GPU: their variants, in both steps."""
    one, todo, done, clock = Campaign(tmp_path, 9 * 60), campaign.jobs(gpu=True), [], [campaign.CORRECTNESS]
    monkeypatch.setattr(campaign.time, "monotonic", lambda: clock[0])
    while batch := one._next(todo):
        clock[0] += campaign.START + sum(job.seconds for job in batch)
        done += [str(job.row) for job in batch]
        todo = [job for job in todo if job not in batch]
    assert clock[0] <= 9 * 60 - campaign.MARGIN
    names = ("ours", "channels_last", "compile-default", "eager")
    must = [
        f"{case}-{name}"
        for case in ("b0-224px-inference", "b0-224px-training", "b4-380px-inference", "b4-380px-training")
        for name in names
    ]
    assert done[: len(must)] == must


def test_layers_share_a_process():
    todo = campaign.jobs(gpu=True, only="test_(depthwise|block|squeeze)")
    processes = [job.process for job in todo]
    changes = sum(a != b for a, b in zip(processes, processes[1:], strict=False))
    assert changes < 30 and len(todo) > 500, "a few processes, not one for each of the layers"
    together = [str(job.row.variant) for job in todo if job.process == processes[0]]
    assert together[:3] == ["eager", "channels_last", "ours"] and len(together) == len(set(together)) * 4, (
        "of each block in turn"
    )


def test_without_a_gpu_only_what_runs_there():
    found = campaign.jobs(gpu=False, only="test_block|test_model")
    assert {job.row.model for job in found} == {"b0"} and all(job.row.variant.graph is None for job in found)
    assert {EAGER, CHANNELS_LAST, OURS} <= {job.row.variant for job in found}


@pytest.mark.slow
def test_a_real_one(tmp_path):
    """The suite's own rows in processes of their own, on this machine's CPU."""
    out = tmp_path / "c"
    arguments = ["--minutes", "1.5", "--out", str(out), "--only", r"test_block.py.*192to192.*inference-(eager|ours)"]
    assert campaign.main(arguments) == 0
    rows = results.load(out)
    assert {row["variant"] for row in rows} == {"eager", "ours"} and all(row["median_ms"] > 0 for row in rows)
    assert not json.loads((out / "state.json").read_text())["rows"] if (out / "state.json").exists() else True
