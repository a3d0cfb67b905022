"""Finite differences in float64: gradients of the plain twins, and the mathematics of the block's backward as the
kernels have it.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from effkernels import BatchNormParams, SqueezeExciteParams, reference
from effkernels.reference import ACTIVATIONS

EPS = 1e-3
SMOOTH = ["silu", "gelu", "identity"]  # the others have kinks, which finite differences step over


def leaf(*shape, low=None):
    tensor = (
        torch.randn(shape, dtype=torch.float64) * 0.7 if low is None else torch.rand(shape, dtype=torch.float64) + low
    )
    return tensor.requires_grad_()


def norm(weight, bias, training):
    running = (
        (None, None) if training else (torch.full_like(weight, 0.2).detach(), torch.full_like(weight, 1.3).detach())
    )
    return BatchNormParams(weight, bias, *running, None, 0.1, EPS, training)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", SMOOTH)
def test_bn_act_add(act, training):
    mask = torch.tensor([1.5, 0.0], dtype=torch.float64)

    def call(x, weight, bias, residual):
        return reference.bn_act_add(x, norm(weight, bias, training), act=act, branch_scale=mask, residual=residual)

    assert gradcheck(call, (leaf(2, 3, 2, 3), leaf(3, low=0.5), leaf(3), leaf(2, 3, 2, 3)))


@pytest.mark.parametrize("stride, padding", [(1, "symmetric"), (2, "same")])
def test_depthwise_conv_bn_act(stride, padding):
    def call(x, weight, *vectors):
        pre, post, (wr, br, we, be) = vectors[:2], vectors[2:4], vectors[4:]
        return reference.depthwise_conv_bn_act(
            x,
            weight,
            norm(*post, True),
            stride=stride,
            padding=padding,
            act="silu",
            pre_norm=norm(*pre, True),
            pre_act="gelu",
            squeeze_excite=SqueezeExciteParams(wr, br, we, be),
        )

    vectors = [
        leaf(3, low=0.5),
        leaf(3),
        leaf(3, low=0.5),
        leaf(3),
        leaf(2, 3, 1, 1),
        leaf(2),
        leaf(3, 2, 1, 1),
        leaf(3),
    ]
    assert gradcheck(call, (leaf(2, 3, 4, 3), leaf(3, 1, 3, 3), *vectors))


def test_stem_and_head():
    def stem(x, weight, gamma, beta):
        return reference.stem(x, weight, norm(gamma, beta, True))

    def head(x, weight, gamma, beta):
        return reference.head(x, weight, norm(gamma, beta, True))

    assert gradcheck(stem, (leaf(2, 2, 5, 4), leaf(3, 2, 3, 3), leaf(3, low=0.5), leaf(3)))
    assert gradcheck(head, (leaf(2, 2, 2, 3), leaf(3, 2, 1, 1), leaf(3, low=0.5), leaf(3)))


# ---- the block -------------------------------------------------------------------------------------------------------


def slope(z, act):
    """phi'(z)."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return torch.autograd.grad(ACTIVATIONS[act](z).sum(), z)[0]


