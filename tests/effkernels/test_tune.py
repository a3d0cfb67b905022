"""Tables of measured launch configurations: looked up, refused, and written by a search whose clock is a formula
here."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from effkernels.configs import rules, tables
from effkernels.configs.gpus import GPUS
from effkernels.tools import tune
from support.interpreter import HAS_TRITON

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ARGS = (3, 1, 64, 56, 56, 96, torch.bfloat16)
KEY = "K=3 stride=1 N=64 OH=64 OW=64 C=128 dtype=bfloat16"


@pytest.fixture(autouse=True)
def an_sm90(monkeypatch):
    """Rules asked for CUDA tensors see a GPU of compute capability 9.0, with one processor as the CPU has."""
    monkeypatch.setattr(tables, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(rules, "_properties", lambda device: SimpleNamespace(multi_processor_count=1))
    monkeypatch.delenv("EFFKERNELS_TABLE", raising=False)
    tables.forget()
    yield
    tables.forget()


def table(*rows, capability=(9, 0)):
    return {"gpu": "NVIDIA H200", "capability": list(capability), "rows": list(rows)}


def row(config, key=KEY, family="depthwise_forward"):
    return {"family": family, "key": key, "config": config, "us": 1.0, "rule_us": 2.0}


@pytest.fixture
def use(tmp_path, monkeypatch):
    def write(content):
        path = tmp_path / "mine.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv("EFFKERNELS_TABLE", str(path))
        return path

    return write


# ---- lookup
# ----------------------------------------------------------------------------------------------------------------------


def test_a_row_overrides_the_rule_in_its_bucket(use):
    rule = rules.depthwise_forward_config(*ARGS, CPU)
    use(table(row({"TW": 7, "warps_per_sm": 12}), row({"BLOCK_ROWS": 9}, "C=96 dtype=bfloat16", "elementwise")))
    assert rules.depthwise_forward_config(*ARGS, GPU) == dataclasses.replace(rule, TW=7, warps_per_sm=12)
    assert rules.depthwise_forward_config(*ARGS, device=GPU).TW == 7
    assert rules.depthwise_forward_config(3, 1, 33, 33, 64, 65, torch.bfloat16, GPU).TW == 7, "the bucket's other end"
    for i, other in enumerate((5, 2, 65, 32, 32, 129, torch.float16)):
        args = (*ARGS[:i], other, *ARGS[i + 1 :], GPU)
        assert rules.depthwise_forward_config(*args) == rules.depthwise_forward_config(*args[:-1], CPU), args


def test_only_gpus_have_tables(use):
    use(table(row({"TW": 7})))
    for device in (CPU, torch.device("meta")):
        assert rules.depthwise_forward_config(*ARGS, device).TW != 7
    with tables.rules_only():
        assert rules.depthwise_forward_config(*ARGS, GPU).TW != 7
    assert rules.depthwise_forward_config(*ARGS, GPU).TW == 7


def test_rules_without_a_device_ask_for_the_current_one(use, monkeypatch):
    use(table(row({"num_warps": 8}, "C=128 dtype=bfloat16", "elementwise")))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for initialized, warps in ((False, 4), (True, 8)):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda initialized=initialized: initialized)
        assert rules.elementwise_config(96, torch.bfloat16).num_warps == warps


def test_the_packages_own_table_is_that_of_the_architecture(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    assert rules.depthwise_forward_config(*ARGS, GPU) == rules.depthwise_forward_config(*ARGS, CPU), "no table"
    tables.forget()
    tables.write(tmp_path / "sm_90.json", table(row({"TW": 7})))
    tables.write(tmp_path / "sm_80.json", table(row({"TW": 5}), capability=(8, 0)))
    assert rules.depthwise_forward_config(*ARGS, GPU).TW == 7


def test_meta_stands_for_a_gpu(tmp_path, monkeypatch):
    """Its processors, its architecture and its table's rows, within; the rules' again behind, whatever was cached."""
    meta, a100 = torch.device("meta"), GPUS["a100"]
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    tables.write(tmp_path / "sm_80.json", table(row({"TW": 5}), capability=(8, 0)))
    rule = rules.depthwise_forward_config(*ARGS, meta)
    form = rules.expand_backward_form(240, 40, torch.bfloat16, meta)
    with tables.meta_is(a100):
        here = rules.depthwise_forward_config.__wrapped__(*ARGS, meta)
        assert rules.depthwise_forward_config(*ARGS, meta) == dataclasses.replace(here, TW=5)
        assert rules.processor_count(meta) == 108
        assert (form, rules.expand_backward_form(240, 40, torch.bfloat16, meta)) == ("pass", "split")
        assert rules.depthwise_forward_config(*ARGS, CPU) == rules.depthwise_forward_config.__wrapped__(*ARGS, CPU)
    assert rules.depthwise_forward_config(*ARGS, meta) == rule and rules.processor_count(meta) == 132


@pytest.mark.parametrize(("capability", "form"), [((8, 9), "split"), ((10, 0), "pass"), ((12, 0), "split")])
def test_one_pass_where_tensor_cores_read_shared_memory(capability, form):
    """A workstation's Blackwell (sm_120) has the products of sm_89."""
    with tables.meta_is(dataclasses.replace(GPUS["h200"], capability=capability)):
        assert rules.expand_backward_form(240, 40, torch.bfloat16, torch.device("meta")) == form


