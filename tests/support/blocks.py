"""A fused module beside its plain twin and the twin in float64: the same weights, one step, and the comparison."""

import copy

import torch
from torch import nn

from efficientnet import MBConv
from effkernels import FusedDepthwiseConvBNAct, FusedMBConv, FusedSqueezeExcite
from effkernels.modules.squeeze_excite import SqueezeExcite
from support.truth import assert_close_to_truth


class DepthwiseConvBNAct(FusedDepthwiseConvBNAct):
    """The plain twin (the package needs none)."""

    def forward(self, x):
        return self.forward_reference(x)


PLAIN = {FusedMBConv: MBConv, FusedDepthwiseConvBNAct: DepthwiseConvBNAct, FusedSqueezeExcite: SqueezeExcite}


def randomise(module):
    """BatchNorms as after training: nothing is one or zero, so that a forgotten term is seen."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0.2, 0.5)
            if m.running_mean is not None:
                m.running_mean.normal_(0, 0.5)
                m.running_var.uniform_(0.5, 1.5)


def images(*shape, device="cpu"):
    """Not centred: a mean near zero has few right digits in any order of summation."""
    return torch.randn(shape).to(device) + 0.5


def twins(cls, *args, device="cpu", seed=0, **kwargs):
    """{"fused", "eager", "truth"}: the same weights, plain for eager, float64 for the truth."""
    torch.manual_seed(seed)
    fused = cls(*args, **kwargs)
    randomise(fused)
    plain = PLAIN[cls](*args, **kwargs)
    plain.load_state_dict(fused.state_dict())
    return {"fused": fused.to(device), "eager": plain.to(device), "truth": copy.deepcopy(plain).to(device).double()}


def step(module, x, gradient=None, autocast=None, seed=1):
    """{name: tensor} of one forward and backward: out, gradients of x and of every parameter, and the buffers after
    it.
    """
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)  # for drop-path
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None and x.dtype != torch.float64):
        out = module(x)
    gradient = torch.ones_like(out) if gradient is None else gradient.to(out.dtype)
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(out, [x, *parameters.values()], gradient)
    return {"out": out, "x": grads[0], **dict(zip(parameters, grads[1:], strict=True)), **dict(module.named_buffers())}


def compare(modules, x, gradient, autocast=None):
    results = {name: step(m, x.double() if name == "truth" else x, gradient, autocast) for name, m in modules.items()}
    assert results["fused"]["out"].dtype == results["eager"]["out"].dtype
    for name, value in results["fused"].items():
        if name.endswith("num_batches_tracked"):
            assert value == results["eager"][name]
    results = {
        k: {name: v for name, v in r.items() if not name.endswith("num_batches_tracked")} for k, r in results.items()
    }
    assert_close_to_truth(*(results[name] for name in ("fused", "eager", "truth")))


def random_like_output(module, x):
    with torch.no_grad():
        return torch.randn_like(copy.deepcopy(module).eval()(x.double()), dtype=torch.float32)


def check_block(device, training, I, O, k, s, expand, se, padding, act, drop, H, W, autocast, N=3):  # noqa: E741 (the field's names)
    modules = twins(FusedMBConv, I, O, k, s, expand, se, act=act, padding=padding, drop_path=drop, device=device)
    for module in modules.values():
        module.train(training)
    x = images(N, I, H, W, device=device)
    compare(modules, x, random_like_output(modules["truth"], x), autocast)
