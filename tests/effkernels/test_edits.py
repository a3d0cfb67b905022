"""Edits that PyTorch and timm allow: each row of docs/edits.md, and what records, counts or listens to torch's own
operators.
"""

import copy
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from efficientnet import create_model, freeze
from effkernels import FusedDepthwiseConvBNAct, FusedMBConv, FusedSqueezeExcite, accelerate, dispatch, explain, restore
from support.truth import relative_error

TINY = "efficientnet_d0.1_w0.5_r32"  # a block a stage, half the channels


class Adapter(nn.Module):
    """As LoRA's and observers' wrappers do: the layer, and something of its own."""

    def __init__(self, base):
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.base(x) * self.scale


class Attention(nn.Module):
    def forward(self, x):
        return x * x.mean(1, keepdim=True).sigmoid()


def fold(block, conv, bn):
    setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv).eval(), getattr(block, bn).eval()))
    setattr(block, bn, nn.Identity())


def wrap_all(module):
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Conv2d):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, Adapter(layer))


def make_own():
    return create_model(TINY, num_classes=5)


def make_timm():
    return accelerate(pytest.importorskip("timm").create_model("efficientnet_b0", num_classes=5, drop_rate=0.0))


def rows():
    text = (Path(__file__).parents[2] / "docs" / "edits.md").read_text()
    for heading, table in re.findall(r"## `model = (\S+)\(.*\n((?:.|\n)*?)(?=\n## |\Z)", text):
        for line in re.findall(r"^\| (`.*) \|$", table, re.MULTILINE):
            code, part, runs, reason = (cell.strip() for cell in re.split(r" \|(?: |$)", line))
            yield pytest.param(
                heading, code.partition("`,")[0].strip("`"), part, runs, reason, id=f"{heading}: {code.strip('`')[:60]}"
            )


ROWS = list(rows())


def test_the_tables_are_read():
    assert len(ROWS) > 40 and {row.values[3] for row in ROWS} == {"plain", "kernels"}


@pytest.mark.parametrize("heading, code, part, runs, reason", ROWS)
def test_a_row_of_the_table(heading, code, part, runs, reason, twins_serve, monkeypatch):
    torch.manual_seed(0)
    model = (make_own if heading == "create_model" else make_timm)().eval()
    hidden = model.blocks[1][0]
    if code.startswith("del "):
        original = type(hidden)._original
        hidden.forward = lambda x: original.forward(hidden, x)
        code = "model.blocks[1][0].se = nn.Identity()"
    names = {"Adapter": Adapter, "Attention": Attention, "fold": fold, "wrap_all": wrap_all, "nn": nn, "prune": prune}
    names |= {"parametrizations": parametrizations, "freeze": freeze, "hook": lambda *args: None}
    names |= {"model": model, "STEM": model.conv_stem.out_channels}
    if heading != "create_model":
        import timm.utils

        names["timm"] = timm
    exec(code, names)
    model.double().eval()
    found = explain(model)
    assert ({**found, **found.ends}[part] or "") == reason and (runs == "kernels") == (reason == "")
    inputs = [m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    x = torch.randn(2, inputs[0], 32, 32, dtype=torch.float64)
    with torch.no_grad():
        fused = model(x)
        served = len(twins_serve)
        with monkeypatch.context() as patch:
            patch.setenv("EFFKERNELS_BACKEND", "reference")
            plain = model(x) if heading == "create_model" else restore(model)(x)
    assert relative_error(fused, plain) < 1e-10 and len(twins_serve) == served
    if heading != "create_model":  # restored above
        assert dict(explain(accelerate(model, strict=False))) == dict(found), "accelerate after the edit is the same"
    # Edits of all.
    assert served or code in ("timm.layers.convert_splitbn_model(model, 2)", "timm.layers.freeze_batch_norm_2d(model)")


# ---- conversions that leave children behind --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mobilenetv2_035", "mobilenetv3_small_050", "mnasnet_small", "tf_efficientnet_lite0", "semnasnet_075"]
)
def test_sync_batch_norm_of_torch_takes_timm_s_activations(timm, name, twins_serve):
    """Its conversion keeps BatchNormAct2d's ``act`` as a child that nobody calls: the kernels must not call it
    either.
    """
    model = timm.create_model(name, num_classes=5, drop_rate=0.0)
    torch.manual_seed(0)
    before, x = model.double().eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    after = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(before))
    for norm in after.modules():
        if isinstance(norm, nn.SyncBatchNorm):  # its own forward wants a GPU
            norm.__class__ = nn.BatchNorm2d
    with torch.no_grad():
        plain, other = after(x), before(x)
        fused = accelerate(after)(x)
    assert relative_error(fused, plain) < 1e-10 and "mbconv" in twins_serve and relative_error(plain, other) > 1e-3


