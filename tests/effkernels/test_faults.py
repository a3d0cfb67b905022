"""What goes wrong around the kernels ends in the plain layers with a reason, or in an error that names it (more in
test_dispatch.py).
"""

import json
import sys
from pathlib import Path

import pytest
import torch

import effkernels
from effkernels import FusedDepthwiseConvBNAct, FusedMBConv, FusedSqueezeExcite, dispatch
from effkernels.configs import tables
from support.python import run_python

TABLE = Path(effkernels.__file__).parent / "configs/static_sm90.json"
SMALLEST_SHARED_MEMORY = 99 * 1024  # a block's on sm_86 and sm_89; sm_80 has 163 KB, sm_90 227 KB


@pytest.fixture
def a_gpu(monkeypatch):
    """The gate believes that x lies on an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(dispatch, "triton_problem", lambda: None)
    dispatch.triton_import_problem.cache_clear()
    yield
    dispatch.triton_import_problem.cache_clear()


def test_triton_that_cannot_be_imported(a_gpu, monkeypatch):
    """Installed, but for another Python or without a library it needs: the reason, not a traceback from within a
    model.
    """
    assert dispatch.platform_problem("cuda", 0) is None
    dispatch.triton_import_problem.cache_clear()
    monkeypatch.setitem(sys.modules, "triton.language", None)
    reason = dispatch.platform_problem("cuda", 0)
    assert reason.startswith("Triton cannot be imported (ModuleNotFoundError: ") and "triton.language" in reason


def test_a_broken_triton_in_a_process(tmp_path):
    """A package named triton that raises: the plain layers run, ``why_not_fused`` tells, and forcing kernels raises
    with the reason.
    """
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    run_python(
        f"""
        import os, sys
        import torch
        sys.path.insert(0, {str(tmp_path)!r})
        from effkernels import FusedMBConv
        block, x = FusedMBConv(8, 8), torch.randn(2, 8, 4, 4)
        reason = "Triton cannot be imported (ImportError: libcuda.so.1: cannot open shared object file)"
        assert block.why_not_fused(x) == reason, block.why_not_fused(x)
        block(x).sum().backward()
        os.environ["EFFKERNELS_BACKEND"] = "triton"
        try:
            block(x)
        except RuntimeError as error:
            assert reason in str(error)
        else:
            raise AssertionError("no error")
        """,
        TRITON_INTERPRET="1",
    )


@pytest.mark.parametrize("value", ["maybe", "2", "yes", "-1", "nan"])
def test_a_nonsensical_interpreter_switch_is_off(value, monkeypatch):
    """As for Triton, which takes 1, true and on."""
    monkeypatch.setenv("TRITON_INTERPRET", value)
    monkeypatch.setenv("EFFKERNELS_BACKEND", "auto")
    monkeypatch.setattr(dispatch, "triton_problem", lambda: None)
    assert "the input is on the CPU" in FusedMBConv(8, 8).why_not_fused(torch.zeros(1, 8, 4, 4))


@pytest.mark.parametrize("value", ["fused", "1", "triton,auto", "None"])
@pytest.mark.parametrize("module", [lambda: FusedMBConv(8, 8), lambda: FusedSqueezeExcite(8, 2)])
def test_a_nonsensical_backend_is_an_error_at_once(module, value, monkeypatch):
    """Also where no kernel could run anyway."""
    monkeypatch.setenv("EFFKERNELS_BACKEND", value)
    with pytest.raises(ValueError, match="EFFKERNELS_BACKEND must be one of"):
        module()(torch.zeros(2, 8, 4, 4))


@pytest.mark.parametrize("content", [None, "", "{", '{"capability": [9, 0]}', '{"capability": [8, 0], "rows": []}'])
def test_a_nonsensical_table_is_an_error_that_names_the_file(content, tmp_path, monkeypatch):
    """EFFKERNELS_TABLE: not there, empty, half written, without rows, of another GPU."""
    path = tmp_path / "table.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("EFFKERNELS_TABLE", str(path))
    tables.forget()
    try:
        with pytest.raises(ValueError, match="table.json"):
            tables._table((9, 0))
    finally:
        tables.forget()


def test_every_configuration_fits_the_smallest_shared_memory():
    """The table in git says what each needs on sm_90; what is above 99 KB there is compiled for sm_86 and sm_89, where
    it needs less.
    """
    rows = json.loads(TABLE.read_text())["rows"]
    assert len(rows) > 100
    over = [row["digest"] for row in rows if row["shared"] > SMALLEST_SHARED_MEMORY]
    if dispatch.triton_problem():
        pytest.skip("Triton is not installed")
    found = run_python(
        """
        import json, torch
        from effkernels.tools import machine_code, shipped
        over = OVER
        shared = [
            [launch.digest(90), arch, machine_code.compile_launch(launch, arch).metadata.shared]
            for launch in shipped.shipped_launches() if launch.digest(90) in over for arch in (86, 89)
        ]
        print(json.dumps(shared))
        """.replace("OVER", repr(over))
    )
    shared = json.loads(found)
    assert {digest for digest, *_ in shared} == set(over)
    assert [row for row in shared if not 0 < row[2] <= SMALLEST_SHARED_MEMORY] == []


@pytest.mark.parametrize(
    "make", [lambda: FusedMBConv(8, 8), lambda: FusedDepthwiseConvBNAct(8), lambda: FusedSqueezeExcite(8, 2)]
)
def test_weights_are_read_where_they_are(make, device, monkeypatch):
    """What a captured graph replays are launches with these addresses: changed in place, weights and statistics
    count.
    """
    from effkernels.kernels.depthwise_forward import depthwise_forward_kernel

    function, addresses = type(depthwise_forward_kernel), set()
    run = function.run

    def recording(self, *args, **kwargs):
        members = [m for v in (*args, *kwargs.values()) for m in (v if isinstance(v, tuple) else (v,))]
        addresses.update(t.data_ptr() for t in members if isinstance(t, torch.Tensor))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(function, "run", recording)
    module = make().to(device).eval()
    with torch.no_grad():
        module(torch.randn(1, 8, 3, 3, device=device))
    tensors = {**dict(module.named_parameters()), **{k: b for k, b in module.named_buffers() if "num_batches" not in k}}
    assert [name for name, t in tensors.items() if t.data_ptr() not in addresses] == []


def test_mixed_devices(monkeypatch):
    """Input and weights apart raise; a parameter or buffer left behind is a reason, and an error where kernels are
    forced.
    """
    with pytest.raises(ValueError, match="x is on meta, the weights are on cpu: move one of them"):
        FusedMBConv(8, 8)(torch.zeros(2, 8, 4, 4, device="meta"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "triton_problem", lambda: None)
    block, x = FusedMBConv(8, 8), torch.zeros(2, 8, 4, 4)
    block.bn2.running_var = block.bn2.running_var.to("meta")
    monkeypatch.setenv("EFFKERNELS_BACKEND", "auto")
    assert block.why_not_fused(x) == "a buffer is on meta, the input on cpu"
    monkeypatch.setenv("EFFKERNELS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="cannot serve: a buffer is on meta, the input on cpu"):
        block(x)
