"""The same weights give timm's numbers, whatever the flavour, image size and mode."""

import pytest
import torch

from efficientnet import create_model, list_models

FLAVOURS = ["efficientnet_b0", "tf_efficientnet_b0"]
# 65x71: odd at every resolution, where "same" and "symmetric" padding differ most.
SIZES = [(64, 64), (65, 71)]


def pair(timm, name, dtype):
    """timm's model with random weights, affine parameters and statistics, and ours with the same; drop rates 0."""
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=10)
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
            elif getattr(module, "bias", None) is not None:
                module.bias.normal_(0, 0.2)
    ours = create_model(name, num_classes=10, drop_rate=0, drop_path_rate=0, fused=False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(dtype), ours.to(dtype)


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FLAVOURS)
@torch.no_grad()
def test_eval(timm, name, size):
    theirs, ours = pair(timm, name, torch.float32)
    theirs.eval(), ours.eval()
    x = torch.randn(2, 3, *size)
    assert relative_error(ours(x), theirs(x)) < 1e-5
    features = theirs.forward_features(x)
    assert relative_error(ours.forward_features(x), features) < 1e-5
    assert (
        relative_error(ours.forward_head(features, pre_logits=True), theirs.forward_head(features, pre_logits=True))
        < 1e-5
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FLAVOURS)
def test_training(timm, name, size):
    # In float64, so that a gradient's bound says more than "the rounding of 49 normalisations".
    theirs, ours = pair(timm, name, torch.float64)
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    target = torch.randn(3, 10, dtype=torch.float64)
    images = [x.clone().requires_grad_() for _ in range(2)]
    logits = [model(image) for model, image in zip((theirs, ours), images, strict=True)]
    assert relative_error(logits[1], logits[0]) < 1e-9
    for out in logits:
        (out * target).sum().backward()
    assert relative_error(images[1].grad, images[0].grad) < 1e-9
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        # Relative to the gradient plus the weight: some gradients are zero up to rounding (a bias in front of a
        # BatchNorm).
        grad = expected[key].grad
        assert (parameter.grad - grad).norm() < 1e-9 * (grad.norm() + parameter.norm()), key
    state = theirs.state_dict()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", [*list_models("efficientnet_*"), "tf_efficientnet_b0"])
def test_layout(timm, name):
    theirs, ours = timm.create_model(name, device="meta"), create_model(name, fused=False, device="meta")
    layout = [{k: (v.shape, v.dtype) for k, v in model.state_dict().items()} for model in (ours, theirs)]
    assert layout[0] == layout[1]
    for ours_info, info in zip(ours.feature_info, theirs.feature_info, strict=True):
        assert ours_info == {key: info[key] for key in ours_info}
    assert (ours.num_features, ours.num_classes) == (theirs.num_features, theirs.num_classes)
    norms = [
        [(n, m.eps, m.momentum) for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for model in (ours, theirs)
    ]
    assert norms[0] == norms[1]


def test_drop_path_rates(timm):
    theirs = timm.create_model("efficientnet_b1", device="meta", drop_path_rate=0.3)
    ours = create_model("efficientnet_b1", device="meta", drop_path_rate=0.3, fused=False)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in theirs.blocks for block in stage]
    assert [block.drop_path for stage in ours.blocks for block in stage] == pytest.approx(rates)


def test_timm_reads_our_pretrained_cfg(timm):
    from timm.data import resolve_data_config

    theirs = timm.create_model("tf_efficientnet_b4.in1k", device="meta")  # the release's own preprocessing
    ours = create_model("tf_efficientnet_b4", device="meta", fused=False)
    expected, actual = resolve_data_config(model=theirs), resolve_data_config(model=ours)
    assert actual.pop("crop_pct") == pytest.approx(expected.pop("crop_pct"), abs=5e-4)
    assert actual == expected
