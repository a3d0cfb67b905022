"""The gate: every reason for not fusing, told and acted upon; and the package where there is no Triton and no GPU."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from efficientnet import MBConv
from effkernels import (
    FusedDepthwiseConvBNAct,
    FusedMBConv,
    FusedSqueezeExcite,
    dispatch,
    explain,
    functional,
    reference,
    why_not_fused,
)
from effkernels.modules.squeeze_excite import SqueezeExcite
from support.python import run_python


@pytest.fixture
def gate(monkeypatch):
    """Kernels may serve CPU tensors and nothing is asked for by name; whether they did is counted instead of run."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("EFFKERNELS_BACKEND", "auto")
    monkeypatch.setattr(dispatch, "triton_problem", lambda: None)
    fused = []
    monkeypatch.setattr(functional, "mbconv", lambda x, *args, **kwargs: fused.append(x) or x)
    for name in ("squeeze_excite", "depthwise_conv_bn_act"):
        monkeypatch.setattr(functional, name, getattr(reference, name))
    return fused


X = torch.randn(2, 8, 4, 4)


def assert_reason(gate, block, reason, x=X):
    """The reason is told, the plain layers run, and forcing kernels raises with it."""
    assert reason in block.why_not_fused(x)
    plain = MBConv.forward(block, x)
    assert torch.equal(block(x), plain) and not gate
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("EFFKERNELS_BACKEND", "triton")
        with pytest.raises(
            RuntimeError, match="EFFKERNELS_BACKEND=triton, but the fused kernels cannot serve: .*"
        ) as error:
            block(x)
        assert reason in str(error.value)


def test_nothing_against_it(gate):
    block = FusedMBConv(8, 8)
    assert block.why_not_fused(X) is None and block.why_not_fused() is None
    block(X)
    assert len(gate) == 1


# ---- the platform ----------------------------------------------------------------------------------------------------


