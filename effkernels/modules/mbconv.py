"""The MBConv block: its layers (MBConvBase, shared with efficientnet.MBConv) and the fused module."""

from numbers import Real

import torch
from torch import nn

from effkernels import dispatch, reference
from effkernels.cpu import inference as cpu_inference
from effkernels.geometry import check_activation, check_conv_args
from effkernels.modules.squeeze_excite import FusedSqueezeExcite, SqueezeExcite
from effkernels.parameters import BatchNormParams, SqueezeExciteParams
from effkernels.reference import ACTIVATIONS, activate, check_memory, drop_path


class MBConvBase(nn.Module):
    """Layers of one MBConv block under timm's names, and their plain PyTorch forward.

    With expand_ratio > 1: ``conv_pw bn1 conv_dw bn2 se conv_pwl bn3`` (expand, depthwise, squeeze-excite, project);
    with expand_ratio 1: ``conv_dw bn1 se conv_pw bn2``. Subclasses choose the schedule, never the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        expand_ratio: float = 6.0,
        se_ratio: float = 0.25,
        *,
        act: str = "silu",
        padding: str = "symmetric",
        bn_eps: float = 1e-3,
        bn_momentum: float | None = 0.01,
        drop_path: float = 0.0,
        memory: str = "keep",
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_memory(memory)
        if not isinstance(dilation, int) or isinstance(dilation, bool) or dilation < 1:
            raise ValueError(f"dilation must be an integer >= 1, got {dilation!r}")
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        check_conv_args(kernel_size, stride, padding)
        if not isinstance(expand_ratio, Real) or not 1 <= expand_ratio < float("inf"):
            raise ValueError(f"expand_ratio must be a finite number >= 1, got {expand_ratio!r}")
        if not isinstance(se_ratio, Real) or not 0 <= se_ratio <= 1:
            raise ValueError(f"se_ratio must be a number in [0, 1] (of the block's input channels), got {se_ratio!r}")
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {sorted(ACTIVATIONS)}, got {act!r}")
        if not isinstance(drop_path, Real) or not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be a number in [0, 1), got {drop_path!r}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.expand_ratio, self.se_ratio, self.act, self.drop_path = expand_ratio, se_ratio, act, drop_path
        self.memory, self.dilation = memory, dilation
        self.has_residual = stride == 1 and in_channels == out_channels

        mid = round(in_channels * expand_ratio)
        factory = {"device": device, "dtype": dtype}
        self.expands = mid != in_channels

        def norm(channels):
            return nn.BatchNorm2d(channels, eps=bn_eps, momentum=bn_momentum, **factory)

        def pointwise(inputs, outputs):
            return nn.Conv2d(inputs, outputs, 1, bias=False, **factory)

        if self.expands:
            self.conv_pw, self.bn1 = pointwise(in_channels, mid), norm(mid)
        symmetric = dilation * (kernel_size - 1) // 2 if padding == "symmetric" else 0
        conv_dw = nn.Conv2d(mid, mid, kernel_size, stride, symmetric, dilation, groups=mid, bias=False, **factory)
        self.conv_dw = conv_dw
        setattr(self, "bn2" if self.expands else "bn1", norm(mid))
        if se_ratio > 0:
            reduced = max(1, int(in_channels * se_ratio))
            self.se = SqueezeExcite(mid, reduced, act, **factory)  # its layers; FusedMBConv's own gate covers them
        else:
            self.se = nn.Identity()
        if self.expands:
            self.conv_pwl, self.bn3 = pointwise(mid, out_channels), norm(out_channels)
        else:
            self.conv_pw, self.bn2 = pointwise(mid, out_channels), norm(out_channels)

    def check_input(self, x: torch.Tensor) -> None:
        """ValueError/TypeError naming what is wrong with the block's input, before any work."""
        check_activation(
            x=x,
            weight=getattr(self.conv_dw, "weight", None),
            channels=self.in_channels,
            kernel_size=self.extent,
            stride=self.stride,
            padding=self.padding,
        )
        if self.training and x.shape[0] == 0:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got an empty batch of shape {tuple(x.shape)}"
            )

    @property
    def drops(self) -> bool:
        """Whether ``forward`` drops samples' branches now."""
        return self.training and self.has_residual and self.drop_path > 0

    def forward_reference(self, x: torch.Tensor, draws: torch.Tensor | None = None) -> torch.Tensor:
        """The block in plain PyTorch, layer by layer through the submodules (so their hooks run)."""
        if not dispatch.recording(x):
            self.check_input(x)
        return self._plain(x, draws)

    def _plain(self, x, draws=None):
        y = x
        if self.expands:
            y = activate(self.bn1(self.conv_pw(y)), self.act)
        if self.padding != "symmetric" and not dispatch.pads_itself(self.conv_dw):
            y = reference.pad(y, self.extent, self.stride, self.padding)
        y = activate(self.depthwise_norm(self.conv_dw(y)), self.act)
        y = self.project_norm(self.project_conv(self.se(y)))
        if self.has_residual:
            y = drop_path(y, self.drop_path, self.training, draws) + x
        return y

    @property
    def extent(self) -> int:
        """Pixels that the depthwise kernel spans in each direction."""
        return self.dilation * (self.kernel_size - 1) + 1

    # The layers by what they do, since timm's names shift when there is no expand convolution.
    @property
    def depthwise_norm(self) -> nn.Module:
        """The BatchNorm after the depthwise convolution."""
        return self.bn2 if self.expands else self.bn1

    @property
    def project_conv(self) -> nn.Module:
        """The 1x1 convolution that ends the block."""
        return self.conv_pwl if self.expands else self.conv_pw

    @property
    def project_norm(self) -> nn.Module:
        """The BatchNorm after it."""
        return self.bn3 if self.expands else self.bn2

    def extra_repr(self) -> str:
        names = ("expand_ratio", "se_ratio", "act", "padding", "drop_path")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class FusedMBConv(MBConvBase):
    """MBConv block on fused kernels (NOT EfficientNetV2's "Fused-MBConv", a dense k x k convolution for expand +
    depthwise).

    ``[1x1 expand, BN, act] -> k x k depthwise, BN, act -> squeeze-excite -> 1x1 project, BN -> [drop-path, + input]``
    with the arguments, parameters, buffers and numbers of ``efficientnet.MBConv``; swapping the two classes changes the
    speed only. On a CPU tensor, in eval and under ``torch.no_grad()``, it runs oneDNN's fused convolutions
    (``effkernels.cpu``).

    Args:
        in_channels, out_channels: I and O; the expanded width is ``round(in_channels * expand_ratio)``.
        kernel_size: odd, up to ``effkernels.geometry.LARGEST_KERNEL_SIZE``. stride: 1 or 2.
        expand_ratio: >= 1; at 1 there is no expand convolution.
        se_ratio: in [0, 1], of the block's INPUT channels; 0 drops squeeze-excite.
        act: a name in ``effkernels.reference.ACTIVATIONS``. padding: one in ``effkernels.geometry.PADDINGS``.
        bn_eps, bn_momentum: of every BatchNorm; momentum None is the cumulative average.
        drop_path: probability of dropping the residual branch of a sample in training.
        dilation: of the depthwise convolution; above 1 the plain layers run.
        memory: what training keeps for the backward: "keep", the three convolutions' outputs; "recompute", not the
            first, which is computed again from x (one more pass over it for about half the memory). The plain layers
            keep what autograd keeps.

    Shapes: x [N, I, H, W] (channels_last costs no copy) -> [N, O, H', W'], channels_last. Dtypes: fp32, bf16, fp16, or
    what autocast says; parameters fp32 or of the compute dtype. Where it cannot be fused, it runs the plain layers:
    ``why_not_fused(x)`` tells the reason. Raises ValueError/TypeError for a wrong argument or input, RuntimeError if
    EFFKERNELS_BACKEND=triton cannot be honoured.
    Source: Sandler et al. 2018 (MobileNetV2), Hu et al. 2018 (squeeze-excite), Tan & Le 2019 (EfficientNet).
    """

    def why_not_fused(self, x: torch.Tensor | None = None) -> str | None:
        """None if the kernels will serve x (or, without x, this block at all), else the reason why not."""
        if self.dilation != 1:
            return f"the depthwise convolution has dilation {self.dilation}, kernels need 1"
        if not isinstance(self.act, str):
            return f"act is a {type(self.act).__name__}"
        pad = (self.kernel_size - 1) // 2 if self.padding == "symmetric" else 0
        I, O, E = self.in_channels, self.out_channels, round(self.in_channels * self.expand_ratio)
        shapes = {"conv_dw": (E, 1)}
        if self.expands:
            shapes |= {"conv_pw": (E, I), "bn1": (E,), "bn2": (E,), "conv_pwl": (O, E), "bn3": (O,)}
        else:
            shapes |= {"bn1": (E,), "conv_pw": (O, E), "bn2": (O,)}
        if isinstance(self.se, SqueezeExcite) and isinstance(self.se.conv_reduce, nn.Conv2d):
            R = self.se.conv_reduce.out_channels
            shapes |= {"se.conv_reduce": (R, E), "se.conv_expand": (E, R)}
        return dispatch.why_not_fused(
            x=x,
            layers=self._layers(),
            largest=max(E, O),
            depthwise=(self.kernel_size, self.stride, pad),
            shapes=shapes,
            drops=self.drops,
        )

    def _layers(self):
        """(name, layer) of everything whose own forward the kernels replace; a generator, so the CPU path does not pay
        for it.
        """
        for name, layer in self.named_children():
            if type(layer) in (SqueezeExcite, FusedSqueezeExcite) and not dispatch.has_hooks(layer):
                yield from ((f"{name}.{inner}", sublayer) for inner, sublayer in layer.named_children())
            elif name != "se" or type(layer) is not nn.Identity:
                yield name, layer

    def __prepare_scriptable__(self):
        raise ValueError(
            "torch.jit.script compiles no kernels: give it torch.fx.symbolic_trace(block.eval()), or trace it"
        )

    def forward(self, x: torch.Tensor, draws: torch.Tensor | None = None) -> torch.Tensor:
        """draws: fp32 [N] from [0, 1) for drop_path (a network's own, drawn for all its blocks at once); else they are
        drawn here.
        """
        if dispatch.recording(x):
            return self._plain(x, draws)
        self.check_input(x)
        if dispatch.only_plain_on_cpu(x) or x.shape[0] == 0 or self.why_not_fused(x) is not None:
            return self._plain(x, draws)
        return self.fused(x, draws)

    def fused(
        self, x: torch.Tensor, draws: torch.Tensor | None = None, *, stem: tuple | None = None, stem_stride: int = 0
    ) -> torch.Tensor:
        """``forward`` on the kernels, unchecked. stem: (weight, BatchNormParams) of the 3x3 convolution before a block
        that does not expand, to run with it as one; then x are its images.
        """
        from effkernels import functional

        norm = BatchNormParams.of
        block = {
            "expand": (self.conv_pw.weight, norm(self.bn1)) if self.expands else stem,
            "depthwise": (self.conv_dw.weight, norm(self.depthwise_norm)),
            "squeeze_excite": SqueezeExciteParams.of(self.se) if isinstance(self.se, SqueezeExcite) else None,
            "project": (self.project_conv.weight, norm(self.project_norm)),
            "stride": self.stride,
            "padding": self.padding,
            "act": self.act,
            "residual": self.has_residual,
        }
        if dispatch.on_onednn(x):  # inference, as the gate said, of layers that fit each other
            return cpu_inference.mbconv(x, **block)
        return functional.mbconv(
            x=x,
            **block,
            drop_path=self.drop_path,
            draws=draws if self.has_residual else None,
            training=self.training,
            memory=self.memory,
            stem_stride=stem_stride,
        )
