"""The functional forms where modules cannot reach: two BatchNorms of one operator with settings of their own."""

import pytest
import torch

from effkernels import BatchNormParams, functional, reference
from effkernels.parameters import SqueezeExciteParams


def norms(device):
    g = torch.Generator().manual_seed(0)

    def params(momentum, eps, training):
        tensors = [torch.rand(8, generator=g).add(0.5).to(device) for _ in range(4)]
        return BatchNormParams(*tensors, torch.tensor(3, device=device), momentum, eps, training)

    return params


@pytest.mark.parametrize("training", [(True, True), (True, False), (False, True)])
def test_each_norm_has_its_own_momentum_eps_and_mode(training, device):
    params = norms(device)
    pre, post = params(0.5, 1e-3, training[0]), params(0.1, 1e-1, training[1])
    x, weight = torch.randn(2, 8, 5, 4, device=device), torch.randn(8, 1, 3, 3, device=device)
    results = []
    for impl in (functional, reference):
        own = [BatchNormParams(*(t.clone() for t in n[:5]), *n[5:]) for n in (pre, post)]
        y = impl.depthwise_conv_bn_act(x, weight, own[1], pre_norm=own[0], pre_act="relu")
        results.append([y, *(t for n in own for t in n[2:5])])
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wanted", [False, True], ids=["no gradient", "gradient"])
def test_empty_batch(wanted, device):
    """In eval an empty result of the twin's shape, in training an error."""
    norm = norms(device)(0.1, 1e-3, False)
    x = torch.empty(0, 8, 5, 4, device=device, requires_grad=wanted)

    def weight(*shape):
        return torch.randn(shape, device=device, requires_grad=wanted)

    gate = SqueezeExciteParams(weight(2, 8, 1, 1), weight(2), weight(8, 2, 1, 1), weight(8))
    dw, pw, stem = weight(8, 1, 3, 3), weight(8, 8, 1, 1), weight(8, 8, 3, 3)
    calls = {
        "depthwise": lambda impl, norm: impl.depthwise_conv_bn_act(x, dw, norm, stride=2, squeeze_excite=gate),
        "bn_act_add": lambda impl, norm: impl.bn_act_add(x, norm),
        "mbconv": lambda impl, norm: impl.mbconv(x, (pw, norm), (dw, norm), gate, (pw, norm), residual=True),
        "head": lambda impl, norm: impl.head(x, pw, norm),
        "stem": lambda impl, norm: impl.stem(x, stem, norm),
    }
    for name, call in calls.items():
        out = call(functional, norm)
        assert (out.shape, out.dtype) == (call(reference, norm).shape, torch.float32), name
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            call(functional, norm._replace(training=True))
    assert functional.squeeze_excite(x, gate).shape == x.shape