# ---- readers that find nothing where a layer was ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv_pw", "bn1", "conv_dw", "bn2", "se", "conv_pwl", "bn3"])
def test_no_layer_of_a_timm_block_can_crash_explain(timm, name):
    model = accelerate(timm.create_model("mobilenetv2_035", num_classes=3))
    for replacement in (Adapter(nn.Identity()), nn.Sequential(nn.Identity()), None):
        block = copy.deepcopy(model)
        setattr(block.blocks[1][0], name, replacement)
        assert explain(block)["blocks.1.0"]
    delattr(block.blocks[1][0], name)
    assert explain(block)["blocks.1.0"]


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "mnasnet0_5"])
def test_torchvision_s_containers_can_be_anything(torchvision, name):
    torch.manual_seed(0)
    model = accelerate(getattr(torchvision.models, name)(num_classes=3)).eval()
    container = "layers" if "mnas" in name else "features"
    x = torch.randn(1, 3, 32, 32)
    plain = restore(copy.deepcopy(model))
    for edit in (
        lambda m: setattr(m, container, Adapter(getattr(m, container))),
        lambda m: getattr(m, container).__setitem__(0, Adapter(getattr(m, container)[0])),
        lambda m: getattr(m, container).__setitem__(-1, Adapter(getattr(m, container)[-1])),
    ):
        edited, expected = copy.deepcopy(model), copy.deepcopy(plain)
        edit(edited), edit(expected)
        assert explain(edited).ends["stem"]
        assert torch.equal(edited(x), expected(x))


@pytest.mark.parametrize(
    "module, name",
    [(FusedSqueezeExcite(8, 2), "conv_reduce"), (FusedDepthwiseConvBNAct(8), "conv"), (FusedMBConv(8, 8), "conv_dw")],
)
def test_modules_of_their_own_with_an_adapter(module, name):
    module, x = copy.deepcopy(module).eval(), torch.randn(2, 8, 5, 5)
    before = module(x)
    layer = Adapter(getattr(module, name))
    layer.scale.data.fill_(1.0)
    setattr(module, name, layer)
    assert module.why_not_fused() == f"{name} is a Adapter" and torch.equal(module(x), before)


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("stem", [(1, 3, 1), (4, 5, 2), (3, 1, 0)])
def test_another_stem_is_timm_s_answer(timm, padding, stem):
    """A convolution of other channels and size that pads itself is not padded once more, in either family."""
    channels, k, pads = stem
    torch.manual_seed(0)
    name = "efficientnet_b0" if padding == "symmetric" else "tf_efficientnet_b0"
    ours, theirs = create_model(name, num_classes=3).eval(), timm.create_model(name, num_classes=3).eval()
    theirs.load_state_dict(ours.state_dict())
    conv = nn.Conv2d(channels, 32, k, 2, pads, bias=False)
    if pads or padding == "symmetric":
        ours.conv_stem = theirs.conv_stem = conv
    else:
        ours.conv_stem, theirs.conv_stem = Adapter(ours.conv_stem), Adapter(theirs.conv_stem)
    x = torch.randn(1, channels, 40, 33)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


