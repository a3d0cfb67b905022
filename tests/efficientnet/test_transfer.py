"""Freezing, layer-wise rates, feature maps, other input channels: against timm where timm has them."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from efficientnet import create_model, freeze, load_checkpoint, parameter_groups
from efficientnet.model.transfer import EfficientNetFeatures
from efficientnet.training.settings import TrainConfig
from efficientnet.training.trainer import Trainer
from efficientnet.weights.checkpoints import save_checkpoint
from effkernels import accelerate, explain
from effkernels.modules.mbconv import MBConvBase

PARTS = ["conv_stem", "bn1", *(f"blocks.{i}" for i in range(7)), "conv_head", "bn2", "classifier"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("b0", num_classes=5, drop_path_rate=0.0, drop_rate=0.0, fused=False)


def part(name):
    return next(p for p in PARTS if f"{name}.".startswith(f"{p}."))


@pytest.mark.parametrize(
    ("until", "count"), [(None, 0), ("stem", 2), (0, 3), (4, 7), (6, 9), ("head", 11), ("all", 12)]
)
@pytest.mark.parametrize("bn", [True, "weights", False])
def test_a_step_changes_what_is_not_frozen(model, until, count, bn):
    model = copy.deepcopy(model).double()
    assert freeze(model, until, bn) == PARTS[:count]
    frozen, before = set(PARTS[:count]), copy.deepcopy(model.state_dict())
    model.eval()
    model.train()  # does not wake frozen statistics
    loss = model(torch.randn(4, 3, 32, 32, dtype=torch.float64)).square().sum()
    if until == "all" and bn is not False:
        with pytest.raises(ValueError, match="no parameter to train"):
            parameter_groups(model, 0.1)
    else:
        optimizer = torch.optim.SGD(parameter_groups(model, 0.1), lr=0.1)
        loss.backward()
        optimizer.step()
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for key, tensor in model.state_dict().items():
        module = key.rpartition(".")[0]
        statistics = module in norms and not key.endswith((".weight", ".bias"))
        stays = part(key) in frozen and (bn is True or module not in norms or bn == "weights" and not statistics)
        assert torch.equal(tensor, before[key]) == stays, key


def test_freezing_again_starts_anew(model):
    model = copy.deepcopy(model)
    freeze(model, "head")
    freeze(model, 1)
    assert {part(n) for n, p in model.named_parameters() if not p.requires_grad} == set(PARTS[:4])
    assert not model.train().blocks[1][0].bn1.training and model.blocks[2][0].bn1.training
    copied = copy.deepcopy(model).eval().train()  # an averaged copy stays frozen too
    assert not copied.bn1.training
    freeze(model, None)
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.train().modules())


@pytest.mark.parametrize("until", ["tail", 7, -1, 1.5, True])
def test_freeze_with_bad_input(model, until):
    with pytest.raises(ValueError, match="until must be 'stem', a stage index from 0 to 6, 'head', 'all' or None, got"):
        freeze(model, until)
    with pytest.raises(TypeError, match="model must be an EfficientNet or its features_only form, got Linear"):
        freeze(nn.Linear(2, 2), "stem")
    for bn in ("statistics", 1, 0, None):
        with pytest.raises(ValueError, match=f"bn must be True, 'weights' or False, got {bn!r}"):
            freeze(model, "stem", bn=bn)


def test_layer_decay_is_timms(timm, model):
    from timm.optim import param_groups_layer_decay

    theirs = timm.create_model("efficientnet_b0", num_classes=5)
    names = {id(p): name for name, p in theirs.named_parameters()}
    expected = {}
    for group in param_groups_layer_decay(theirs, weight_decay=0.05, layer_decay=0.8):
        expected |= {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, lr=0.5, weight_decay=0.05, layer_decay=0.8)
    actual = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert actual.keys() == expected.keys() and len({group["name"] for group in groups}) == len(groups)
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value), name
    assert all(group["lr"] == pytest.approx(0.5 * group["lr_scale"]) for group in groups)


def test_groups_without_layer_decay(model):
    decay, no_decay = parameter_groups(model, lr=0.1, weight_decay=0.01)
    assert {p.dim() for p in no_decay["params"]} == {1} and no_decay["weight_decay"] == 0
    assert {p.dim() for p in decay["params"]} == {2, 4} and decay["weight_decay"] == 0.01
    assert len(decay["params"]) + len(no_decay["params"]) == len(list(model.parameters()))
    assert len(parameter_groups(nn.Linear(2, 2), lr=0.1)) == 2
    for kwargs, message in (
        ({"lr": 0.0}, "lr must be a finite number > 0, got 0.0"),
        ({"lr": 0.1, "weight_decay": -1}, "weight_decay must be a finite number >= 0, got -1"),
        ({"lr": 0.1, "layer_decay": 1.5}, r"layer_decay must be in \(0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            parameter_groups(model, **kwargs)
    with pytest.raises(TypeError, match="layer_decay needs an EfficientNet, got Linear"):
        parameter_groups(nn.Linear(2, 2), 0.1, layer_decay=0.5)


@pytest.mark.parametrize("size", [(64, 64), (65, 71)])
@pytest.mark.parametrize(
    ("name", "stride"), [("efficientnet_b0", 32), ("efficientnet_b0", 8), ("tf_efficientnet_b0", 16), ("b0", 2)]
)
@torch.no_grad()
def test_feature_maps_are_timms(timm, name, stride, size):
    torch.manual_seed(0)
    full = "efficientnet_b0" if name == "b0" else name
    theirs = timm.create_model(full, features_only=True, output_stride=stride).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    ours = create_model(name, features_only=True, output_stride=stride).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 3, *size)
    expected, actual = theirs(x), ours(x)
    assert [tuple(a.shape) for a in actual] == [tuple(e.shape) for e in expected]
    assert all((a - e).norm() < 1e-5 * e.norm() for a, e in zip(actual, expected, strict=True))
    for key, numbers in (("num_chs", theirs.feature_info.channels()), ("reduction", theirs.feature_info.reduction())):
        assert [info[key] for info in ours.feature_info] == numbers


def test_dilated_blocks_say_why_they_are_plain(tmp_path):
    model = create_model("b0", num_classes=5, output_stride=8)
    reasons = [reason for reason in explain(model).values() if reason]
    dilated = [m for m in model.modules() if isinstance(m, MBConvBase) and m.dilation > 1]
    assert len(dilated) == 10  # all blocks at 1/16 and 1/32 but the first, whose input has the grid of 1/8
    assert sum(reason.startswith("the depthwise convolution has dilation") for reason in reasons) == 10
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval().forward_features(x)
        assert expected.shape[2:] == (8, 8)
        save_checkpoint(model, tmp_path / "dilated.safetensors")
        loaded = load_checkpoint(None, tmp_path / "dilated.safetensors", fused=False).eval()
        torch.testing.assert_close(loaded.forward_features(x), expected)  # the others are fused, on a CPU too
        torch.testing.assert_close(accelerate(loaded).forward_features(x), expected)


def test_out_indices(model):
    x = torch.randn(1, 3, 64, 64)
    features = EfficientNetFeatures(copy.deepcopy(model).eval())
    some = create_model("b0", features_only=True, out_indices=(3, -4), fused=False).eval()
    assert len(some.blocks) == 5  # stages after 1/16 are dropped
    some.load_state_dict({key: t for key, t in features.state_dict().items() if key in some.state_dict()})
    with torch.no_grad():
        everything, chosen = features(x), some(x)
    assert torch.equal(chosen[0], everything[3]) and torch.equal(chosen[1], everything[1]) and len(chosen) == 2
    for indices in ((5,), (-6,), (True,), ()):
        with pytest.raises(ValueError, match="out_indices must"):
            create_model("b0", features_only=True, out_indices=indices, device="meta")
    with pytest.raises(ValueError, match="output_stride must be 2, 4, 8, 16 or 32, got 64"):
        create_model("b0", output_stride=64)
    with pytest.raises(ValueError, match=r"images must be \[N, 3, H, W\]"):
        features(x[:, :1])


@pytest.mark.parametrize("in_chans", [1, 2, 4, 7])
def test_other_input_channels(tmp_path, timm, model, in_chans):
    from timm.models import adapt_input_conv

    torch.save(model.state_dict(), tmp_path / "w.pt")
    adapted = create_model("b0", pretrained=tmp_path / "w.pt", in_chans=in_chans, fused=False)
    torch.testing.assert_close(adapted.conv_stem.weight, adapt_input_conv(in_chans, model.conv_stem.weight))
    assert adapted.num_classes == 5 and torch.equal(adapted.conv_head.weight, model.conv_head.weight)
    torch.save(adapted.state_dict(), tmp_path / "adapted.pt")
    with pytest.raises(ValueError, match=f"in_chans is 3, but the weights are for {in_chans} channels"):
        create_model("b0", pretrained=tmp_path / "adapted.pt")


def test_what_was_learnt_on_some_digits_helps_with_the_others(tmp_path):
    """The README's example, on a small network: digits 0-4 first, then 5-9 with that trunk frozen, beats the same with
    a random trunk.
    """

    def train(name, data, **settings):
        config = TrainConfig(
            data, model="efficientnet_d0.1_w0.5_r32", device="cpu", epochs=3, output=str(tmp_path / name)
        )
        return Trainer(replace(config, **settings)).run().accuracy

    assert train("low", "digits:0-4") > 0.9
    # A random trunk at its best: running statistics that fit the images, weights as they began.
    train("random", "digits:0-4", epochs=1, lr=1e-20, weight_decay=0.0, bn_momentum=0.5)
    sources = {name: str(tmp_path / name / "last.safetensors") for name in ("low", "random")}
    learnt = train("high", "digits:5-9", pretrained=sources["low"], freeze_until="5")
    random = train("high-random", "digits:5-9", pretrained=sources["random"], freeze_until="5")
    classifier = train("classifier-random", "digits:5-9", pretrained=sources["random"], freeze_until="head")
    assert learnt > random + 0.05 and learnt > classifier + 0.1, (learnt, random, classifier)

    before, after = (
        load_checkpoint(None, path).state_dict() for path in (sources["low"], tmp_path / "high" / "last.safetensors")
    )
    for key, value in before.items():
        frozen = key.startswith(("conv_stem", "bn1", "blocks")) and not key.startswith("blocks.6")
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(after[key], value) == frozen, key
