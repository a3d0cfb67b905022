"""Whole accelerated networks of every library on kernels, nothing left out of them: logits, all gradients, running
statistics.

Images are small, so that the interpreter comes to an end: 33 pixels leave odd sizes at every stride and 2 x 2 of the
last features, which with three images are enough values for a BatchNorm. Inference of the smallest always runs, the
others are slow (minutes each).
"""

import copy
import inspect
import itertools
import statistics
from dataclasses import replace

import pytest
import torch
from torch import nn

from effkernels import accelerate, explain, restore
from support.interpreter import HAS_TRITON, INTERPRET
from support.kernel_runs import kernels_of
from support.other_models import calibrated, logits, lukemelas_model, timm_model, torchvision_model, transformers_model
from support.truth import images_away_from_kinks


def _block(size, most=256):
    return min(most, max(16, 1 << (size - 1).bit_length()))


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch):
    """Blocks that take most layers of a network in one program each: the interpreter's time is its operations, whatever
    their size, so a network takes a fifth of the time that it takes in blocks for a GPU, which the tests of kernels and
    blocks run.
    """
    if not (HAS_TRITON and INTERPRET):
        return
    from effkernels.kernels import (
        depthwise_backward,
        depthwise_forward,
        expand_backward,
        pointwise_forward,
        project_backward,
        squeeze_excite,
        weight_gradients,
    )

    def enlarge(module, name, sizes):
        config = getattr(module, name)

        def enlarged(*args, **kwargs):
            problem = inspect.signature(config).bind(*args, **kwargs).arguments.values()
            return replace(config(*args, **kwargs), **sizes(*problem))

        monkeypatch.setattr(module, name, enlarged)

    def strips(K, stride, N, height, width, C, *_):
        return {"S": _block(height * width, 512), "TW": 1, "TH": 1, "BLOCK_C": _block(C)}

    enlarge(depthwise_forward, "depthwise_forward_config", strips)
    enlarge(depthwise_backward, "depthwise_backward_config", strips)
    whole = {"one_block": True, "resident": True, "fragments": False}
    sizes = lambda K, N, rows, *_: {"BLOCK_M": _block(rows), "BLOCK_N": _block(N), "BLOCK_K": _block(K), **whole}  # noqa: E731
    enlarge(pointwise_forward, "pointwise_forward_config", sizes)
    enlarge(
        project_backward, "project_both_config", lambda E, O, rows, *_: {"BLOCK_M": _block(rows), "BLOCK_E": _block(E)}
    )
    enlarge(
        expand_backward,
        "expand_matrix_config",
        lambda E, I, *_: {"BLOCK_M": _block(E), "BLOCK_I": _block(I), "BLOCK_K": _block(E)},
    )
    enlarge(expand_backward, "expand_pass_config", lambda E, I, rows, *_: {"BLOCK_M": _block(rows)})
    enlarge(
        expand_backward, "expand_data_config", lambda E, I, rows, *_: {"BLOCK_M": _block(rows), "BLOCK_K": _block(E)}
    )
    enlarge(
        expand_backward, "expand_weight_config", lambda E, I, rows, *_: {"BLOCK_M": _block(rows), "BLOCK_E": _block(E)}
    )
    enlarge(squeeze_excite, "pool_config", lambda C, *_: {"BLOCK_C": _block(C)})
    enlarge(squeeze_excite, "squeeze_excite_config", lambda *_: {"BLOCK_C": 1024})
    enlarge(squeeze_excite, "gate_backward_config", lambda *_: {"BLOCK_R": 64})
    enlarge(weight_gradients, "partials_config", lambda *_: {"BLOCK_P": 16, "BLOCK_COLS": 16384})
    enlarge(weight_gradients, "image_products_config", lambda *_: {"BLOCK_C": 1024})
    enlarge(weight_gradients, "expand_gradient_config", lambda *_: {"BLOCK_E": 256, "BLOCK_I": 256, "BLOCK_K": 256})


slow = pytest.mark.slow
# name: (model, MBConv blocks, whether its head is fused too)
NETWORKS = {
    "torchvision-mobilenet_v3_small-narrow": (
        lambda: torchvision_model("mobilenet_v3_small", width_mult=0.25),
        11,
        True,
    ),
    "timm-efficientnet_b0": (lambda: timm_model("efficientnet_b0", drop_path_rate=0.2), 16, True),
    "timm-tf_efficientnet_lite0": (lambda: timm_model("tf_efficientnet_lite0"), 16, True),
    "timm-tf_mobilenetv3_small_100": (lambda: timm_model("tf_mobilenetv3_small_100"), 11, False),
    "timm-mobilenetv2_035": (lambda: timm_model("mobilenetv2_035"), 17, True),
    "timm-mnasnet_small": (lambda: timm_model("mnasnet_small"), 15, True),
    "torchvision-efficientnet_b0": (lambda: torchvision_model("efficientnet_b0"), 16, True),
    "torchvision-mobilenet_v2": (lambda: torchvision_model("mobilenet_v2"), 17, True),
    "torchvision-mobilenet_v3_small": (lambda: torchvision_model("mobilenet_v3_small"), 11, True),
    "torchvision-mnasnet0_5": (lambda: torchvision_model("mnasnet0_5"), 16, True),
    "lukemelas-b0": (lambda: lukemelas_model("efficientnet-b0", image_size=33, drop_connect_rate=0), 16, True),
    "lukemelas-b0-drop-connect": (
        lambda: lukemelas_model("efficientnet-b0", image_size=33, drop_connect_rate=0.5),
        16,
        True,
    ),
    "lukemelas-b1-dynamic": (
        lambda: lukemelas_model("efficientnet-b1", image_size=None, drop_connect_rate=0),
        23,
        True,
    ),
    "lukemelas-b2": (lambda: lukemelas_model("efficientnet-b2", image_size=33, drop_connect_rate=0), 23, True),
    "transformers-b0": (lambda: transformers_model(1.0, 1.0, 224, drop_connect_rate=0.0), 16, False),
    "transformers-b1": (
        lambda: transformers_model(1.0, 1.1, 240, drop_connect_rate=0.0, depthwise_padding=[5, 8]),
        23,
        False,
    ),
    "transformers-b2": (lambda: transformers_model(1.1, 1.2, 260, drop_connect_rate=0.0), 23, False),
}