class Block(torch.autograd.Function):
    """The schedule: what is kept is x, y1, y2, y3 and vectors; BatchNorms enter as affine maps dy = scale dz + k0 + k1
    y.
    """

    @staticmethod
    def forward(ctx, stride, act, mask, x, w1, g1, b1, wd, g2, b2, wr, br, we, be, w3, g3, b3):
        def statistics(y):
            return y.mean((0, 2, 3)), (y.var((0, 2, 3), unbiased=False) + EPS).rsqrt()

        def normal(y, gamma, beta, mean, rstd):
            scale = gamma * rstd
            return y * scale[:, None, None] + (beta - mean * scale)[:, None, None]

        phi = ACTIVATIONS[act]
        y1 = F.conv2d(x, w1)
        s1 = statistics(y1)
        a1 = phi(normal(y1, g1, b1, *s1))
        y2 = F.conv2d(a1, wd, None, stride, wd.shape[-1] // 2, 1, wd.shape[0])
        s2 = statistics(y2)
        z2 = normal(y2, g2, b2, *s2)
        pooled = phi(z2).mean((2, 3))
        u = pooled @ wr.T + br
        gate = torch.sigmoid(phi(u) @ we.T + be)
        y3 = F.conv2d(phi(z2) * gate[:, :, None, None], w3)
        s3 = statistics(y3)
        ctx.save_for_backward(
            mask, x, w1, g1, b1, wd, g2, b2, wr, br, we, be, w3, g3, y1, y2, y3, *s1, *s2, *s3, pooled, u, gate
        )
        ctx.stride, ctx.act, ctx.normal = stride, act, normal
        out = normal(y3, g3, b3, *s3) * mask[:, None, None, None]
        return out + x if out.shape == x.shape else out

    @staticmethod
    def backward(ctx, dout):
        (
            mask,
            x,
            w1,
            g1,
            b1,
            wd,
            g2,
            b2,
            wr,
            br,
            we,
            be,
            w3,
            g3,
            y1,
            y2,
            y3,
            m1,
            r1,
            m2,
            r2,
            m3,
            r3,
            pooled,
            u,
            gate,
        ) = ctx.saved_tensors
        act, stride, pixels = ctx.act, ctx.stride, y2.shape[2] * y2.shape[3]

        def channel(v):
            return v[:, None, None]

        def terms(gamma, mean, rstd, dbeta, dgamma, count):
            """(scale, k0, k1) of a BatchNorm's backward."""
            k1 = -gamma * rstd**2 * dgamma / count
            return gamma * rstd, -gamma * rstd * dbeta / count - k1 * mean, k1

        # BatchNorm 3: two sums of small tensors; dy3 is affine in (dout, y3).
        d = dout * mask[:, None, None, None]
        db3, dg3 = d.sum((0, 2, 3)), (d * (y3 - channel(m3)) * channel(r3)).sum((0, 2, 3))
        scale, k0, k1 = terms(g3, m3, r3, db3, dg3, y3.numel() // y3.shape[1])
        dy3 = channel(scale) * d + channel(k0) + channel(k1) * y3
        # Project: dq, and with y2 at hand three sums per image and channel (two more come from the forward's pass over
        # y2).
        dq = F.conv_transpose2d(dy3, w3)
        z2 = ctx.normal(y2, g2, b2, m2, r2)
        a2, dphi, yhat = ACTIVATIONS[act](z2), slope(z2, act), (y2 - channel(m2)) * channel(r2)
        sums = [(dq * dphi).sum((2, 3)), (dq * dphi * yhat).sum((2, 3)), (dq * a2).sum((2, 3))]
        s2, s4 = dphi.sum((2, 3)), (dphi * yhat).sum((2, 3))
        dw3 = torch.nn.grad.conv2d_weight(a2 * gate[:, :, None, None], w3.shape, dy3)
        # Squeeze-excite; BatchNorm 2's sums are linear in the gate and in d pooled: no pass over e2.
        dt = sums[2] * gate * (1 - gate)
        du = (dt @ we) * slope(u, act)
        dpool = du @ wr / pixels
        db2, dg2 = (gate * sums[0] + dpool * s2).sum(0), (gate * sums[1] + dpool * s4).sum(0)
        scale, k0, k1 = terms(g2, m2, r2, db2, dg2, y2.numel() // y2.shape[1])
        dy2 = (
            channel(scale) * (dq * gate[:, :, None, None] + dpool[:, :, None, None]) * dphi
            + channel(k0)
            + channel(k1) * y2
        )
        # Depthwise: the gradient of BatchNorm 1's output, its sums, and the weight's.
        z1 = ctx.normal(y1, g1, b1, m1, r1)
        conv = (stride, wd.shape[-1] // 2, 1, wd.shape[0])
        dz1 = torch.nn.grad.conv2d_input(y1.shape, wd, dy2, *conv) * slope(z1, act)
        dwd = torch.nn.grad.conv2d_weight(ACTIVATIONS[act](z1), wd.shape, dy2, *conv)
        db1, dg1 = dz1.sum((0, 2, 3)), (dz1 * (y1 - channel(m1)) * channel(r1)).sum((0, 2, 3))
        # Expand, without y1: k1 y1 = k1 W x, so it folds into products of x (the Gram identity).
        scale, k0, k1 = terms(g1, m1, r1, db1, dg1, y1.numel() // y1.shape[1])
        W, X = w1.flatten(1), x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        D = dz1.permute(0, 2, 3, 1).reshape(-1, W.shape[0])
        dx = (D * scale) @ W + X @ (W.T @ (k1[:, None] * W)) + k0 @ W
        dw1 = scale[:, None] * (D.T @ X) + k1[:, None] * (W @ (X.T @ X)) + k0[:, None] * X.sum(0)
        dx = dx.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)
        if dout.shape == x.shape:
            dx = dx + dout
        se = (du.T @ pooled, du.sum(0), dt.T @ ACTIVATIONS[act](u), dt.sum(0))
        return None, None, None, dx, dw1[:, :, None, None], dg1, db1, dwd, dg2, db2, *se, dw3, dg3, db3


@pytest.mark.parametrize("stride, outputs, act, k", [(1, 2, "silu", 3), (2, 3, "gelu", 3), (1, 3, "silu", 5)])
def test_backward_of_the_block(stride, outputs, act, k):
    """Against finite differences, and the schedule against the twin."""
    E, R = 3, 2
    mask = torch.tensor([1.25, 0.0, 0.8], dtype=torch.float64)
    leaves = [
        leaf(3, 2, 4, 3),
        leaf(E, 2, 1, 1),
        leaf(E, low=0.5),
        leaf(E),
        leaf(E, 1, k, k),
        leaf(E, low=0.5),
        leaf(E),
        leaf(R, E),
        leaf(R),
        leaf(E, R),
        leaf(E),
        leaf(outputs, E, 1, 1),
        leaf(outputs, low=0.5),
        leaf(outputs),
    ]

    def call(*args):
        return Block.apply(stride, act, mask, *args)

    def twin(x, w1, g1, b1, wd, g2, b2, wr, br, we, be, w3, g3, b3):
        se = SqueezeExciteParams(wr[:, :, None, None], br, we[:, :, None, None], be, act)
        layers = ((w, norm(g, b, True)) for w, g, b in ((w1, g1, b1), (wd, g2, b2), (w3, g3, b3)))
        expand, depthwise, project = layers
        out = reference.mbconv(x, expand, depthwise, se, project, stride=stride, act=act)
        out = out * mask[:, None, None, None]
        return out + x if out.shape == x.shape else out

    torch.testing.assert_close(call(*leaves), twin(*leaves))
    assert gradcheck(call, leaves)
    assert gradcheck(twin, leaves)
