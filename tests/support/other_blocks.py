"""Blocks of other libraries, made as their own models make them; a test skips where the library is not installed."""

import functools

import pytest
from torch import nn


def timm_block(cls, *args, se=None, gate=nn.Sigmoid, **kwargs):
    timm = pytest.importorskip("timm")
    blocks = timm.models._efficientnet_blocks
    if se:
        kwargs["se_layer"] = functools.partial(blocks.SqueezeExcite, rd_ratio=se, gate_layer=gate)
    return getattr(blocks, cls)(*args, **kwargs)


def torchvision_efficientnet_block(kernel, stride, I, O, expand, drop):
    models = pytest.importorskip("torchvision").models
    config = models.efficientnet.MBConvConfig(expand, kernel, stride, I, O, 1)
    return models.efficientnet.MBConv(config, drop, functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01))


def torchvision_mobilenet_block(kernel, I, E, O, se, act, stride):
    models = pytest.importorskip("torchvision").models
    config = models.mobilenetv3.InvertedResidualConfig(I, kernel, E, O, se, act, stride, 1, 1.0)
    return models.mobilenetv3.InvertedResidual(config, functools.partial(nn.BatchNorm2d, eps=0.01, momentum=0.3))


def torchvision_block(path, *args):
    module, name = path.split(".")
    return getattr(getattr(pytest.importorskip("torchvision").models, module), name)(*args)


def lukemelas_block(kernel, stride, I, O, expand, image_size, se=0.25):
    model = pytest.importorskip("efficientnet_pytorch").model
    utils = pytest.importorskip("efficientnet_pytorch").utils
    args = utils.BlockArgs(1, kernel, [stride] if stride == 2 else stride, expand, I, O, se, True)
    settings = utils.GlobalParams(batch_norm_momentum=0.99, batch_norm_epsilon=1e-3)
    return model.MBConvBlock(args, settings, image_size=image_size)


def transformers_block(kernel, stride, I, O, expand, adjust, drop=0.0, act="swish"):
    transformers = pytest.importorskip("transformers")
    from transformers.models.efficientnet.modeling_efficientnet import EfficientNetBlock

    config = transformers.EfficientNetConfig(hidden_act=act)
    return EfficientNetBlock(
        config, I, O, stride, expand, kernel, drop, id_skip=not (stride == 1 and I == O), adjust_padding=adjust
    )
