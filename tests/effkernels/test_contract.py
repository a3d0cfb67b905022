"""What PyTorch promises of a layer holds for the fused ones: compilation without recompiling, autocast, functional
calls, hooks, inference mode, deterministic algorithms, the tensors' own device, bit-equal repetition.
"""

import contextlib
import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from effkernels import FusedDepthwiseConvBNAct, FusedMBConv, FusedSqueezeExcite, dispatch
from effkernels.ops.autograd import OPERATORS
from support.blocks import PLAIN, images, randomise, step, twins
from support.truth import assert_close_to_truth, on_gpu

pytestmark = pytest.mark.usefixtures("small_tiles")
SMALL = (8, 8, 3, 1, 2, 0.5)


def fused(device, cls=FusedMBConv, args=SMALL, **kwargs):
    torch.manual_seed(0)
    module = cls(*args, **kwargs).to(device)
    randomise(module)
    return module


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic, graphs", [(True, 1), (None, 2)])
def test_a_new_batch_or_size_compiles_no_graph_again(dynamic, graphs, device, counter):
    """One graph for all shapes; with PyTorch's default the first shape's, and at the second one for all."""
    module = fused(device, FusedSqueezeExcite, (8, 2))
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=dynamic)
    for shape in ((2, 8, 3, 4), (3, 8, 4, 5), (5, 8, 2, 3), (7, 8, 6, 2)):
        x = images(*shape, device=device)
        torch.testing.assert_close(compiled(x), module(x))
    assert counter.frame_count == graphs


@pytest.mark.parametrize("training", [True, False])
def test_a_block_compiles_once_for_every_batch_and_size(training, device, counter):
    module = fused(device).train(training)
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for shape in ((2, 8, 3, 4), (3, 8, 4, 2), (4, 8, 2, 3)):
        x = images(*shape, device=device)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(compiled(x), eager(x))
    # Dynamo starts over once and leaves an empty one.
    assert sum(len(graph.graph.nodes) > 0 for graph in counter.graphs) == 1


# ---- autocast --------------------------------------------------------------------------------------------------------


def test_autocast_nests(device):
    """The innermost decides, and leaving it gives back what was; the gradients are the parameters' fp32."""
    module, x = fused(device), images(2, 8, 3, 3, device=device)
    module.has_residual = False  # its sum would be of x's dtype
    plain = module.eval()(x)
    with torch.autocast(device, torch.bfloat16):
        outer = module(x)
        with torch.autocast(device, enabled=False):
            assert torch.equal(module(x), plain)
        with torch.autocast(device, torch.float16):
            assert module(x).dtype == torch.float16
        assert torch.equal(module(x), outer) and outer.dtype == torch.bfloat16
    assert plain.dtype == torch.float32
    outer.float().sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


# ---- functional calls and transforms ---------------------------------------------------------------------------------


def test_functional_call(device):
    """Parameters and buffers of the caller are used, differentiated and updated; the module's own stay as they were."""
    module, other = fused(device), fused(device)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.25)
    own = {name: t.clone() for name, t in module.state_dict().items()}
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    given |= {name: b.clone() for name, b in other.named_buffers()}
    x = images(2, 8, 3, 3, device=device)
    out = torch.func.functional_call(module, given, (x,))
    expected = other(x)
    assert torch.equal(out, expected)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    expected.backward(gradient)
    for name, p in other.named_parameters():
        assert torch.equal(given[name].grad, p.grad), name
    for name, b in other.named_buffers():
        assert torch.equal(given[name], b), name
    assert all(torch.equal(t, own[name]) for name, t in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_function_transforms_run_the_plain_layers(device, monkeypatch):
    """torch.func.grad: a custom autograd function has no rule for it, so the gate says no, with the reason; the numbers
    are the same.
    """
    monkeypatch.setenv("EFFKERNELS_BACKEND", "auto")
    module, x = fused(device).eval(), images(2, 8, 3, 3, device=device)
    reasons = []

    def loss(x):
        reasons.append(module.why_not_fused(x))
        return module(x).square().sum()

    transformed = torch.func.grad(loss)(x)
    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert reasons == ["a torch.func transform is active", None]
    torch.testing.assert_close(transformed, leaf.grad, rtol=1e-5, atol=1e-5)


# ---- inference mode, hooks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls, args", [(FusedMBConv, SMALL), (FusedDepthwiseConvBNAct, (8,)), (FusedSqueezeExcite, (8, 2))]
)
def test_inference_mode(cls, args, device):
    module, x = fused(device, cls, args).eval(), images(2, 8, 3, 3, device=device)
    with torch.no_grad():
        expected = module(x)
    with torch.inference_mode():
        out = module(x.clone())
        assert out.is_inference() and torch.equal(out, expected)
    assert torch.equal(module(x), expected)


def test_hooks_of_a_block_and_its_tensors(device):
    """Forward and backward hooks of the block, and hooks of tensors and parameters, see what they see of the plain
    block.
    """
    modules, seen = twins(FusedMBConv, *SMALL, device=device), {}
    x, gradient = images(2, 8, 3, 3, device=device), torch.randn(2, 8, 3, 3, device=device)
    for name, module in modules.items():
        kept = seen[name] = {}
        dtype = torch.float64 if name == "truth" else torch.float32
        leaf = x.to(dtype).requires_grad_()
        module.register_forward_pre_hook(lambda m, args, kept=kept: kept.update(before=args[0]))
        module.register_forward_hook(lambda m, args, out, kept=kept: kept.update(after=out))
        module.register_full_backward_pre_hook(lambda m, grads, kept=kept: kept.update(dout=grads[0]))
        module.register_full_backward_hook(lambda m, dx, dout, kept=kept: kept.update(dx=dx[0]))
        module.conv_dw.weight.register_hook(lambda grad, kept=kept: kept.update(dw=grad))
        module.bn3.bias.register_post_accumulate_grad_hook(lambda p, kept=kept: kept.update(dbeta=p.grad.clone()))
        assert name == "truth" or module.why_not_fused(leaf) is None if hasattr(module, "why_not_fused") else True
        module(leaf).backward(gradient.to(dtype))
    assert set(seen["fused"]) == {"before", "after", "dout", "dx", "dw", "dbeta"}
    assert_close_to_truth(*(seen[name] for name in ("fused", "eager", "truth")))


