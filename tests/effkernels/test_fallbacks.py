"""A configuration that does not compile, or needs more than the GPU has: the next one is tried, warned of once and
remembered.
"""

import dataclasses
import json
import warnings

import pytest
import torch

from effkernels import FusedMBConv
from effkernels.configs import rules, tables
from support.interpreter import HAS_TRITON
from support.python import run_python

if not HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)

from triton.runtime.errors import OutOfResources, PTXASError

from effkernels.kernels.depthwise_forward import depthwise_forward, depthwise_forward_kernel

SHARED_MEMORY = OutOfResources(131072, 101376, "shared memory")
FAILURES = [SHARED_MEMORY, PTXASError("ptxas fatal"), RuntimeError("PassManager::run failed")]


@pytest.fixture
def refuse(device, monkeypatch):
    """refuse(when, error): a launch whose arguments ``when`` is true of raises ``error``; yields the list of launches
    attempted.
    """
    cls, attempts = type(depthwise_forward_kernel), []
    run = cls.run

    def install(when, error):
        def refusing(self, *args, grid, warmup=False, **kwargs):
            attempts.append(kwargs)
            if when(kwargs):
                raise error
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)

        monkeypatch.setattr(cls, "run", refusing)
        return attempts

    tables.forget()
    yield install
    tables.forget()


def messages(warned):
    """Without what Triton's interpreter has NumPy say."""
    return [str(w.message) for w in warned if w.category is RuntimeWarning]


def convolve(device, C=8, size=4, k=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, size, size, C, generator=generator).to(device)
    weight = torch.randn(C, 1, k, k, generator=generator).to(device)
    return depthwise_forward(x, weight, 1, (k // 2,) * 4)[0]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_the_next_configuration_is_tried_once_and_remembered(error, device, refuse):
    expected = convolve(device)
    attempts = refuse(lambda kwargs: kwargs["STAGES"] > 1, error)
    with pytest.warns(RuntimeWarning) as warned:
        assert torch.equal(convolve(device), expected)
    assert [kwargs["STAGES"] for kwargs in attempts] == [3, 3, 1], "as it was, the rule's, with less in flight"
    (message,) = messages(warned)
    key = "depthwise_forward at K=3 stride=1 N=1 OH=4 OW=4 C=8 dtype=float32"
    assert (
        message.startswith(f"depthwise_forward: {type(error).__name__}: {error}")
        and key in message
        and "stages=1" in message
    )
    attempts.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert torch.equal(convolve(device), expected)
    assert [kwargs["STAGES"] for kwargs in attempts] == [1]
    with pytest.warns(RuntimeWarning, match="K=5"):
        convolve(device, k=5)


def test_every_step_is_reached(device, refuse):
    """Registers that ptxas chooses, then more warps with fewer each."""
    expected = convolve(device, k=5)
    attempts = refuse(lambda kwargs: kwargs["num_warps"] < 8, SHARED_MEMORY)
    with pytest.warns(RuntimeWarning, match="num_warps=8"):
        assert torch.equal(convolve(device, k=5), expected)
    taken = [(kwargs["STAGES"], kwargs.get("maxnreg"), kwargs["num_warps"]) for kwargs in attempts]
    assert taken == [(3, 255, 1), (3, 255, 1), (1, 255, 1), (1, None, 1), (1, None, 8)]


def test_none_compiles(device, refuse):
    refuse(lambda kwargs: True, SHARED_MEMORY)
    with pytest.raises(
        RuntimeError, match="depthwise_forward: no configuration.*EFFKERNELS_BACKEND=reference"
    ) as raised:
        convolve(device)
    assert raised.value.__cause__ is SHARED_MEMORY and not tables._remembered


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("PassManager"), torch.OutOfMemoryError()]
)
def test_other_errors_are_not_caught(error, device, refuse):
    attempts = refuse(lambda kwargs: True, error)
    with pytest.raises(type(error)) as raised:
        convolve(device)
    assert raised.value is error and len(attempts) == 1


def test_what_was_asked_for_by_name_is_not_replaced(device, refuse):
    """A measurement of one configuration must not be that of another."""
    attempts = refuse(lambda kwargs: kwargs["STAGES"] == 4, SHARED_MEMORY)
    with tables.override("depthwise_forward", stages=4), pytest.raises(OutOfResources):
        convolve(device)
    assert len(attempts) == 1


def test_a_row_that_does_not_fit_gives_way_to_the_rule(device, refuse, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_architecture", lambda device: (8, 6))
    key = "K=3 stride=1 N=1 OH=4 OW=4 C=8 dtype=float32"
    row = {"family": "depthwise_forward", "key": key, "config": {"stages": 7}}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"gpu": "a GPU", "capability": [8, 6], "rows": [row]}))
    monkeypatch.setenv("EFFKERNELS_TABLE", str(path))
    attempts = refuse(lambda kwargs: kwargs["STAGES"] > 3, SHARED_MEMORY)
    with pytest.warns(RuntimeWarning, match="stages=3"):
        convolve(device)
    convolve(device)
    assert [kwargs["STAGES"] for kwargs in attempts] == [7, 3, 3]
    monkeypatch.setattr(tables, "_architecture", lambda device: (9, 0))
    monkeypatch.delenv("EFFKERNELS_TABLE")
    tables._table.cache_clear()
    assert rules.depthwise_forward_config(3, 1, 1, 4, 4, 8, torch.float32, torch.device("cpu")).stages == 3