def test_a_table_is_read_once(use, monkeypatch):
    path = use(table(row({"TW": 7})))
    reads, read = [], tables.read
    monkeypatch.setattr(tables, "read", lambda *args: reads.append(args) or read(*args))
    for c in (96, 97, 98, 40):
        rules.depthwise_forward_config(*ARGS[:5], c, torch.bfloat16, GPU)
    path.write_text("gone")
    assert rules.depthwise_forward_config(*ARGS[:5], 99, torch.bfloat16, GPU).TW == 7
    assert len(reads) == 1


@pytest.mark.parametrize(
    "content, problem",
    [
        ("not JSON", "is not a table of launch configurations"),
        ("[]", "is not a table of launch configurations"),
        ({"rows": []}, "is not a table of launch configurations (KeyError: 'capability')"),
        (table({"family": "reduction"}), "KeyError: 'key'"),
        (table(row({"TW": "7"})), "config must hold integers, got {'TW': '7'}"),
        (table(row({"TW": 7}, key=3)), "family and key must be strings"),
        (table(row({"TW": 7}), capability=(8, 0)), "was measured on sm_80, this GPU is sm_90"),
        (table(row({"TX": 7})), "unexpected keyword argument 'TX'"),
        (table(row({"TW": 7}) | {"source": "guessed"}), "source must be measured or simulated, got 'guessed'"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(use, content, problem):
    path = use(content)
    with pytest.raises(ValueError) as error:
        rules.depthwise_forward_config(*ARGS, GPU)
    assert str(path) in str(error.value) and problem in str(error.value)


def test_a_table_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFKERNELS_TABLE", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="EFFKERNELS_TABLE names .*none.json, which does not exist"):
        rules.depthwise_forward_config(*ARGS, GPU)


@pytest.mark.parametrize("name", [name for name in vars(rules) if re.fullmatch("[a-z].*_config", name)])
def test_every_rule_can_be_overridden(name):
    """So that a rule added later is not forgotten."""
    assert hasattr(getattr(rules, name), "__wrapped__"), f"{name} lacks @tuned"


def test_tables_in_git_can_be_read():
    for path in tables.FOLDER.glob("sm_*.json"):
        capability = tuple(int(digit) for digit in path.stem.removeprefix("sm_").split("_")[0])
        tables.read(path, capability if len(capability) == 2 else None)


# ---- the search
# ------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Toy:
    BLOCK_M: int = 16
    warps: int = 4
    rest: int = 0


@pytest.fixture
def toy(monkeypatch):
    """A family "toy" whose launcher takes a while that a formula of its configuration tells; ``measured`` lists those
    timed."""
    monkeypatch.setitem(tune.FIELDS, "toy", {"BLOCK_M": (16, 32, 64, 128), "warps": (2, 4, 8)})

    def toy_config(C, dtype):
        return Toy()

    rule = tables.tuned(toy_config)

    class Launcher:
        measured: list = []
        time = staticmethod(lambda config: 100.0 - config.BLOCK_M / 2 + abs(config.warps - 8))
        result = staticmethod(lambda config: 1.0)

        def workload(self, C):
            def build(device):
                def call():
                    self.config = rule(C, torch.bfloat16)
                    return (torch.full((4,), self.result(self.config)),)

                return call

            return tune.Workload(f"toy {C}", "toy", build)

        def timer(self, call):
            call()
            self.measured.append(self.config)
            return self.time(self.config)

    launcher = Launcher()
    launcher.measured, launcher.code = [], "today's"
    monkeypatch.setattr(tune, "code_of", lambda launches: launcher.code)
    monkeypatch.setattr(tune, "recorded_code", lambda workload: launcher.code)
    return launcher


def run(toy, path, *channels, content=None, report=lambda line: None):
    content = content or {"gpu": "toy", "capability": [9, 0], "rows": []}
    workloads, start = [toy.workload(C) for C in channels], tune.measured(CPU, toy.timer)
    return tune.tune(workloads, content, path, start, "measured", report)


def test_climbs_to_the_fastest(toy, tmp_path):
    assert run(toy, tmp_path / "t.json", 40, 100) == 2
    rows = tables.read(tmp_path / "t.json")["rows"]
    assert [(r["key"], r["config"]) for r in rows] == [
        ("C=128 dtype=bfloat16", {"BLOCK_M": 128, "warps": 8}),
        ("C=64 dtype=bfloat16", {"BLOCK_M": 128, "warps": 8}),
    ]
    assert rows[0]["rule_us"] == 96.0 and rows[0]["us"] == 36.0
    assert len(toy.measured) == len(set(toy.measured)) * 2, "each configuration once a shape"


def test_noise_is_no_gain(toy, tmp_path):
    toy.time = lambda config: 100.0 - 0.01 * config.BLOCK_M
    run(toy, tmp_path / "t.json", 40)
    assert tables.read(tmp_path / "t.json")["rows"][0]["config"] == {}
    assert len(toy.measured) == 4  # the rule's, and BLOCK_M 32, warps 2 and 8


def test_wrong_or_impossible_configurations_are_passed_over(toy, tmp_path):
    def result(config):
        if config.warps == 8:
            raise RuntimeError("out of registers")
        return float("nan") if config.BLOCK_M == 128 else 1.1 if config.BLOCK_M == 64 else 1.0

    toy.result, said = result, []
    run(toy, tmp_path / "t.json", 40, report=said.append)
    assert tables.read(tmp_path / "t.json")["rows"][0]["config"] == {"BLOCK_M": 32}
    assert {(c.BLOCK_M, c.warps) for c in toy.measured} == {(16, 4), (16, 2), (32, 4), (32, 2)}
    assert any("out of registers" in line or "RuntimeError" in line for line in said)


def test_a_bounded_number_of_configurations(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "MOST", 3)
    run(toy, tmp_path / "t.json", 40)
    assert len(toy.measured) == 3


def test_goes_on_after_an_interruption(toy, tmp_path):
    path, timer = tmp_path / "t.json", toy.timer

    def interrupted(call):
        if len(toy.measured) == 15:
            raise KeyboardInterrupt
        return timer(call)

    toy.timer = interrupted
    with pytest.raises(KeyboardInterrupt):
        run(toy, path, 40, 100, 1000)
    kept = tables.read(path)["rows"]
    assert [r["key"] for r in kept] == ["C=64 dtype=bfloat16"]
    toy.timer, toy.measured = timer, []
    assert run(toy, path, 40, 100, 60, 1000, content=tables.read(path)) == 2, "60 is in the bucket of 40"
    rows = tables.read(path)["rows"]
    assert len(rows) == 3 and kept[0] in rows
    assert run(toy, path, 40, 100, 1000, content=tables.read(path)) == 0


def test_a_workload_that_asks_for_nothing_is_a_mistake(toy, tmp_path):
    workload = dataclasses.replace(toy.workload(40), family="reduction")
    with pytest.raises(RuntimeError, match="toy 40 does not ask for a configuration of reduction"):
        tune.tune([workload], table(), tmp_path / "t.json", tune.measured(CPU, toy.timer), "measured")


def test_what_is_written_is_what_is_looked_up(tmp_path, monkeypatch):
    """Family and key of a row that the search writes for a real rule are those that a launch looks for."""
    with tables.watch() as asked:
        rule = rules.depthwise_forward_config(*ARGS, CPU)
    tables.write(tmp_path / "t.json", table({"family": asked[0][0], "key": asked[0][1], "config": {"TW": rule.TW + 1}}))
    monkeypatch.setenv("EFFKERNELS_TABLE", str(tmp_path / "t.json"))
    assert rules.depthwise_forward_config(*ARGS, GPU) == dataclasses.replace(rule, TW=rule.TW + 1)


def test_steps_pass_over_what_other_fields_do_not_allow():
    """With products, strips are 8 side by side and a multiple of 4 wide."""
    config = rules.DepthwiseConfig(BLOCK_C=16, S=8, TW=4, TH=8, stages=2, products=True)
    found = tune.neighbours("depthwise_forward", config)
    assert {c.TW for c in found} == {4, 8} and {c.S for c in found} == {8}
    assert {c.TH for c in found} == {4, 8, 16} and {c.stages for c in found} == {1, 2, 3}
    free = tune.neighbours("depthwise_forward", dataclasses.replace(config, products=False))
    assert {c.TW for c in free} == {3, 4, 6} and {c.S for c in free} == {4, 8, 16}


def test_fields_of_the_search_exist():
    for family, fields in tune.FIELDS.items():
        rule = getattr(rules, f"{family}_config")
        annotation = rule.__wrapped__.__annotations__["return"]
        assert set(fields) <= {f.name for f in dataclasses.fields(annotation)}, family
        assert all(list(values) == sorted(values) for values in fields.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "python -m effkernels.tune: no CUDA GPU here, and tuning measures on one\n"
    assert tune.main([], predict=lambda calls, gpu: []) == 2
    assert capsys.readouterr().err.endswith("tuning measures on one; --simulate predicts without one\n")


# ---- the search without a GPU
# ------------------------------------------------------------------------------------------------------------------


def predicted(toy, seconds=lambda config: 1e-6 * (100.0 - config.BLOCK_M / 2 + abs(config.warps - 8))):
    """As ``steps.predict_calls``, for calls that are configurations; BLOCK_M = 128 does not compile."""

    def predict(calls, gpu):
        assert gpu == "a100"
        toy.measured += [config for (config,) in calls]
        wrong = RuntimeError("toy does not compile")
        return [wrong if c.BLOCK_M == 128 else [SimpleNamespace(time=seconds(c))] for (c,) in calls]

    return predict


@pytest.fixture
def recorded_toy(toy, monkeypatch):
    """Toys whose launches, where they are recorded, are the configurations that their calls ask for."""

    @contextlib.contextmanager
    def record_launches(gpu):
        assert gpu is GPUS["a100"]
        toy.launches = []
        yield toy.launches

    def result(config):
        toy.launches.append(config)
        return 1.0

    launches = pytest.importorskip("effkernels.tools.launches")
    monkeypatch.setattr(launches, "record_launches", record_launches)
    toy.result = result
    return toy


def simulate(toy, path, *channels, content=None, report=lambda line: None, **how):
    content = content or {"gpu": "A100", "capability": [8, 0], "rows": []}
    workloads, start = [toy.workload(C) for C in channels], tune.simulated("a100", predicted(toy, **how))
    return tune.tune(workloads, content, path, start, "simulated", report)


def test_climbs_by_predictions(recorded_toy, tmp_path):
    said = []
    assert simulate(recorded_toy, tmp_path / "t.json", 40, report=said.append) == 1
    (found,) = tables.read(tmp_path / "t.json")["rows"]
    assert (found["config"], found["source"]) == ({"BLOCK_M": 64, "warps": 8}, "simulated")
    assert (found["rule_us"], found["us"]) == (96.0, 68.0)
    assert len(recorded_toy.measured) == len(set(recorded_toy.measured))
    assert "toy {'BLOCK_M': 128}: toy does not compile" in said


def test_what_predictions_do_not_tell_is_no_gain(recorded_toy, tmp_path):
    """4 % less counts where it is measured, and not where it is predicted."""
    simulate(recorded_toy, tmp_path / "t.json", 40, seconds=lambda config: 100.0 - 4 * (config.BLOCK_M > 16))
    recorded_toy.time = lambda config: 100.0 - 4 * (config.BLOCK_M > 16)
    run(recorded_toy, tmp_path / "m.json", 40)
    rows = [tables.read(tmp_path / name)["rows"][0] for name in ("t.json", "m.json")]
    assert [row["config"] for row in rows] == [{}, {"BLOCK_M": 32}]


def test_predictions_go_on_after_an_interruption(recorded_toy, tmp_path):
    path = tmp_path / "t.json"
    assert simulate(recorded_toy, path, 40, 100) == 2
    recorded_toy.measured.clear()
    assert simulate(recorded_toy, path, 40, 100, 1000, content=tables.read(path)) == 1
    assert len(tables.read(path)["rows"]) == 3


def test_measured_rows_take_the_place_of_simulated_ones(recorded_toy, tmp_path):
    path = tmp_path / "t.json"
    simulate(recorded_toy, path, 40, 100)
    assert run(recorded_toy, path, 40, content=tables.read(path)) == 1
    rows = {row["key"]: (row["source"], row["config"]) for row in tables.read(path)["rows"]}
    assert rows["C=64 dtype=bfloat16"] == ("measured", {"BLOCK_M": 128, "warps": 8})
    assert rows["C=128 dtype=bfloat16"] == ("simulated", {"BLOCK_M": 64, "warps": 8})
    assert simulate(recorded_toy, path, 40, content=tables.read(path)) == 0, "never the reverse"


def test_rows_of_other_kernels_are_named_and_searched_again(recorded_toy, tmp_path):
    path, said = tmp_path / "t.json", []
    simulate(recorded_toy, path, 40, 100)
    run(recorded_toy, path, 100, content=tables.read(path))
    recorded_toy.code = "another"
    assert simulate(recorded_toy, path, 40, 100, content=tables.read(path), report=said.append) == 1
    rows = {row["key"]: (row["source"], row["code"]) for row in tables.read(path)["rows"]}
    assert rows == {
        "C=64 dtype=bfloat16": ("simulated", "another"),
        "C=128 dtype=bfloat16": ("measured", "today's"),
    }
    stale = [line for line in said if line.endswith("with other kernels than today's")]
    assert len(stale) == 2 and "C=64 dtype=bfloat16: simulated" in stale[0] and "C=128" in stale[1]
    said.clear()
    assert run(recorded_toy, path, 100, content=tables.read(path), report=said.append) == 1
    assert "toy C=128 dtype=bfloat16: measured with other kernels than today's" in said


@pytest.mark.parametrize("order", [1, -1])
def test_a_measured_row_wins(use, order):
    rows = [row({"TW": 7}) | {"source": "simulated"}, row({"TW": 5})]
    use(table(*rows[::order]))
    assert rules.depthwise_forward_config(*ARGS, GPU).TW == 5


def test_a_measured_table_of_another_gpu_is_kept(tmp_path):
    """Its rows are not mixed with this GPU's; a table of simulated rows becomes this GPU's."""
    path = tmp_path / "t.json"
    tables.write(path, table(row({"TW": 7})))
    with pytest.raises(ValueError, match="was measured on NVIDIA H200, this is NVIDIA H100"):
        tune._table(path, (9, 0), "NVIDIA H100", "measured")
    assert tune._table(path, (9, 0), "H200", "simulated")["gpu"] == "NVIDIA H200"
    tables.write(path, table(row({"TW": 7}) | {"source": "simulated"}))
    assert tune._table(path, (9, 0), "NVIDIA H100", "measured")["gpu"] == "NVIDIA H100"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--widths", "0"], "--widths must be above 0, got 0.0"),
        (["--batches", "-1"], "--batches must be above 0, got -1"),
        (["--families", "depthwise"], "--families: invalid choice: 'depthwise'"),
        (["--simulate", "--gpu", "v100"], "--gpu: invalid choice: 'v100'"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        tune.main(arguments, predict=lambda calls, gpu: [])
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_a_kernel_is_tuned_by_simulation(tmp_path):
    """One family of one small network, by the command; again, nothing is left to do."""
    how = ["--simulate", "--families", "elementwise", "--widths", "0.5", "--batches", "8", "--output", "t.json"]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for added in ("[1-9][0-9]*", "0"):
        command = [sys.executable, "-m", "effkernels.tune", *how]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert re.search(rf"^t.json: {added} rows added, .*, predicted, not measured$", done.stdout, re.MULTILINE)
    rows = tables.read(tmp_path / "t.json", (9, 0))["rows"]
    assert all(row["source"] == "simulated" and 0 < row["us"] <= row["rule_us"] for row in rows)
    assert {row["family"] for row in rows} == {"elementwise"} and len(rows) > 3


STALE = """
import sys
import torch
from effkernels.configs import tables
from effkernels.configs.gpus import GPUS
from effkernels.tools import tune

table = tables.read(tables.FOLDER / "sm_90.json")
left = {(row["family"], row["key"]): row for row in table["rows"]}
meta, start = torch.device("meta"), tune.simulated("h200", None)
with tables.meta_is(GPUS["h200"]):
    todo = tune.workloads([1.0], [torch.bfloat16], [256], meta)
for workload in todo:
    asked, code, _ = start(workload, print)
    row = left.pop((workload.family, next(key for family, key, _ in asked if family == workload.family)), None)
    if row is not None and row["code"] != code:
        print(f"{row['family']} {row['key']}: other kernels")
print(*left, sep="\\n", end="")
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_table_in_git_is_of_these_kernels():
    """Otherwise ``python -m effkernels.tune --simulate --batches 256`` searches its stale rows again. Every row is of a
    shape that a launch asks for.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", STALE], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr[-2000:]


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_every_workload_starts_kernels_of_its_family():
    """Launchers run on the meta device, in a process without the interpreter. The same kernels have the same code,
    others another."""
    code = """
    import torch
    from effkernels.configs import tables
    from effkernels.tools import tune
    from effkernels.tools.launches import record_launches

    families, codes = set(), {}
    for workload in tune.workloads([1.0, 2.0], [torch.bfloat16, torch.float32], [32]):
        with record_launches() as launches, tables.watch() as asked:
            results = workload.build(torch.device("meta"))()
        assert launches and workload.family in {family for family, *_ in asked}, workload.name
        assert all(isinstance(t, torch.Tensor) for t in results)
        families.add(workload.family)
        codes.setdefault(frozenset(launch.name for launch in launches), set()).add(tune.code_of(launches))
    assert families == set(tune.FIELDS), families ^ set(tune.FIELDS)
    assert len(codes) > 5 and all(len(of) == 1 for of in codes.values()), codes
    assert len(set.union(*codes.values())) == len(codes)
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
