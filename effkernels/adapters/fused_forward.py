"""What accelerated blocks and networks run: the layers that a reader found, on kernels."""

import torch

from effkernels import dispatch
from effkernels.adapters.judge import ACTS, Verdict, activation, judge_separable, padding_rule
from effkernels.adapters.parts import Block, Network
from effkernels.cpu import inference as cpu_inference
from effkernels.parameters import BatchNormParams, SqueezeExciteParams


def run_block(x: torch.Tensor, block: Block, verdict: Verdict, training: bool) -> torch.Tensor:
    """The block on kernels."""
    from effkernels import functional

    norm = BatchNormParams.of
    se = None
    if block.gate is not None:
        reduce, expand = block.gate.reduce[1], block.gate.expand[1]
        se = SqueezeExciteParams(
            reduce_weight=reduce.weight,
            reduce_bias=reduce.bias,
            expand_weight=expand.weight,
            expand_bias=expand.bias,
            act=verdict.se_act,
            gate=verdict.gate,
        )
    stages = [
        None if s is None else (s.conv[1].weight, norm(s.bn[1])) for s in (block.expand, block.depthwise, block.project)
    ]
    layers = {
        "expand": stages[0],
        "depthwise": stages[1],
        "squeeze_excite": se,
        "project": stages[2],
        "stride": block.depthwise.conv[1].stride[0],
        "padding": verdict.padding,
        "act": verdict.act,
        "residual": block.residual,
    }
    if dispatch.on_onednn(x):  # inference, as the gate said, of layers that fit each other
        out = cpu_inference.mbconv(x, **layers)
    else:
        scale = block.draw_branch_scale(x, block.drop_rate) if block.drop_rate > 0 else None
        out = functional.mbconv(x=x, **layers, training=training, branch_scale=scale)
    return out.to(dispatch.compute_dtype(x)) if block.in_place else out


def run_network(x: torch.Tensor, network: Network) -> torch.Tensor:
    """The whole network, stem, head and what is separable after the stem on kernels."""
    from effkernels import functional

    stem, head = network.stem, network.head
    conv, act = stem.conv[1], activation(stem.act, ACTS, "identity")
    norm = BatchNormParams.of(stem.bn[1])
    x = functional.stem(x, conv.weight, norm, stride=conv.stride[0], padding=padding_rule(stem), act=act)
    if network.separable is not None:
        x = run_block(x, network.separable[1], judge_separable(network), norm.training)
    x = network.middle(x)
    if not isinstance(head, str):
        x = functional.head(
            x, head.conv[1].weight, BatchNormParams.of(head.bn[1]), act=activation(head.act, ACTS, "identity")
        )
    return network.tail(x)
