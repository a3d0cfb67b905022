"""Whole accelerated networks of every library on kernels, nothing left out of them: logits, all gradients, running statistics.

Images are small, so that the interpreter comes to an end: 33 pixels leave odd sizes at every stride and 2 x 2 of the last features,
which with three images are enough values for a BatchNorm. Inference of the smallest always runs, the others are slow (minutes each).
"""

import copy

import pytest
import torch
from test_convert import calibrated, logits, lukemelas_model, timm_model, torchvision_model, transformers_model
from test_convert_kernels import kernels_of
from torch import nn
from truth import assert_close_to_truth

from effkernels import accelerate, explain

pytestmark = pytest.mark.usefixtures("small_tiles")

slow = pytest.mark.slow
# name: (model, MBConv blocks, whether its head is fused too)
NETWORKS = {
    "torchvision-mobilenet_v3_small-narrow": (lambda: torchvision_model("mobilenet_v3_small", width_mult=0.25), 11, True),
    "timm-efficientnet_b0": (lambda: timm_model("efficientnet_b0", drop_path_rate=0.2), 16, True),
    "timm-tf_efficientnet_lite0": (lambda: timm_model("tf_efficientnet_lite0"), 16, True),
    "timm-tf_mobilenetv3_small_100": (lambda: timm_model("tf_mobilenetv3_small_100"), 11, False),
    "timm-mobilenetv2_035": (lambda: timm_model("mobilenetv2_035"), 17, True),
    "timm-mnasnet_small": (lambda: timm_model("mnasnet_small"), 16, True),
    "torchvision-efficientnet_b0": (lambda: torchvision_model("efficientnet_b0"), 16, True),
    "torchvision-mobilenet_v2": (lambda: torchvision_model("mobilenet_v2"), 17, True),
    "torchvision-mobilenet_v3_small": (lambda: torchvision_model("mobilenet_v3_small"), 11, True),
    "torchvision-mnasnet0_5": (lambda: torchvision_model("mnasnet0_5"), 16, True),
    "lukemelas-b0": (lambda: lukemelas_model("efficientnet-b0", image_size=33, drop_connect_rate=0), 16, True),
    "lukemelas-b1-dynamic": (lambda: lukemelas_model("efficientnet-b1", image_size=None, drop_connect_rate=0), 23, True),
    "lukemelas-b2": (lambda: lukemelas_model("efficientnet-b2", image_size=33, drop_connect_rate=0), 23, True),
    "transformers-b0": (lambda: transformers_model(1.0, 1.0, 224, drop_connect_rate=0.0), 16, False),
    "transformers-b1": (lambda: transformers_model(1.0, 1.1, 240, drop_connect_rate=0.0, depthwise_padding=[5, 8]), 23, False),
    "transformers-b2": (lambda: transformers_model(1.1, 1.2, 260, drop_connect_rate=0.0), 23, False),
}


def networks(always=0):
    return pytest.mark.parametrize("name", [pytest.param(name, marks=slow if i >= always else ()) for i, name in enumerate(NETWORKS)])


def triple(name, size=33, batch=3):
    """{"fused", "eager", "truth"} of one network with random and calibrated BatchNorms, in eval, without dropout; and images."""
    make, blocks, _ = NETWORKS[name]
    eager, _ = calibrated(make, size)
    for module in eager.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its draw depends on the dtype
        if hasattr(module, "drop_rate"):
            module.drop_rate = 0.0
    fused, x = accelerate(copy.deepcopy(eager)), torch.randn(batch, 3, size, size)
    explained = explain(fused, x)
    assert explained.fused == len(explained) == blocks and explained.ends[next(iter(explained.ends))] is None
    return {"fused": fused, "eager": eager, "truth": copy.deepcopy(eager).double()}, x


def operators(name, stem, block, head):
    _, blocks, has_head = NETWORKS[name]
    blocks += "mnasnet0_5" in name  # its first separable layers, which are no module by themselves
    return [stem, *[block] * blocks, *[head] * has_head]


@networks(always=1)
def test_network_in_inference(name, device, monkeypatch):
    modules, x = triple(name)
    runs = kernels_of(monkeypatch)
    with torch.no_grad():
        out = {key: logits(module, x.double() if key == "truth" else x) for key, module in modules.items()}
    assert runs == operators(name, "stem_inference", "mbconv_inference", "head_inference")
    assert_close_to_truth(out["fused"], out["eager"], out["truth"])


def training_step(module, x):
    """Logits, the gradients of images and of every parameter, and the running statistics after it."""
    x = x.detach().requires_grad_()
    torch.manual_seed(1)  # for drop-path
    out = logits(module.train(), x)
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(out.square().sum(), [x, *parameters.values()])
    buffers = {key: value for key, value in module.named_buffers() if value.is_floating_point()}
    return {"logits": out, "images": gradients[0], **dict(zip(parameters, gradients[1:], strict=True)), **buffers}


@networks()
def test_network_in_training(name, device, monkeypatch):
    modules, x = triple(name)
    runs = kernels_of(monkeypatch)
    results = {key: training_step(module, x.double() if key == "truth" else x) for key, module in modules.items()}
    assert runs == operators(name, "stem", "mbconv", "head")
    assert_close_to_truth(*(results[key] for key in ("fused", "eager", "truth")))
