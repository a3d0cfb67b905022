"""timm's blocks and networks: EfficientNet, MobileNetV2 and V3, MnasNet and what else is made of the same blocks."""

import torch.nn.functional as F
from torch import nn

from effkernels.adapters.equivalents import NORMS, path_of
from effkernels.adapters.parts import DENSE, Block, Network, Reader, Stage, squeeze_excite, with_drop_path


def block_stage(block: nn.Module, conv: str, bn: str, identities: list[tuple[str, nn.Module]]) -> Stage:
    """``network_stage``, and among ``identities`` the layer that a BatchNormAct2d drops by."""
    norm = getattr(block, bn)
    if path_of(type(norm)) in NORMS and norm.drop is not None:
        identities.append((f"{bn}.drop", norm.drop))
    return network_stage(block, conv, bn)


def read_block(block: nn.Module) -> Block | str:
    """InvertedResidual (conv_pw bn1 conv_dw bn2 aa se conv_pwl bn3) and DepthwiseSeparableConv (conv_dw bn1 aa se
    conv_pw bn2).
    """
    if getattr(block, "conv_s2d", None) is not None:
        return "conv_s2d: a space-to-depth convolution comes first"
    identities = []
    if hasattr(block, "conv_pwl"):
        expand = block_stage(block, "conv_pw", "bn1", identities)
        depthwise = block_stage(block, "conv_dw", "bn2", identities)
        project = block_stage(block, "conv_pwl", "bn3", identities)
    else:
        expand = None
        depthwise = block_stage(block, "conv_dw", "bn1", identities)
        project = block_stage(block, "conv_pw", "bn2", identities)
    if getattr(block, "aa", None) is not None:
        identities.append(("aa", block.aa))
    gate = squeeze_excite("se", block.se)
    if isinstance(gate, str):
        return gate
    return with_drop_path(
        Block(
            expand=expand,
            depthwise=depthwise,
            gate=gate,
            project=project,
            residual=block.has_skip,
            identities=tuple(identities),
        ),
        "drop_path",
        block.drop_path,
    )


def network_stage(model: nn.Module, conv: str, bn: str) -> Stage:
    """The convolution and the BatchNorm of these names, and the activation that timm keeps in the BatchNorm."""
    norm = getattr(model, bn)
    # torch's conversion to nn.SyncBatchNorm keeps BatchNormAct2d's activation as a child that nobody calls.
    acts = path_of(type(norm)) in NORMS and norm.act is not None
    return Stage((conv, getattr(model, conv)), (bn, norm), (f"{bn}.act", norm.act) if acts else None)


def read_network(model: nn.Module) -> Network | str:
    """EfficientNet and what else has its stem and head; MobileNetV3's head runs plain."""
    if model.grad_checkpointing:
        return "grad_checkpointing is on"
    stem, bypassed = network_stage(model, "conv_stem", "bn1"), [("conv_stem", model.conv_stem), ("bn1", model.bn1)]
    if not hasattr(model, "bn2"):  # MobileNetV3
        return Network(
            stem=stem,
            middle=model.blocks,
            head="its head pools before its convolution",
            tail=model.forward_head,
            bypassed=tuple(bypassed),
        )
    pool = model.global_pool
    if (
        path_of(type(pool)) != "timm.layers.adaptive_avgmax_pool.SelectAdaptivePool2d"
        or pool.pool_type != "avg"
        or pool.is_identity()
    ):
        head, tail = f"global_pool is {pool}", lambda x: model.forward_head(model.bn2(model.conv_head(x)))
    elif type(pool.flatten) is not nn.Flatten:
        head, tail = "global_pool does not flatten", lambda x: model.forward_head(model.bn2(model.conv_head(x)))
    else:
        head = network_stage(model, "conv_head", "bn2")
        bypassed += [("conv_head", model.conv_head), ("bn2", model.bn2), ("global_pool", pool)]

        def tail(x):
            return model.classifier(F.dropout(x, model.drop_rate, model.training) if model.drop_rate > 0 else x)

    return Network(stem=stem, middle=model.blocks, head=head, tail=tail, bypassed=tuple(bypassed))


BLOCKS = {
    "timm.models._efficientnet_blocks.InvertedResidual": read_block,
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": read_block,
    "timm.models._efficientnet_blocks.EdgeResidual": DENSE,
    "timm.models._efficientnet_blocks.CondConvResidual": (
        "the weights of its convolutions depend on the sample (CondConv)"
    ),
    "timm.models._efficientnet_blocks.UniversalInvertedResidual": "MobileNetV4's block has other depthwise layers",
}
_METHODS = ("forward", "forward_features", "forward_head")
_NAMES = (
    "forward_features forward_head conv_stem bn1 grad_checkpointing torch jit is_scripting checkpoint_seq blocks "
    "global_pool "
    "drop_rate F dropout training classifier conv_head "
)
NETWORKS = {
    "timm.models.efficientnet.EfficientNet": Reader(read_network, _METHODS, _NAMES + "bn2"),
    "timm.models.mobilenetv3.MobileNetV3": Reader(read_network, _METHODS, _NAMES + "norm_head act2 flatten"),
}
