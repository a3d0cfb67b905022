"""accelerate, restore and explain on whole models of every library: the same numbers, the same objects, and back again."""

import copy

import pytest
import torch
from torch import nn
from truth import relative_error

from efficientnet import create_model
from effkernels import accelerate, dispatch, explain, functional, reference, restore


def timm_model(name, **settings):
    return pytest.importorskip("timm").create_model(name, num_classes=10, **settings)


def torchvision_model(name):
    return getattr(pytest.importorskip("torchvision").models, name)(num_classes=10)


def lukemelas_model(name, **settings):
    return pytest.importorskip("efficientnet_pytorch").EfficientNet.from_name(name, num_classes=10, **settings)


def transformers_model(width, depth, image_size, **settings):
    transformers = pytest.importorskip("transformers")
    hidden = int(max(8, int(1280 * width + 4) // 8 * 8))
    config = transformers.EfficientNetConfig(
        width_coefficient=width, depth_coefficient=depth, image_size=image_size, hidden_dim=hidden, num_labels=10, **settings
    )
    return transformers.EfficientNetForImageClassification(config)


# name: (model, its MBConv blocks, how many of them kernels serve, image size)
MODELS = {
    "timm-efficientnet_b0": (lambda: timm_model("efficientnet_b0", drop_path_rate=0.2), 16, 16, 64),
    "timm-tf_efficientnet_b1": (lambda: timm_model("tf_efficientnet_b1"), 23, 23, 49),
    "timm-tf_efficientnet_lite0": (lambda: timm_model("tf_efficientnet_lite0"), 16, 16, 64),
    "timm-tf_efficientnet_es": (lambda: timm_model("tf_efficientnet_es"), 18, 11, 32),
    "timm-mobilenetv2_100": (lambda: timm_model("mobilenetv2_100"), 17, 17, 64),
    "timm-tf_mobilenetv3_small_100": (lambda: timm_model("tf_mobilenetv3_small_100"), 11, 11, 65),
    "timm-semnasnet_100": (lambda: timm_model("semnasnet_100"), 16, 16, 64),
    "torchvision-efficientnet_b0": (lambda: torchvision_model("efficientnet_b0"), 16, 16, 64),
    "torchvision-efficientnet_v2_s": (lambda: torchvision_model("efficientnet_v2_s"), 40, 30, 32),
    "torchvision-mobilenet_v2": (lambda: torchvision_model("mobilenet_v2"), 17, 17, 64),
    "torchvision-mobilenet_v3_small": (lambda: torchvision_model("mobilenet_v3_small"), 11, 11, 64),
    "torchvision-mnasnet0_5": (lambda: torchvision_model("mnasnet0_5"), 16, 16, 64),
    "lukemelas-b0": (lambda: lukemelas_model("efficientnet-b0", drop_connect_rate=0), 16, 16, 64),
    "lukemelas-b1": (lambda: lukemelas_model("efficientnet-b1"), 23, 23, 49),
    "lukemelas-b0-dynamic": (lambda: lukemelas_model("efficientnet-b0", image_size=None), 16, 16, 49),
    "transformers-b0": (lambda: transformers_model(1.0, 1.0, 224), 16, 16, 64),
    "transformers-b1": (lambda: transformers_model(1.0, 1.1, 240, depthwise_padding=[5, 8]), 23, 23, 49),
    "transformers-half": (lambda: transformers_model(0.5, 0.5, 224, drop_connect_rate=0.0), 10, 10, 64),
    "own-b0": (lambda: create_model("efficientnet_b0", num_classes=10, fused=False), 16, 16, 64),
    "own-tf_b0": (lambda: create_model("tf_efficientnet_b0", num_classes=10, fused=False), 16, 16, 49),
    "own-b1": (lambda: create_model("efficientnet_b1", num_classes=10, fused=False), 23, 23, 32),
}


def calibrated(make, size, seed=0):
    """The model in eval mode, its BatchNorms random and their running statistics those of a batch; and another batch."""
    torch.manual_seed(seed)
    model, momenta = make(), {}
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.3)
            momenta[m], m.momentum = m.momentum, 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, size, size))
    for m, momentum in momenta.items():
        m.momentum = momentum
    return model.eval(), torch.randn(2, 3, size, size)


def logits(model, x):
    out = model(x)
    return getattr(out, "logits", out)


@pytest.fixture
def twins_serve(monkeypatch):
    """CPU tensors pass the gate, and what the kernels would compute the plain twins of ``effkernels.reference`` do: blocks so run."""
    served = []

    def twin(*args, **kwargs):
        served.append(args[0].shape)
        return reference.mbconv(*args, **kwargs)

    monkeypatch.setattr(dispatch, "only_plain_on_cpu", lambda: False)
    monkeypatch.setattr(dispatch, "platform_problem", lambda *device: None)
    monkeypatch.setattr(functional, "mbconv", twin)
    monkeypatch.setattr(dispatch, "COMPUTE_DTYPES", (*dispatch.COMPUTE_DTYPES, torch.float64))
    return served


@pytest.mark.parametrize("name", MODELS)
def test_a_model_and_back(name, twins_serve):
    """Same logits through what is read from each block; every eligible block fused; restored: the same objects and bits."""
    make, blocks, eligible, size = MODELS[name]
    model, x = calibrated(make, size)
    before = explain(model)
    modules, types = list(model.modules()), [type(m) for m in model.modules()]
    tensors = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        plain = logits(model, x)
        assert accelerate(model) is model
        fused = logits(model, x)
    assert relative_error(fused, plain.double()) < 1e-5
    assert len(twins_serve) == eligible

    after = explain(model)
    assert before == after and len(after) == blocks and after.fused == eligible
    assert before.fused == 0 and len(before.waiting) == eligible and not after.waiting
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == tensors
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(isinstance(m, t) for m, t in zip(model.modules(), types, strict=True))

    classes = [type(m) for m in model.modules()]
    assert [type(m) for m in accelerate(model).modules()] == classes  # twice is once
    assert restore(model) is model
    assert [type(m) for m in model.modules()] == types
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    with torch.no_grad():
        assert torch.equal(logits(model, x), plain)
    assert restore(model) is model and explain(model) == before


TRAINED = ["timm-efficientnet_b0", "torchvision-mobilenet_v3_small", "lukemelas-b0", "transformers-half", "own-tf_b0"]


@pytest.mark.parametrize("name", TRAINED)
def test_training_with_an_optimizer_made_before(name, twins_serve):
    """Two steps of SGD give the parameters and buffers of the plain model; a checkpoint of it loads into the plain model strictly."""
    make, _, eligible, size = MODELS[name]
    model, x = calibrated(make, size)
    # Weights this random amplify rounding from layer to layer: in float64 what is left is what is wrong. So drop-path's factors are
    # ones that fp32 holds exactly.
    for m in model.modules():
        if hasattr(m, "drop_prob"):
            m.drop_prob = 0.5
    results = []
    for fuse in (False, True):
        trained = copy.deepcopy(model).double().train()
        optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3, momentum=0.9)
        if fuse:
            accelerate(trained)
        for seed in range(2):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            logits(trained, x.double()).square().sum().backward()
            optimizer.step()
        results.append(trained)
    assert len(twins_serve) == 2 * eligible
    plain, fused = results
    for key, value in fused.state_dict().items():
        assert relative_error(value, plain.state_dict()[key]) < 1e-6, key
    for (key, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9, msg=key)
    plain.load_state_dict(fused.state_dict(), strict=True)
    assert torch.equal(logits(plain.eval(), x.double()), logits(restore(fused).eval(), x.double()))
