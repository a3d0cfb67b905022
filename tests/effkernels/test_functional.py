"""The functional forms where modules cannot reach: two BatchNorms of one operator with settings of their own."""

import pytest
import torch

from effkernels import BatchNormParams, functional, reference


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
