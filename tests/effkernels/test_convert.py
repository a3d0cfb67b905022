"""accelerate, restore and explain on whole models of every library: the same numbers, the same objects, and back
again.
"""

import copy
import io
import pickle
from collections import Counter

import pytest
import torch
from torch import nn

from efficientnet import create_model
from efficientnet.training.distributed import release
from effkernels import accelerate, explain, restore
from support.other_models import calibrated, logits, lukemelas_model, timm_model, torchvision_model, transformers_model
from support.truth import relative_error

# name: (model, its MBConv blocks, how many of them kernels serve, image size)
MODELS = {
    "timm-efficientnet_b0": (lambda: timm_model("efficientnet_b0", drop_path_rate=0.2), 16, 16, 64),
    "timm-tf_efficientnet_b1": (lambda: timm_model("tf_efficientnet_b1"), 23, 23, 49),
    "timm-tf_efficientnet_lite0": (lambda: timm_model("tf_efficientnet_lite0"), 16, 16, 64),
    "timm-tf_efficientnet_es": (lambda: timm_model("tf_efficientnet_es"), 18, 11, 32),
    "timm-mobilenetv2_100": (lambda: timm_model("mobilenetv2_100"), 17, 17, 64),
    "timm-tf_mobilenetv3_small_100": (lambda: timm_model("tf_mobilenetv3_small_100"), 11, 11, 65),
    "timm-semnasnet_100": (lambda: timm_model("semnasnet_100"), 16, 16, 64),
    "torchvision-efficientnet_b0": (lambda: torchvision_model("efficientnet_b0"), 16, 16, 64),
    "torchvision-efficientnet_v2_s": (lambda: torchvision_model("efficientnet_v2_s"), 40, 30, 32),
    "torchvision-mobilenet_v2": (lambda: torchvision_model("mobilenet_v2"), 17, 17, 64),
    "torchvision-mobilenet_v3_small": (lambda: torchvision_model("mobilenet_v3_small"), 11, 11, 64),
    "torchvision-mnasnet0_5": (lambda: torchvision_model("mnasnet0_5"), 16, 16, 64),
    "lukemelas-b0": (lambda: lukemelas_model("efficientnet-b0", drop_connect_rate=0), 16, 16, 64),
    "lukemelas-b1": (lambda: lukemelas_model("efficientnet-b1", drop_connect_rate=0), 23, 23, 49),
    "lukemelas-b2": (lambda: lukemelas_model("efficientnet-b2", drop_connect_rate=0), 23, 23, 49),
    "lukemelas-b0-dynamic": (lambda: lukemelas_model("efficientnet-b0", image_size=None), 16, 16, 49),
    "transformers-b0": (lambda: transformers_model(1.0, 1.0, 224, drop_connect_rate=0.0), 16, 16, 64),
    "transformers-b1": (
        lambda: transformers_model(1.0, 1.1, 240, drop_connect_rate=0.0, depthwise_padding=[5, 8]),
        23,
        23,
        49,
    ),
    "transformers-half": (lambda: transformers_model(0.5, 0.5, 224, drop_connect_rate=0.0), 10, 10, 64),
    "own-b0": (lambda: create_model("efficientnet_b0", num_classes=10, fused=False), 16, 16, 64),
    "own-tf_b0": (lambda: create_model("tf_efficientnet_b0", num_classes=10, fused=False), 16, 16, 49),
    "own-b1": (lambda: create_model("efficientnet_b1", num_classes=10, fused=False), 23, 23, 32),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_and_back(name, twins_serve):
    """Same logits through what is read from each block; every eligible block fused; restored: the same objects and
    bits.

    In float64, since networks this deep and random amplify fp32's rounding to 1e-5, more or less by the kind of CPU.
    """
    make, blocks, eligible, size = MODELS[name]
    model, x = calibrated(make, size)
    model, x = model.double(), x.double()
    before = explain(model)
    modules, types = list(model.modules()), [type(m) for m in model.modules()]
    tensors = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        plain = logits(model, x)
        assert accelerate(model) is model
        fused = logits(model, x)
    assert relative_error(fused, plain) < 1e-10
    ends = [end.rpartition(".")[2] for end, reason in before.ends.items() if reason is None]
    separable = [end for end in ends if end not in ("stem", "head")]  # layers that are no module by themselves
    assert Counter(twins_serve) == Counter(
        ["mbconv"] * (eligible + len(separable)) + ["stem"] + ["head"] * ("head" in ends)
    )
    assert len(separable) == ("mnasnet0_5" in name)
    assert "stem" in ends and ("head" in ends) == ("transformers" not in name and "timm-tf_mobilenetv3" not in name)

    after = explain(model)
    assert before == after and len(after) == blocks and after.fused == eligible
    assert before.fused == 0 and len(before.waiting) == eligible and not after.waiting
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == tensors
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(isinstance(m, t) for m, t in zip(model.modules(), types, strict=True))

    classes = [type(m) for m in model.modules()]
    assert [type(m) for m in accelerate(model).modules()] == classes  # twice is once
    assert restore(model) is model
    assert [type(m) for m in model.modules()] == types
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    with torch.no_grad():
        assert torch.equal(logits(model, x), plain)
    assert restore(model) is model and explain(model) == before


TRAINED = ["timm-efficientnet_b0", "torchvision-mobilenet_v3_small", "lukemelas-b0", "transformers-half", "own-tf_b0"]
TRAINED_TOO = [
    *("timm-mobilenetv2_100", "timm-tf_efficientnet_lite0", "timm-tf_mobilenetv3_small_100", "timm-semnasnet_100"),
    *("torchvision-efficientnet_b0", "torchvision-mobilenet_v2", "torchvision-mnasnet0_5"),
    *("lukemelas-b1", "lukemelas-b2", "transformers-b0", "transformers-b1"),
]


trained = pytest.mark.parametrize(
    "name", [*TRAINED, *(pytest.param(name, marks=pytest.mark.slow) for name in TRAINED_TOO)]
)


@trained
def test_training_with_an_optimizer_made_before(name, twins_serve):
    """Two steps of SGD give the parameters and buffers of the plain model; a checkpoint of it loads into the plain
    model strictly.
    """
    make, _, eligible, size = MODELS[name]
    model, x = calibrated(make, size)
    # Weights this random amplify rounding from layer to layer: in float64 what is left is what is wrong. So drop-path's
    # factors are ones that fp32 holds exactly.
    for m in model.modules():
        if hasattr(m, "drop_prob"):
            m.drop_prob = 0.5
        if type(m).__name__ == "StochasticDepth":
            m.p = 0.5
    results = []
    for fuse in (False, True):
        trained = copy.deepcopy(model).double().train()
        optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3, momentum=0.9)
        if fuse:
            accelerate(trained)
        for seed in range(2):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            logits(trained, x.double()).square().sum().backward()
            optimizer.step()
        results.append(trained)
    # Whose first separable layers are no module.
    assert twins_serve.count("mbconv") == 2 * (eligible + ("mnasnet0_5" in name))
    assert twins_serve.count("stem") == (0 if "own" in name else 2)  # it is part of the first block there, in training
    plain, fused = results
    for key, value in fused.state_dict().items():
        assert relative_error(value, plain.state_dict()[key]) < 1e-6, key
    for (key, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9, msg=key)
    plain.load_state_dict(fused.state_dict(), strict=True)
    assert torch.equal(logits(plain.eval(), x.double()), logits(restore(fused).eval(), x.double()))