def test_a_hook_that_changes_the_gradient(device):
    module, x = fused(device), images(2, 8, 3, 3, device=device)
    once = step(module.eval(), x)
    module.register_full_backward_pre_hook(lambda m, grads: (2 * grads[0],))
    twice = step(module, x)
    assert torch.equal(twice["x"], 2 * once["x"]) and torch.equal(twice["bn2.weight"], 2 * once["bn2.weight"])


# ---- determinism -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_and_repetition(device, monkeypatch):
    """torch.use_deterministic_algorithms(True) finds nothing to object to, fills memory with NaN, and changes no bit;
    nor does a run.
    """
    if device == "cuda":
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    block, x = fused(device, drop_path=0.4), images(3, 8, 3, 4, device=device)
    runs = [step(copy.deepcopy(block), x) for _ in range(2)]
    with deterministic():
        runs.append(step(copy.deepcopy(block), x))
    for other in runs[1:]:
        for name, value in runs[0].items():
            assert torch.equal(other[name], value), name


@pytest.fixture
def rows_are_alike(device, monkeypatch):
    """The interpreter multiplies with NumPy, whose BLAS sums the rows of a matrix in different orders on some CPUs; a
    GPU does not. Products of fp64, rounded, are the same in any.
    """
    if device == "cuda":
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        total = a.data.astype("float64") @ b.data.astype("float64") + acc.data
        return interpreter.TensorHandle(total.astype(acc.data.dtype), acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.usefixtures("rows_are_alike")
@pytest.mark.parametrize(
    "cls, args", [(FusedMBConv, SMALL), (FusedDepthwiseConvBNAct, (8,)), (FusedSqueezeExcite, (8, 2))]
)
def test_an_image_does_not_depend_on_its_place_in_the_batch(cls, args, device):
    """With running statistics: the outputs and input gradients of a permuted batch are the permuted ones, and an image
    alone has the same output, bit for bit.
    """
    order = torch.tensor([2, 0, 3, 1], device=device)
    x, gradient = images(4, 8, 3, 4, device=device), torch.randn(4, 8, 3, 4, device=device)
    module = fused(device, cls, args).eval()
    there, here = step(module, x, gradient), step(module, x[order], gradient[order])
    assert torch.equal(there["out"][order], here["out"]) and torch.equal(there["x"][order], here["x"])
    with torch.no_grad():
        assert torch.equal(module(x)[order], module(x[order]))
        assert torch.equal(module(x)[:1], module(x[:1]))


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_kernels_start_on_the_tensors_device(monkeypatch):
    """On a machine of several GPUs the current one need not be x's."""
    entered = []

    @contextlib.contextmanager
    def device_of(device):
        entered.append(device)
        try:
            yield
        finally:
            entered.append("left")

    class OnSecondGpu:
        is_cuda, device = True, torch.device("cuda", 1)

    class Ran(Exception):
        pass

    def implementation(*args, **kwargs):
        entered.append("ran")
        raise Ran

    monkeypatch.setattr(torch.cuda, "device", device_of)
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("effkernels::")
    }
    runs = {}
    for name, operator in OPERATORS.items():
        monkeypatch.setattr(operator, "forward", implementation)
        runs[name] = operator._run, [OnSecondGpu(), *[None] * (len(operator.leaves) - 1)]
        if operator.backward is not None:
            monkeypatch.setattr(operator, "backward", implementation)
            kept, saved = [None] * len(operator.kept), [torch.empty(0)] * (len(operator.results._fields) - 1)
            runs[f"{name}_backward"] = operator._run_backward, [OnSecondGpu(), *kept, *saved, []]
    assert set(runs) == registered, "an operator that is registered elsewhere"
    for name, (run, arguments) in runs.items():
        entered.clear()
        with pytest.raises(Ran):
            run(*arguments)
        assert entered == [torch.device("cuda", 1), "ran", "left"], name


@on_gpu
def test_kernels_on_the_second_gpu(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    module, x = fused("cuda:1").eval(), images(2, 8, 3, 3, device="cuda:1")
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(module(x), PLAIN[FusedMBConv].forward(module, x), rtol=1e-4, atol=1e-5)


def test_the_gate_asks_the_tensors_own_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: {0: (7, 0), 1: (9, 0)}[index])
    assert dispatch.platform_problem("cuda", 1) is None
    assert "sm_70" in dispatch.platform_problem("cuda", 0)


@on_gpu
def test_weights_changed_under_a_captured_graph(device):
    """A replay reads weights and running statistics where they are: changed in place they count, as nothing is folded
    ahead.
    """
    block = fused(device, args=(16, 16, 3, 1, 2, 0.5)).eval()
    x = images(2, 16, 14, 14, device=device)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            block(x)  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = block(x)
        for t in (*block.parameters(), block.bn2.running_var):
            t.mul_(1.5)
        graph.replay()
        assert torch.equal(out, block(x))