# ---- hooks that keep what they saw -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["bn1", "blocks.1.0.bn1", "blocks.1.0.bn2", "blocks.1.0.se.conv_reduce", "bn2"])
def test_what_a_hook_keeps_stays(name, fused):
    model, x, kept = create_model(TINY, num_classes=3, fused=fused).eval(), torch.randn(2, 3, 32, 32), []
    model.get_submodule(name).register_forward_hook(
        lambda module, args, output: kept.append((output, output.detach().clone()))
    )
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            model(x)
    assert len(kept) == 3 and all(torch.equal(output, copied) for output, copied in kept)


@pytest.mark.parametrize("act", ["silu", "relu", "gelu"])
@pytest.mark.parametrize("pruned", [("conv_pw", "bn1"), ("bn1",), ("conv_pw", "bn1", "conv_dw", "bn2")])
def test_a_block_without_layers_keeps_its_input(pruned, act):
    block = FusedMBConv(8, 8, expand_ratio=2, se_ratio=0, act=act).eval()
    for name in pruned:
        setattr(block, name, nn.Identity())
    if "conv_pw" in pruned:
        block.conv_dw = block.conv_dw if "conv_dw" not in pruned else nn.Identity()
        if "conv_dw" not in pruned:
            block.conv_dw, block.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8).eval()
        block.conv_pwl = nn.Conv2d(8, 8, 1, bias=False)
    x = torch.randn(2, 8, 6, 6)
    before, right = x.clone(), block(x).detach()
    with torch.no_grad():
        assert torch.equal(block(x), right) and torch.equal(x, before)


# ---- what records and counts -----------------------------------------------------------------------------------------


def networks():
    yield "efficientnet", lambda: create_model(TINY, num_classes=3)
    yield "tf_efficientnet", lambda: create_model(f"tf_{TINY}", num_classes=3)
    yield "plain", lambda: create_model(TINY, num_classes=3, fused=False)
    yield "accelerated", lambda: accelerate(pytest.importorskip("timm").create_model("mobilenetv2_035", num_classes=3))


recorded = pytest.mark.parametrize("name, make", networks())


@recorded
@pytest.mark.parametrize("training", [False, True])
def test_symbolic_trace(name, make, training, twins_serve):
    """The graph of the plain layers, of the same numbers, drop-path's draws included."""
    model, x = make().train(training), torch.randn(2, 3, 33, 32)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert not twins_serve
    for module in restore(model).modules():
        if isinstance(module, FusedMBConv):
            module.register_forward_pre_hook(lambda *args: None)
    model.blocks.register_forward_pre_hook(lambda *args: None)  # each block draws for itself then, as in the graph
    results = []
    for forward in (model, traced):
        torch.manual_seed(1)
        results.append(forward(x))
    torch.testing.assert_close(*results)


@recorded
def test_jit_trace_and_back(name, make, twins_serve):
    model, x = make().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False)
    assert not twins_serve and any(node.kind() == "aten::_convolution" for node in traced.inlined_graph.nodes())
    torch.jit.save(traced, buffer := io.BytesIO())
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(x), model(x))
    torch.jit.trace(model, x)  # with gradients, and torch checks the trace without


def test_feature_extractor(torchvision):
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = create_model(TINY, num_classes=3).eval(), torch.randn(1, 3, 32, 32)
    features = create_feature_extractor(model, {"blocks.2": "a", "blocks.4.0.bn1": "b"}).eval()(x)
    maps = {}
    for name in ("blocks.2", "blocks.4.0.bn1"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: maps.update({name: output})
        )
    model(x)
    assert torch.equal(features["a"], maps["blocks.2"]) and torch.equal(features["b"], maps["blocks.4.0.bn1"])