def test_drop_connect_over_a_whole_network(twins_serve):
    """efficientnet_pytorch hands every block a rate of its own: with one seed the accelerated network drops what the
    plain one drops.
    """
    package = pytest.importorskip("efficientnet_pytorch")
    settings = package.utils.efficientnet(
        0.25, 1.0, dropout_rate=0.0, drop_connect_rate=0.5, image_size=32, num_classes=10
    )
    model, _ = calibrated(lambda: package.EfficientNet(*settings), 32)
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)

    def step(model, seed):
        torch.manual_seed(seed)
        out = model.double().train()(x)
        gradients = torch.autograd.grad(out.square().sum(), list(model.parameters()))
        return [out, *gradients, *(buffer for buffer in model.buffers() if buffer.is_floating_point())]

    plain, fused = step(copy.deepcopy(model), 0), step(accelerate(copy.deepcopy(model)), 0)
    assert twins_serve == ["stem", *["mbconv"] * 16, "head"]
    for a, b in zip(fused, plain, strict=True):  # 1e-4: the factor 1 / keep of an image is a fp32 number on kernels
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item() + 1e-12)
    others = step(accelerate(copy.deepcopy(model)), 1)
    assert relative_error(others[0], plain[0]) > 0.1  # so what is dropped matters


@trained
def test_training_without_kernels(name, monkeypatch):
    """On the reference backend, fp32 on the CPU: logits, all gradients and running statistics to 1e-5, in both
    modes.
    """
    make, blocks, _, size = MODELS[name]
    monkeypatch.setenv("EFFKERNELS_BACKEND", "reference")
    model, x = calibrated(make, min(size, 49))
    fused = accelerate(copy.deepcopy(model))
    found = explain(fused)
    assert len(found) == blocks and all("reference" in reason for reason in found.values())

    def step(model):
        torch.manual_seed(0)
        evaluated, trained = logits(model.eval(), x), logits(model.train(), x)
        gradients = torch.autograd.grad(evaluated.square().sum() + trained.square().sum(), list(model.parameters()))
        return [evaluated, trained, *gradients, *(buffer for buffer in model.buffers() if buffer.is_floating_point())]

    for a, b in zip(step(fused), step(model), strict=True):
        assert relative_error(a, b.double()) <= 1e-5