def test_cpu_without_the_interpreter(gate, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    block, reason = (
        FusedMBConv(8, 8).eval(),
        "the input is on the CPU (kernels need an NVIDIA GPU, or TRITON_INTERPRET=1)",
    )
    assert block.why_not_fused(X) == (
        "the input is on the CPU, where inference alone is fused: call it under torch.no_grad()"
    )
    monkeypatch.setenv("EFFKERNELS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        block(X)
    assert FusedMBConv(8, 8).why_not_fused() is None, "the layers alone are fine"


def test_without_triton(gate, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    dispatch.triton_problem.cache_clear()
    try:
        assert_reason([], FusedMBConv(8, 8).eval(), "Triton is not installed")
    finally:
        dispatch.triton_problem.cache_clear()


@pytest.mark.parametrize(
    "device, capability, hip, reason",
    [
        ("cuda", (9, 0), None, None),
        ("cuda", (8, 0), None, None),
        ("cuda", (7, 5), None, "the GPU is sm_75, kernels need sm_80 or newer"),
        ("cuda", (9, 0), "6.0", "AMD GPUs are not supported yet"),
        ("mps", None, None, "kernels need an NVIDIA GPU, the input is on mps"),
    ],
)
def test_platforms(gate, device, capability, hip, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert dispatch.platform_problem(device, 0) == reason


# ---- EFFKERNELS_BACKEND ----------------------------------------------------------------------------------------------


def test_reference_by_name(gate, monkeypatch):
    block = FusedMBConv(8, 8).eval()
    monkeypatch.setenv("EFFKERNELS_BACKEND", "reference")
    assert block.why_not_fused(X) == "EFFKERNELS_BACKEND=reference"
    assert torch.equal(block(X), MBConv.forward(block, X)) and not gate


def test_the_environment_is_read_at_each_call(gate, monkeypatch):
    block = FusedMBConv(8, 8).eval()
    for i, value in enumerate(("auto", "reference", "", " Triton ", "reference", "AUTO")):
        monkeypatch.setenv("EFFKERNELS_BACKEND", value)
        before = len(gate)
        block(X)
        assert len(gate) - before == (value != "reference"), (i, value)


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_nonsense(gate, monkeypatch, interpret):
    monkeypatch.setenv("EFFKERNELS_BACKEND", "cuda")
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(
        ValueError, match=r"EFFKERNELS_BACKEND must be one of \('auto', 'triton', 'reference'\), got 'cuda'"
    ):
        FusedMBConv(8, 8)(X)


@pytest.mark.parametrize("backend", [None, "", "auto", " Reference ", "triton", "cuda"])
@pytest.mark.parametrize("interpret", [None, "", "0", "off", "1", "On"])
def test_the_short_gate_of_a_cpu_agrees_with_the_whole(gate, monkeypatch, backend, interpret):
    """It says yes exactly where the whole gate gives a reason that holds for every CPU tensor, and never where it would
    raise.
    """
    for name, value in (("EFFKERNELS_BACKEND", backend), ("TRITON_INTERPRET", interpret)):
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    try:
        reason = FusedMBConv(8, 8).why_not_fused(X)
    except (RuntimeError, ValueError):
        reason = None
    if backend == " Reference " and interpret in ("1", "On"):
        return  # the reason is there, the short gate leaves it to the whole
    assert dispatch.only_plain_on_cpu(X) == (reason is not None)


def test_a_cpu_without_kernels_asks_nothing_of_the_layers(gate, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(dispatch, "why_not_fused", lambda *args: pytest.fail("the whole gate ran"))
    for module in (FusedMBConv(8, 8), FusedDepthwiseConvBNAct(8), FusedSqueezeExcite(8, 2)):
        module(X)


# ---- the input -------------------------------------------------------------------------------------------------------


def test_float64(gate):
    reason = "compute dtype torch.float64 is not one of float32, bfloat16, float16"
    assert_reason(gate, FusedMBConv(8, 8).double().eval(), reason, X.double())
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        assert reason in FusedMBConv(8, 8).double().why_not_fused(X.double())


def test_empty_batch(gate, monkeypatch):
    """No work for any kernel: the plain layers give the empty result, even where kernels are asked for by name."""
    block = FusedMBConv(8, 8).eval()
    assert block.why_not_fused(X[:0]) == "the input is empty"
    monkeypatch.setenv("EFFKERNELS_BACKEND", "triton")
    assert block(X[:0]).shape == (0, 8, 4, 4) and not gate


def test_too_large_an_image(gate):
    x = torch.zeros(()).expand(1, 8, 6689, 6689)  # times 48 channels: just above 2^31 elements
    assert "2**31 elements or more" in FusedMBConv(8, 8).why_not_fused(x)
    assert FusedMBConv(8, 8).why_not_fused(x[..., :-1]) is None


def test_parameters_of_another_dtype_or_device(gate):
    block = FusedMBConv(8, 8)
    assert (
        "a parameter is torch.bfloat16; it must be float32 or the compute dtype torch.float32"
        in block.bfloat16().why_not_fused(X)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert block.why_not_fused(X) is None
    assert block.why_not_fused(X.bfloat16()) is None
    block = FusedMBConv(8, 8)
    block.bn3.to("meta")
    assert block.why_not_fused(X) == "a parameter is on meta, the input on cpu"


# ---- the layers ------------------------------------------------------------------------------------------------------

LAYERS = ("conv_pw", "bn1", "conv_dw", "bn2", "se", "se.conv_reduce", "se.conv_expand", "conv_pwl", "bn3")


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks(gate, name, register):
    """A hook on a submodule runs."""
    block = FusedMBConv(8, 8).train()
    calls = []
    handle = getattr(block.get_submodule(name), register)(lambda *args: calls.append(name))
    assert block.why_not_fused(X) == f"{name} has hooks"
    block(X.clone().requires_grad_()).sum().backward()
    assert calls == [name] and not gate
    handle.remove()
    assert block.why_not_fused(X) is None


def test_hooks_on_the_block_itself_are_fine(gate):
    block, calls = FusedMBConv(8, 8), []
    block.register_forward_hook(lambda *args: calls.append(1))
    block(X)
    assert calls == [1] and len(gate) == 1


class OtherConv(nn.Conv2d):
    """Weight-standardised, quantised, ...: what its forward does is not known."""


class OtherNorm(nn.BatchNorm2d):
    pass


class OtherSqueezeExcite(FusedSqueezeExcite):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    "name, layer, reason",
    [
        ("conv_pw", lambda: OtherConv(8, 48, 1, bias=False), "conv_pw is a OtherConv"),
        ("bn2", lambda: OtherNorm(48), "bn2 is a OtherNorm"),
        ("bn3", lambda: nn.BatchNorm2d(8, affine=False), "bn3 has no weight and bias (affine=False)"),
        ("bn1", nn.Identity, "bn1 is a Identity"),
        ("conv_pwl", lambda: nn.Conv2d(48, 8, 1), "conv_pwl has a bias"),
        ("se", lambda: OtherSqueezeExcite(48, 2), "se is a OtherSqueezeExcite"),
        ("se", lambda: nn.ReLU(), "se is a ReLU"),
        ("se.conv_reduce", lambda: nn.Conv2d(48, 2, 1, bias=False), "se.conv_reduce has no bias"),
        ("se.conv_expand", lambda: OtherConv(2, 48, 1), "se.conv_expand is a OtherConv"),
    ],
)
def test_other_layers(gate, name, layer, reason):
    block = FusedMBConv(8, 8)
    block.set_submodule(name, layer())
    assert block.why_not_fused() == reason
    assert_reason(gate, block.eval(), reason)


def test_pruned_and_parametrised(gate):
    pruned = FusedMBConv(8, 8).eval()
    prune.l1_unstructured(pruned.conv_dw, "weight", amount=0.5)
    assert_reason(gate, pruned, "conv_dw has hooks")
    parametrised = FusedMBConv(8, 8).eval()
    parametrize.register_parametrization(parametrised.conv_pw, "weight", nn.Identity())
    assert_reason(gate, parametrised, "conv_pw is a ParametrizedConv2d")


def test_plain_squeeze_excite_is_fused_too(gate):
    block = FusedMBConv(8, 8)
    block.se = SqueezeExcite(48, 2)
    assert block.why_not_fused(X) is None


@pytest.mark.parametrize(
    "module, name", [(lambda: FusedDepthwiseConvBNAct(8), "bn"), (lambda: FusedSqueezeExcite(8, 2), "conv_expand")]
)
def test_the_smaller_modules_ask_too(gate, module, name):
    module = module()
    assert module.why_not_fused(X) is None and module.why_not_fused() is None
    module.get_submodule(name).register_forward_hook(lambda *args: None)
    assert module.why_not_fused(X) == f"{name} has hooks"
    assert torch.equal(module.eval()(X), module.forward_reference(X))


def test_layers_alone_never_raise(gate, monkeypatch):
    """Without an input the question is about the layers; it is not a request that could fail."""
    monkeypatch.setenv("EFFKERNELS_BACKEND", "triton")
    assert why_not_fused(None, {"conv": OtherConv(1, 1, 1, bias=False)}) == "conv is a OtherConv"


def test_explain(gate):
    model = nn.Sequential(FusedMBConv(8, 8), MBConv(8, 8), nn.Sequential(FusedMBConv(8, 8), FusedDepthwiseConvBNAct(8)))
    model[2][0].bn1 = OtherNorm(48)
    reasons = {"0": None, "1": None, "2.0": "bn1 is a OtherNorm", "2.1": None}
    assert explain(model) == reasons
    assert explain(model).waiting == {"1"}  # a plain block that accelerate would fuse


# ---- processes of their own ------------------------------------------------------------------------------------------


def test_imports_are_lazy():
    """The package alone imports nothing; its modules import PyTorch, but neither Triton nor CUDA."""
    run_python(
        """
        import sys
        import effkernels
        assert "torch" not in sys.modules and "triton" not in sys.modules
        from effkernels import FusedDepthwiseConvBNAct, FusedMBConv, FusedSqueezeExcite
        from effkernels import explain, functional, reference, why_not_fused
        from effkernels.configs.rules import depthwise_forward_config
        import torch
        assert "triton" not in sys.modules
        block = FusedMBConv(8, 8)
        block(torch.randn(2, 8, 4, 4)).sum().backward()
        assert "triton" not in sys.modules and not torch.cuda.is_initialized()
        assert set(effkernels.__all__) <= set(dir(effkernels))
        """
    )


def test_where_triton_is_not_installed():
    """The same numbers as the plain block; and who asks for kernels by name is told."""
    run_python(
        """
        import os, sys
        sys.modules["triton"] = None  # "import triton" fails, and find_spec finds nothing
        import torch
        from efficientnet import MBConv
        from effkernels import FusedMBConv
        fused, plain = FusedMBConv(8, 8), MBConv(8, 8)
        plain.load_state_dict(fused.state_dict())
        x = torch.randn(2, 8, 4, 4)
        results = []
        for block in (fused, plain):
            block(x).square().sum().backward()
            results.append([p.grad for p in block.parameters()] + list(block.buffers()))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        from effkernels import dispatch
        dispatch.FEWEST_PIXELS = 0
        with torch.no_grad():  # oneDNN's convolutions need no Triton
            assert fused.eval().why_not_fused(x) is None
            torch.testing.assert_close(fused(x), plain.eval()(x))
        os.environ["EFFKERNELS_BACKEND"] = "triton"
        try:
            fused(x)
        except RuntimeError as error:
            assert "Triton is not installed" in str(error)
        else:
            raise AssertionError("no error")
        """
    )


def test_interpreter_by_environment():
    """TRITON_INTERPRET=1 in the environment of a fresh process runs the kernels on CPU tensors, with nothing else
    said.
    """
    if dispatch.triton_problem():
        pytest.skip("Triton is not installed")
    run_python(
        """
        import sys, torch
        from effkernels import FusedSqueezeExcite
        module, x = FusedSqueezeExcite(8, 2), torch.randn(1, 8, 2, 2)
        out = module(x)
        assert "effkernels.kernels.squeeze_excite" in sys.modules
        torch.testing.assert_close(out, module.forward_reference(x))
        """,
        TRITON_INTERPRET="1",
    )
