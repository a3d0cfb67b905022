"""Where kernels run in the tests of this folder: on the CPU in Triton's interpreter, and on a GPU under the marker
``gpu``.
"""

from dataclasses import replace

import pytest
import torch

from support.interpreter import HAS_TRITON, INTERPRET


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The device of the tensors of this test; kernels run on them, or the test fails."""
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if (request.param == "cpu") != INTERPRET:
        pytest.skip(f"Triton was loaded with TRITON_INTERPRET={int(INTERPRET)} in this process")
    if request.param == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("EFFKERNELS_BACKEND", "triton")
    # fp32 means fp32: with TF32 eager's own error, and so the bound, would be a thousand times larger.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return request.param


GUARD = 64  # elements on either side: 128 bytes or more, so that alignment is kept


@pytest.fixture
def scratch(device, monkeypatch):
    """Memory that launchers allocate starts as NaN (counters: a wild number) between such margins, which the test must
    not change.

    So an element that a kernel leaves unwritten, reads before it is written, or reads or writes beyond an end is seen.
    """
    from torch._dynamo.trace_rules import get_torch_obj_rule_map

    # The compiler keeps for good what torch.empty is when it first looks: that must not be ours.
    get_torch_obj_rule_map()
    margins = []

    def guarded(allocate):
        def allocation(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if (
                tensor.numel() <= 1
                or tensor.device.type != device
                or not (tensor.is_floating_point() or tensor.dtype == torch.int32)
            ):
                return tensor
            poison = float("nan") if tensor.is_floating_point() else 0x7A7A7A7A  # int32: counters
            size = tensor.untyped_storage().nbytes() // tensor.element_size()
            buffer = torch.full((size + 2 * GUARD,), poison, dtype=tensor.dtype, device=tensor.device)
            margins.append((buffer[:GUARD].clone(), buffer[:GUARD], buffer[-GUARD:]))
            return buffer.as_strided(tensor.shape, tensor.stride(), GUARD)

        return allocation

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))
    yield
    for was, *pair in margins:  # as bytes, since NaN is not NaN
        assert all(torch.equal(margin.view(torch.uint8), was.view(torch.uint8)) for margin in pair), (
            "a kernel wrote beyond an end"
        )


@pytest.fixture
def small_tiles(monkeypatch):
    """Depthwise tiles that the interpreter runs ten times faster: it unrolls columns, but does strips at once (and
    products as they are). For tests of what is around the kernels; test_depthwise.py runs the tiles that ship.
    """
    if INTERPRET and HAS_TRITON:
        from effkernels.kernels import depthwise_backward, depthwise_forward

        for module in (depthwise_forward, depthwise_backward):
            name = f"{module.__name__.rpartition('.')[2]}_config"
            config = getattr(module, name)

            def small(config=config, **problem):
                found = config(**problem)
                return found if found.products else replace(found, S=32, TW=1, TH=1)

            monkeypatch.setattr(module, name, small)


@pytest.fixture
def twins_serve(monkeypatch):
    """CPU tensors pass the gate, and what the kernels would compute the plain twins of ``effkernels.reference`` do:
    blocks so run.
    """
    from effkernels import dispatch, functional, reference

    served = []

    def twin(name):
        def call(*args, **kwargs):
            served.append(name)
            return getattr(reference, name)(*args, **kwargs)

        return call

    monkeypatch.setattr(dispatch, "without_triton_on_cpu", lambda: False)
    monkeypatch.setattr(dispatch, "platform_problem", lambda *device: None)
    for name in ("mbconv", "stem", "head"):
        monkeypatch.setattr(functional, name, twin(name))
    monkeypatch.setattr(dispatch, "COMPUTE_DTYPES", (*dispatch.COMPUTE_DTYPES, torch.float64))
    return served