# ---- life as a module ------------------------------------------------------------------------------------------------


def narrow(seed=0):
    """timm's EfficientNet-B0, narrow, in eval mode, and images."""
    torch.manual_seed(seed)
    networks = pytest.importorskip("timm").models.efficientnet
    model = networks._gen_efficientnet("efficientnet_b0", channel_multiplier=0.25, depth_multiplier=1.0, num_classes=10)
    return model.eval(), torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("rebuild", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch.save"])
@pytest.mark.parametrize("make", [lambda: narrow()[0], lambda: create_model("b0", num_classes=10, fused=False).eval()])
def test_copies_are_accelerated_and_of_their_own(make, rebuild):
    model = accelerate(make())
    if rebuild == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = rebuild(model)
    assert explain(other).fused == explain(model).fused == 16
    assert not {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        for p in other.parameters():
            p.zero_()
        assert torch.equal(model(x), expected) and not other(x).any()
    assert [type(m) for m in restore(other).modules()] == [type(m) for m in restore(model).modules()]


def test_a_block_that_copies_itself_in_its_own_way():
    class Odd(type(narrow()[0].blocks[0][0])):
        def __reduce__(self):
            return Odd, (8, 8)

    with pytest.raises(TypeError, match="Odd copies itself in its own way: restore"):
        copy.deepcopy(accelerate(Odd(8, 8)))


def test_moving_average_and_modes(twins_serve):
    """timm's EMA copies the model; train() and eval() reach what is inside; half() and to() replace tensors that
    restore keeps.
    """
    timm = pytest.importorskip("timm")
    model, x = narrow()
    average = timm.utils.ModelEmaV3(accelerate(model), decay=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    before = average.module.conv_stem.weight.clone()
    average.update(model)
    torch.testing.assert_close(average.module.conv_stem.weight, before * 1.5)
    assert explain(average.module).fused == 16
    model.train()
    assert all(m.training for m in model.modules())
    model.to(torch.bfloat16).to(memory_format=torch.channels_last).eval()
    parameters = list(model.parameters())
    with torch.no_grad():
        assert model(x.bfloat16()).dtype == torch.bfloat16 and twins_serve.count("mbconv") == 16
    assert all(a is b for a, b in zip(restore(model).parameters(), parameters, strict=True))


def test_hooks_on_a_block_itself_go_on():
    model, x = narrow()
    shapes = []
    model.blocks[1][0].register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    accelerate(model)
    with torch.no_grad():
        model(x)
    assert explain(model).fused == 16 and shapes == [(2, 8, 8, 8)]


def test_shared_blocks_and_calls_by_keyword(twins_serve):
    model, _ = narrow()
    block = model.blocks[1][1]
    twice = accelerate(nn.Sequential(block, block))
    x = torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        assert torch.equal(block(x=x), block(x)) and len(twins_serve) == 2
        twice(x)
    assert len(twins_serve) == 4 and list(explain(twice)) == ["0"]


def test_distributed_wrapper(tmp_path, twins_serve):
    """Accelerated before or after DistributedDataParallel: gradients of one process are the plain model's."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        gradients = []
        for when in ("never", "before", "after"):
            model, x = narrow()
            if when == "before":
                accelerate(model)
            wrapped = nn.parallel.DistributedDataParallel(model)
            if when == "after":
                accelerate(wrapped)
            wrapped(x).square().sum().backward()
            release(wrapped)
            gradients.append([p.grad for p in model.parameters()])
        assert twins_serve.count("mbconv") == 2 * 16 and all(key.startswith("module.") for key in wrapped.state_dict())
    finally:
        dist.destroy_process_group()
    for others in gradients[1:]:
        for grad, plain in zip(others, gradients[0], strict=True):
            torch.testing.assert_close(grad, plain, rtol=1e-3, atol=1e-5 * plain.abs().max().item())


def test_made_into_another_class_since():
    """fully_shard and the like subclass what they find: restore would lose their class, so it refuses."""
    model, _ = narrow()
    block = accelerate(model).blocks[0][0]
    block.__class__ = type("Sharded", (type(block),), {})
    with pytest.raises(TypeError, match="Sharded was made of an accelerated block by another library"):
        restore(model)


def test_symbolic_tracing_sees_the_plain_layers():
    """torch.fx, on which timm's and torchvision's feature extraction stand, records the block's own layers."""
    model = torchvision_model("mobilenet_v2")
    plain = [node.target for node in torch.fx.symbolic_trace(model).graph.nodes]
    assert [node.target for node in torch.fx.symbolic_trace(accelerate(model)).graph.nodes] == plain


@pytest.mark.parametrize(
    "name", ["timm-efficientnet_b0", "torchvision-mobilenet_v3_small", "lukemelas-b0", "transformers-half"]
)
def test_compiled_as_one_graph(name):
    make, *_ = MODELS[name]
    torch.manual_seed(0)
    model = accelerate(make())
    block = model.get_submodule(list(explain(model))[1]).eval()
    inputs = next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels
    x = torch.randn(2, inputs, 8, 8)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


EXPORTED = {  # 64 pixels: of fewer, calibrated statistics are those of four values, and eager PyTorch itself is 5 % off
    "timm-narrow": narrow,
    **{
        f"timm-{n}": lambda n=n: calibrated(lambda: timm_model(n), 64)
        for n in ("mobilenetv2_035", "tf_mobilenetv3_small_100")
    },
    **{
        f"torchvision-{n}": lambda n=n: calibrated(lambda: torchvision_model(n), 64)
        for n in ("mobilenet_v3_small", "mobilenet_v2", "efficientnet_b0")
    },
    **{
        f"lukemelas-b{i}": lambda i=i: calibrated(lambda: lukemelas_model(f"efficientnet-b{i}", image_size=64), 64)
        for i in range(3)
    },
    **{
        f"transformers-{w}-{d}": lambda w=w, d=d: calibrated(lambda: transformers_model(w, d, 224), 64)
        for w, d in ((0.5, 0.5), (1.0, 1.0), (1.0, 1.1))
    },
    "own": lambda: calibrated(lambda: create_model("efficientnet_b0", num_classes=10, fused=False), 64),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "timm-narrow" else pytest.mark.slow) for name in EXPORTED]
)
def test_onnx_export_of_a_restored_model(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = EXPORTED[name]()
    accelerate(model)
    restore(model)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    out = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        assert relative_error(torch.from_numpy(out), logits(model, x).double()) < 1e-4


def test_no_library_is_imported():
    """Classes are known by name: accelerating our own model loads neither timm nor torchvision nor transformers."""
    import subprocess
    import sys

    code = """
        import sys
        from efficientnet import create_model
        from effkernels import accelerate, explain
        assert explain(accelerate(create_model("b0", fused=False))).fused == 16
        assert not {"timm", "torchvision", "transformers", "efficientnet_pytorch", "triton"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())], check=True)


LARGE = {
    **{
        f"timm-{p}efficientnet_b{i}": lambda n=f"{p}efficientnet_b{i}": timm_model(n)
        for p in ("", "tf_")
        for i in range(2, 9)
    },
    **{f"timm-tf_efficientnet_lite{i}": lambda i=i: timm_model(f"tf_efficientnet_lite{i}") for i in range(1, 5)},
    **{f"torchvision-efficientnet_b{i}": lambda i=i: torchvision_model(f"efficientnet_b{i}") for i in range(1, 8)},
    **{
        f"torchvision-{n}": lambda n=n: torchvision_model(n)
        for n in ("efficientnet_v2_m", "efficientnet_v2_l", "mobilenet_v3_large")
    },
    **{f"lukemelas-b{i}": lambda i=i: lukemelas_model(f"efficientnet-b{i}") for i in range(2, 9)},
}


@pytest.mark.parametrize("name", LARGE)
def test_every_block_of_the_large_ones_is_eligible(name):
    """Built without memory: what is read from a block needs no values."""
    with torch.device("meta"):
        found = explain(LARGE[name]())
    assert all(reason is None or "a dense k x k convolution" in reason for reason in found.values()), found
    assert list(found.ends.values()) == [None, None] and len(found.waiting) >= (9 if "lite" in name else 15)
    assert ("v2" in name) == any(found.values())
