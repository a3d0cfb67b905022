"""The check in front of every row: it must pass what is right and refuse what is not."""

import pytest
import torch

from benchmarks import libraries
from benchmarks.shapes import Block, Depthwise, Model, Pointwise, SqueezeExciteLayer
from benchmarks.variants import EAGER, IMAGES, OURS, Truth, VariantRun, variants

BLOCK = Block(8, 8, 3, 1, 6, 0.25, 48, 2, 7)
LAYERS = [Depthwise(24, 9, 5, 2), SqueezeExciteLayer(24, 6, 5), BLOCK]


def truth_of(shape, training, batch=4, dtype=torch.float32):
    return Truth.of(shape, training, batch, "cpu", dtype)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("shape", LAYERS, ids=lambda shape: type(shape).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_eager_variant_passes(shape, training, dtype):
    truth = truth_of(shape, training, dtype=dtype)
    for variant in variants([]):
        errors = truth.check(truth.runner(variant))
        assert set(errors) == ({"out", "dx", "weights"} if training else {"out"})


@pytest.mark.parametrize("kind", ["expand", "project"])
def test_a_pointwise_layer_passes(kind):
    truth = truth_of(Pointwise(kind, 16, 24, 5), False)
    for variant in variants([]):
        assert set(truth.check(truth.runner(variant))) == {"out"}


def test_a_whole_model_passes():
    truth = truth_of(Model("b0", 64), True)
    assert set(truth.check(truth.runner(OURS))) == {"out", "weights"}
    # A BatchNorm's bias in front of another BatchNorm has no gradient but rounding errors.
    assert "blocks.0.0.bn2.bias" not in truth.results and "blocks.0.0.bn2.weight" in truth.results


@pytest.mark.parametrize("training, name", [(False, "out"), (True, "out")])
def test_a_slightly_wrong_weight_is_refused(training, name):
    truth = truth_of(BLOCK, training)
    runner = truth.runner(OURS)
    runner.module.conv_dw.weight.data[0] *= 1.001
    with pytest.raises(AssertionError, match=f"{name}: relative L2 error"):
        truth.check(runner)


def test_one_wrong_gradient_is_refused():
    truth = truth_of(BLOCK, True)
    runner = truth.runner(OURS)
    runner.module.se.conv_reduce.bias.register_hook(lambda gradient: gradient * 1.001)
    with pytest.raises(AssertionError, match="weights: relative L2 error"):
        truth.check(runner)


def test_a_wrong_last_image_is_refused():
    truth = truth_of(BLOCK, False, batch=6)
    runner = truth.runner(OURS)
    runner.x[-1] += 0.01
    with pytest.raises(AssertionError, match="out: relative L2 error"):
        truth.check(runner)


def test_not_a_number_is_refused():
    truth = truth_of(BLOCK, True)
    runner = truth.runner(OURS)
    runner.module.bn3.weight.data[0] = torch.nan
    with pytest.raises(AssertionError, match="relative L2 error nan"):
        truth.check(runner)


@pytest.mark.parametrize("shape", LAYERS, ids=lambda shape: type(shape).__name__)
def test_a_repeated_batch_has_the_results_of_its_images(shape):
    truth = truth_of(shape, True, batch=3 * IMAGES)
    repeated = VariantRun(shape, True, EAGER, truth.state, truth.x, truth.dout, truth.batch, "cpu", torch.float64)
    assert repeated.x.shape[0] == 3 * IMAGES
    assert max(truth.errors(repeated).values()) < 1e-12


def test_a_training_step_moves_a_model_and_leaves_a_block_alone():
    for shape, moves in ((Model("b0", 64), True), (BLOCK, False)):
        runner = truth_of(shape, True).runner(OURS)
        before = [p.detach().clone() for p in runner.parameters]
        runner.step()
        assert all(p.grad is not None and p.grad.norm() > 0 for p in runner.parameters)
        assert any(not torch.equal(p, b) for p, b in zip(runner.parameters, before, strict=True)) is moves


def test_the_path_names_what_ran():
    truth = truth_of(BLOCK, False)
    assert truth.runner(EAGER).path() == "PyTorch"
    assert truth.runner(OURS).path().startswith("PyTorch: ")


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_librarys_model_with_our_weights_passes(library, training):
    if (problem := libraries.problem(library)) is not None:
        pytest.skip(problem)
    truth = truth_of(Model("b0", 64), training)
    (variant,) = (v for v in variants([], [library]) if v.name == f"{library}-channels_last")
    runner = truth.runner(variant)
    assert type(runner.module).__module__.startswith(library)
    truth.check(runner)
    runner.parameters[5].data.mul_(1.01)
    with pytest.raises(AssertionError, match="out: relative L2 error"):
        truth.check(runner)


def test_one_image_in_inference():
    truth = truth_of(BLOCK, False, batch=1)
    assert truth.runner(OURS).x.shape[0] == 1 and len(truth.results["out"]) == 2
    truth.check(truth.runner(OURS))
    with pytest.raises(ValueError, match="got 1"):
        truth_of(BLOCK, True, batch=1)


@pytest.mark.parametrize("batch", [0, 3])
def test_a_batch_that_is_no_multiple(batch):
    with pytest.raises(ValueError, match=f"multiple of {IMAGES}, or 1 in inference, got {batch}"):
        truth_of(BLOCK, False, batch=batch)