def test_a_block_trains_on_a_gpu_with_little_of_everything(device, refuse):
    """No launch may keep more than one row in flight or ask for registers: the same numbers, a warning a
    configuration.
    """
    torch.manual_seed(0)
    block = FusedMBConv(16, 16, expand_ratio=2, kernel_size=5).to(device)
    x = torch.randn(2, 16, 4, 4, device=device).requires_grad_()

    def step():
        block.zero_grad()
        out = block(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])]

    block.train()
    expected = step()
    attempts = refuse(lambda kwargs: kwargs.get("STAGES", 1) > 1 or kwargs.get("maxnreg") is not None, SHARED_MEMORY)
    with pytest.warns(RuntimeWarning) as warned:
        found = step()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    families = {message.split(":")[0] for message in messages(warned)}
    assert families >= {
        "depthwise_forward",
        "depthwise_backward",
        "pointwise_forward_fused",
    }
    assert len(set(messages(warned))) == len(messages(warned))
    attempts.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        step()
    assert all(kwargs.get("STAGES", 1) == 1 and kwargs.get("maxnreg") is None for kwargs in attempts)


def test_fields_of_the_fallbacks_exist():
    """Each changes something of some configuration, and nothing that decides grids or partial results."""
    configs = [c for c in vars(rules).values() if dataclasses.is_dataclass(c)]
    for fields in tables.FALLBACKS:
        assert set(fields) <= {"stages", "maxnreg", "num_warps"}
        assert all(any(name in {f.name for f in dataclasses.fields(c)} for c in configs) for name in fields)


def test_a_table_that_asks_too_much_of_an_sm86():
    """Compiled: a row with ten tiles in flight takes more than the 99 KB of a block there; what comes next fits."""
    found = run_python(
        """
        import json, os, tempfile, warnings
        import torch, triton
        from triton.runtime.errors import OutOfResources
        from effkernels.configs import rules, tables
        from effkernels.tools.launches import Launch
        from effkernels.tools.machine_code import compile_launch
        from effkernels.kernels.pointwise_forward import pointwise_forward

        family = "pointwise_forward"
        key = "K=128 N=64 rows=1024 image_rows=256 dtype=bfloat16 prologue=False gated=False pool=False copied=False"
        path = tempfile.mktemp(suffix=".json")
        with open(path, "w") as file:
            config = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "resident": False, "stages": 10}
            rows = [{"family": family, "key": key, "config": config}]
            json.dump({"gpu": "a GPU", "capability": [8, 6], "rows": rows}, file)
        os.environ["EFFKERNELS_TABLE"] = path
        tables._architecture = lambda device: (8, 6)
        shared = []

        def run(self, *args, grid, warmup=False, **kwargs):
            arguments = dict(zip(self.arg_names, args)) | {k: v for k, v in kwargs.items() if k in self.arg_names}
            options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
            compiled = compile_launch(Launch(self, arguments, options, tuple(grid)), 86)
            shared.append(compiled.metadata.shared)
            if shared[-1] > 99 * 1024:
                raise OutOfResources(shared[-1], 99 * 1024, "shared memory")

        triton.runtime.jit.JITFunction.run = run
        x = torch.empty(4, 16, 16, 128, device="meta", dtype=torch.bfloat16)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            pointwise_forward(x, torch.empty(64, 128, 1, 1, device="meta", dtype=torch.bfloat16))
        print(json.dumps([shared, [str(w.message) for w in warned]]))
        """
    )
    shared, messages = json.loads(found)
    assert shared[0] > 99 * 1024 >= shared[1] and len(shared) == 2
    assert len(messages) == 1 and "out of resource: shared memory" in messages[0]


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, len(tables.FALLBACKS)))
def test_every_kernel_compiles_with_every_fallback(step):
    """One configuration of each kernel, for sm_86 with the shared memory a block has there."""
    found = run_python(
        f"""
        import json
        from effkernels.configs import tables
        from effkernels.tools.machine_code import compile_launch
        from effkernels.tools.shipped import shipped_launches
        with tables.falling_back(tables.FALLBACKS[{step}]):
            launches = shipped_launches()
        launches = {{launch.name: launch for launch in reversed(launches)}}
        print(json.dumps({{name: compile_launch(launch, 86).metadata.shared for name, launch in launches.items()}}))
        """
    )
    shared = json.loads(found)
    assert len(shared) >= 26 and max(shared.values()) <= 99 * 1024
