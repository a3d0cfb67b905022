"""Whole models of other libraries, for ten classes; a test skips where the library is not installed."""

import pytest
import torch
from torch import nn


def timm_model(name, **settings):
    return pytest.importorskip("timm").create_model(name, num_classes=10, **settings)


def torchvision_model(name, **settings):
    return getattr(pytest.importorskip("torchvision").models, name)(num_classes=10, **settings)


def lukemelas_model(name, **settings):
    return pytest.importorskip("efficientnet_pytorch").EfficientNet.from_name(name, num_classes=10, **settings)


def transformers_model(width, depth, image_size, **settings):
    transformers = pytest.importorskip("transformers")
    hidden = int(max(8, int(1280 * width + 4) // 8 * 8))
    config = transformers.EfficientNetConfig(
        width_coefficient=width,
        depth_coefficient=depth,
        image_size=image_size,
        hidden_dim=hidden,
        num_labels=10,
        **settings,
    )
    return transformers.EfficientNetForImageClassification(config)


def calibrated(make, size, seed=0):
    """The model in eval mode, its BatchNorms random and their running statistics those of a batch; and another
    batch.
    """
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
