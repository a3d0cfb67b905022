"""``create_model``: a network by its name, fresh or with weights."""

import os
from dataclasses import replace

import torch

from efficientnet.model.config import EfficientNetConfig, present_name
from efficientnet.model.network import EfficientNet
from efficientnet.model.scaling import Scaling
from efficientnet.model.transfer import EfficientNetFeatures
from efficientnet.weights.checkpoints import load_weights, read_weights, stored_cfg
from efficientnet.weights.pretrained import resolve


def create_model(
    name: str | Scaling | EfficientNetConfig,
    *,
    pretrained: bool | str | os.PathLike = False,
    num_classes: int | None = None,
    in_chans: int = 3,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    fused: bool = True,
    padding: str | None = None,
    bn_eps: float | None = None,
    bn_momentum: float | None = None,
    memory: str = "keep",
    features_only: bool = False,
    out_indices: tuple[int, ...] | None = None,
    output_stride: int = 32,
    global_pool: str = "avg",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **unknown,
) -> EfficientNet | EfficientNetFeatures:
    """A network with fresh weights, or with pretrained ones.

    Args:
        name: a name from ``list_models()`` or its short form ("b0" is "efficientnet_b0"), also with a weight tag
            ("efficientnet_b0.ra_in1k"), timm's prefixes ("timm/", "hf-hub:timm/") or timm's old names
            ("tf_efficientnet_b0_ns", with a warning); or a ``Scaling`` such as ``compound_scale(1.5)``; or an
            ``EfficientNetConfig``.
        pretrained: True for the name's default weights, a tag of ``pretrained.list_pretrained(name)``, a path of any
            layout that ``load_checkpoint`` reads, a URL or a Hugging Face Hub id. Downloads go through huggingface_hub
            into its cache (HF_HUB_OFFLINE=1 takes only what is there). ``model.pretrained_cfg`` then says how images
            are prepared, and ``pretrained.transform(model)`` does it. Everything is loaded strictly but the classifier,
            which keeps its fresh weights, with a warning, if num_classes is not that of the weights; and the stem is
            adapted to ``in_chans``.
        num_classes: 0 for no classifier (the model then returns pooled features). None: that of the weights, else 1000.
        in_chans: channels of the images. From three-channel weights one channel takes their sum over channels, more or
            fewer take them in turn, scaled by 3 / in_chans.
        drop_rate: dropout before the classifier, in [0, 1). None: the variant's (B0 0.2 to B7 0.5).
        drop_path_rate: stochastic depth, in [0, 1), growing linearly with the block index. None: 0.2.
        fused: MBConv blocks from ``effkernels.FusedMBConv``; False for plain PyTorch. Same parameters, same numbers.
        padding, bn_eps, bn_momentum: None for what the weights were trained with if they say so (by their metadata or
            layout), else for the name's own, so that timm's weights of that name give timm's logits: "efficientnet_*"
            and scalings have "symmetric", 1e-5, 0.1, and "tf_efficientnet_*" has "same", 1e-3, 0.1. (The paper trained
            with "same", 1e-3, 0.01.)
        memory: what the fused blocks keep for the backward, "keep" or "recompute", as in ``effkernels.FusedMBConv``.
        features_only: return an ``EfficientNetFeatures``, which gives the feature maps of ``out_indices`` (None: all
            five).
        output_stride: 8, 16 or 32 (2 and 4 too). Strides beyond it become dilation, as in timm; blocks with dilation
            run plain layers.
        global_pool: "avg", "max", "avgmax" (half their sum), "catavgmax" (both, for twice the features) or "" (none:
            with num_classes 0 the model returns the head's feature map).
        device, dtype: of the parameters; "meta" builds without memory.

    Raises ValueError for an unknown name or tag or a value out of range, TypeError for an unknown keyword, and with
    pretrained what ``load_checkpoint`` raises.
    """
    if unknown:
        names, accepted = ", ".join(map(repr, unknown)), ", ".join(create_model.__kwdefaults__)
        raise TypeError(f"create_model() got unknown keyword {names}; accepted: {accepted}")
    if out_indices is not None and not features_only:
        raise ValueError("out_indices is for features_only=True")
    if isinstance(name, str):
        name, tag = present_name(name)
        pretrained = tag if tag and pretrained is True else pretrained
    if isinstance(name, EfficientNetConfig):
        config = name
    elif isinstance(name, Scaling):
        config = EfficientNetConfig.from_scaling(name)
    elif isinstance(name, str):
        config = EfficientNetConfig.from_name(name)
    else:
        raise TypeError(f"name must be a str, Scaling or EfficientNetConfig, got {type(name).__name__}")
    settings = {"padding": padding, "bn_eps": bn_eps, "bn_momentum": bn_momentum}
    settings = {field: value for field, value in settings.items() if value is not None}
    weights = cfg = None
    if pretrained:
        if device is not None and torch.device(device).type == "meta":
            raise ValueError("device 'meta' holds no weights: pretrained must be False for it")
        source, cfg = resolve(config.name, pretrained)
        weights = read_weights(source)
        trained = weights.trained_with(config)
        settings = {
            field: trained[field] for field in ("padding", "bn_eps", "bn_momentum") if field in trained
        } | settings
        if num_classes is None:
            num_classes = weights.num_classes(config)
    config = replace(config, **settings)
    model = EfficientNet(
        config,
        num_classes=1000 if num_classes is None else num_classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
        memory=memory,
        output_stride=output_stride,
        global_pool=global_pool,
        fused=fused,
        device=device,
        dtype=dtype,
    )
    if weights:
        load_weights(model, weights, known=settings, adapt=True)
        model.weights_cfg = cfg or stored_cfg(weights.metadata)
    if features_only:
        return EfficientNetFeatures(model, out_indices)
    return model
