"""The operator of a classifier's last feature layer in inference: act(BN(1x1 convolution)), averaged over the image, in one launch."""

from effkernels.library.base import LIB, on_its_device, register
from effkernels.library.mbconv import DTYPES

LIB.define(
    "head_inference(Tensor x, Tensor conv_weight, Tensor weight, Tensor bias, Tensor running_mean, Tensor running_var, str dtype, "
    "str act, float eps) -> Tensor"
)


@on_its_device
def head_inference(x, conv_weight, weight, bias, running_mean, running_var, dtype, act, eps):
    """x [N, H, W, K] -> [N, O] in the compute dtype; the feature map is never stored."""
    from effkernels.kernels.pointwise import pointwise_forward

    norm = (weight, bias, running_mean, running_var, eps)
    return pointwise_forward(x, conv_weight, dtype=DTYPES[dtype], epilogue=norm, act2=act, pool=True)[0]


def head_inference_fake(x, conv_weight, weight, bias, running_mean, running_var, dtype, act, eps):
    return x.new_empty(x.shape[0], conv_weight.shape[0], dtype=DTYPES[dtype])


register("head_inference", head_inference, head_inference_fake)