def networks(always=0):
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=slow if i >= always else ()) for i, name in enumerate(NETWORKS)]
    )


def triple(name, size=33, batch=3):
    """{"fused", "eager", "truth"} of one network with random and calibrated BatchNorms, in eval, without dropout; and
    images.
    """
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


def assert_within_bound(fused, eagers, truth):
    """The rule of ``truth.py`` against the largest of several errors of eager PyTorch, for each tensor; of the tensors
    of a training step most are within it against the median of those errors.

    The gradient of a bias vanishes where a BatchNorm follows without a residual in between: what is left of it is
    rounding, which is measured against the gradient of that layer's weight. That of a block whose images are all
    dropped is zero.
    """
    assert fused.keys() == truth.keys()
    ratios = []
    for name, value in truth.items():
        assert fused[name].shape == value.shape, name
        size, weight = value.norm(), truth.get(name.removesuffix("bias") + "weight")
        if name.endswith("bias") and weight is not None and size < 1e-9 * weight.norm():
            size = weight.norm()
        error, *eager = (
            (result[name].double() - value).norm().item() / (size.item() or 1.0) for result in (fused, *eagers)
        )
        assert error <= 2 * max(eager) + 1e-6, (
            f"{name}: relative error {error:.3g}, eager PyTorch's up to {max(eager):.3g}"
        )
        ratios.append(error / (statistics.median(eager) + 1e-9))
    median = statistics.median(ratios)
    assert len(ratios) == 1 or median <= 2, f"errors are {median:.3g} times eager PyTorch's, by the median"


def eager_runs(module, x, run):
    """Results of ``run`` in every order of the images, in both memory formats, with and without oneDNN.

    All are eager PyTorch's of the same function, but rounded otherwise: through the layers of a whole network with
    weights this random one of them is now and then five times nearer to the truth than another, and is no yardstick by
    itself.
    """
    first, *others = itertools.permutations(range(len(x)))
    for order in [first] if drops_images(module) else [first, *others]:
        back = torch.argsort(torch.tensor(order))
        for layout, onednn in itertools.product((torch.contiguous_format, torch.channels_last), (False, True)):
            with torch.backends.mkldnn.flags(enabled=onednn):
                result = run(
                    copy.deepcopy(module).to(memory_format=layout), x[list(order)].contiguous(memory_format=layout)
                )
            yield {key: value[back] if key in PER_IMAGE else value for key, value in result.items()}


PER_IMAGE = ("logits", "images")


def drops_images(module):
    """Whether training draws which images leave out a block: the first draw is for the first image, in whatever order
    they come.
    """
    settings = getattr(module, "_global_params", None)  # efficientnet_pytorch
    rates = [getattr(m, "p" if type(m).__name__ == "StochasticDepth" else "drop_prob", 0) for m in module.modules()]
    return any(rates) or bool(settings and settings.drop_connect_rate)


def inference(module, x):
    with torch.no_grad():
        return {"logits": logits(module, x)}


def training_step(module, x):
    """Logits, the gradients of images and of every parameter, and the running statistics after it."""
    x = x.detach().requires_grad_()
    torch.manual_seed(11)  # for drop-path and drop-connect: some images are dropped, of no block of these networks all
    out = logits(module.train(), x)
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(out.square().sum(), [x, *parameters.values()])
    buffers = {key: value for key, value in module.named_buffers() if value.is_floating_point()}
    return {"logits": out, "images": gradients[0], **dict(zip(parameters, gradients[1:], strict=True)), **buffers}


@networks(always=1)
def test_network_in_inference(name, device, monkeypatch):
    """And what ``restore`` gives back has the bits of the plain one."""
    modules, x = triple(name)
    runs = kernels_of(monkeypatch)
    fused = inference(modules["fused"], x)
    assert runs == operators(name, "stem_inference", "mbconv_inference", "head_inference")
    assert_within_bound(
        fused, list(eager_runs(modules["eager"], x, inference)), inference(modules["truth"], x.double())
    )
    assert torch.equal(logits(restore(modules["fused"]), x), logits(modules["eager"], x))


@pytest.fixture
def same_draws(monkeypatch):
    """efficientnet_pytorch draws in the dtype of the images, and so another stream in float64: here the truth draws as
    fp32 does.
    """
    rand = torch.rand
    monkeypatch.setattr(
        torch, "rand", lambda *size, dtype=None, **settings: rand(*size, **settings).to(dtype or torch.float32)
    )


@networks()
def test_network_in_training(name, device, same_draws, monkeypatch):
    modules, x = triple(name)
    x = images_away_from_kinks(modules["truth"], lambda: torch.randn(x.shape), enough=1e-5)
    runs = kernels_of(monkeypatch)
    fused = training_step(modules["fused"], x)
    assert runs == operators(name, "stem", "mbconv", "head")
    assert_within_bound(
        fused, list(eager_runs(modules["eager"], x, training_step)), training_step(modules["truth"], x.double())
    )