def test_scripted_after_restore(timm):
    model, x = timm.create_model("mobilenetv2_035", num_classes=3).eval(), torch.randn(1, 3, 32, 32)
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(restore(accelerate(model)))(x), expected)


@pytest.mark.parametrize("name", [TINY, f"tf_{TINY}", "efficientnet_b0"])
@pytest.mark.parametrize("fused", [False, True])
def test_scripted(name, fused):
    """The project's own networks as they are; of any number of images, of any size."""
    torch.manual_seed(0)
    own, plain = (create_model(name, num_classes=3, fused=kernels).eval() for kernels in (fused, False))
    plain.load_state_dict(own.state_dict())
    scripted = torch.jit.script(own)
    torch.jit.save(scripted, buffer := io.BytesIO())
    buffer.seek(0)
    for module in (scripted, torch.jit.load(buffer), torch.jit.script(torch.fx.symbolic_trace(own))):
        for shape in ((1, 3, 32, 32), (3, 3, 37, 50)):
            x = torch.randn(shape)
            torch.testing.assert_close(module(x), plain(x))
    assert type(own.blocks[1][0]) is type(create_model(name, fused=fused).blocks[1][0]), "the network is as it was"
    assert len(list(own.parameters())) == len(list(scripted.parameters()))


def test_scripted_features():
    own, x = create_model(TINY, features_only=True, fused=False).eval(), torch.randn(2, 3, 33, 32)
    for found, expected in zip(torch.jit.script(own)(x), own(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_is_not_scripted(timm):
    """One sentence that says what to give instead."""
    for model, reason in (
        (create_model(TINY), "takes the network as it is in evaluation: call eval.. first"),
        (accelerate(timm.create_model("mobilenetv2_035")).eval(), "no kernels: give it the model that .* EfficientNet"),
        (nn.Sequential(FusedMBConv(8, 8)).eval(), "no kernels: give it torch.fx.symbolic_trace"),
    ):
        with pytest.raises(ValueError, match=reason):
            torch.jit.script(model)
    x = torch.randn(2, 8, 9, 9)
    block = FusedMBConv(8, 8).eval()
    torch.testing.assert_close(torch.jit.script(torch.fx.symbolic_trace(block))(x), block.forward_reference(x))


@recorded
def test_counted_operations(name, make, twins_serve):
    """With kernels as without: by a mode, by hooks on all modules; afterwards the kernels run again."""
    model, x, counts = make().eval(), torch.randn(2, 3, 32, 32), []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            out = model(x)
            if backward:
                out.sum().backward()
        counts.append(counter.get_total_flops())
    forward = sum(
        2 * weight * outputs for weight, outputs in sizes(restore(model) if "accelerated" in name else model, x)
    )
    assert counts[0] == forward and counts[1] > 2 * forward and not twins_serve
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    model(x)
    handle.remove()
    assert nn.Conv2d in seen and not twins_serve
    (accelerate(model) if "accelerated" in name else model)(x)
    assert bool(twins_serve) == (name != "plain")


def sizes(model, x):
    """(elements of the weight, outputs of a channel of all images) of each convolution and linear layer of a forward
    pass.
    """
    found = []
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    handles = [
        layer.register_forward_hook(
            lambda layer, args, out: found.append((layer.weight.numel(), out.numel() // out.shape[1]))
        )
        for layer in layers
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def test_reasons_of_who_watches(monkeypatch):
    monkeypatch.setattr(dispatch, "platform_problem", lambda *device: None)
    monkeypatch.setattr(dispatch, "without_triton_on_cpu", lambda: False)
    block, x = FusedMBConv(8, 8), torch.randn(2, 8, 5, 5)
    assert block.why_not_fused(x) is None
    with FlopCounterMode(display=False):
        assert block.why_not_fused(x).startswith("a TorchDispatchMode is active")
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
    assert block.why_not_fused(x) == "hooks on all modules are registered"
    handle.remove()
    assert block.why_not_fused(x) is None
