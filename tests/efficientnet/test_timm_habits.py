"""What users of timm reach for: options of training, questions to a model, old names; against timm where it has an
answer.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efficientnet import create_model, freeze
from efficientnet.cli import main
from efficientnet.data.order import TrainingOrder
from efficientnet.errors import InputError
from efficientnet.model.config import present_name
from efficientnet.training.optim import create_optimizer, epochs_without_gain, learning_rate
from efficientnet.training.settings import TrainConfig
from efficientnet.training.trainer import Trainer
from efficientnet.weights.checkpoints import load_checkpoint, save_checkpoint

TINY = "efficientnet_d0.1_w0.1_r32"


# Models


@pytest.fixture(scope="module")
def pair(timm):
    """(ours, timm's) with the same weights, in float64 so that what is left is what is wrong."""
    torch.manual_seed(0)
    ours, theirs = create_model("efficientnet_b0", num_classes=5), timm.create_model("efficientnet_b0", num_classes=5)
    theirs.load_state_dict(ours.state_dict())
    return ours.double().eval(), theirs.double().eval()


X = torch.randn(2, 3, 64, 64, dtype=torch.float64)


@pytest.mark.parametrize(
    "settings",
    [
        *({}, {"indices": 2}, {"indices": [0, 3]}, {"indices": (-1,)}, {"indices": [1, 2], "stop_early": True}),
        *({"indices": [2], "intermediates_only": True}, {"norm": True, "output_fmt": "NCHW"}),
    ],
)
def test_forward_intermediates(pair, settings):
    found, expected = (model.forward_intermediates(X, **settings) for model in pair)
    if isinstance(expected, tuple):
        torch.testing.assert_close(found[0], expected[0])
        found, expected = found[1], expected[1]
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("indices", [0, 6, [5], [-6], []])
def test_indices_that_there_are_not(pair, indices):
    with pytest.raises(ValueError, match="indices must be of the 5 entries of feature_info, got"):
        pair[0].forward_intermediates(X, indices)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        pair[0].forward_intermediates(X, output_fmt="NLC")


@pytest.mark.parametrize("out_indices", [None, (1, 3), (-2, -1)])
def test_feature_info(timm, out_indices):
    theirs = timm.create_model(
        "efficientnet_b0", features_only=True, **({} if out_indices is None else {"out_indices": out_indices})
    )
    ours = create_model("efficientnet_b0", features_only=True, out_indices=out_indices)
    for name in ("channels", "reduction"):
        for idx in (None, 0, 2, [1, 3]):
            assert getattr(ours.feature_info, name)(idx) == getattr(theirs.feature_info, name)(idx), (name, idx)
    assert (
        ours.feature_info.get("num_chs")
        == ours.feature_info.channels()
        == [info["num_chs"] for info in ours.feature_info]
    )
    assert create_model("efficientnet_b0").feature_info.module_name() == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "blocks.4",
        "blocks.6",
    ]


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", ""])
@pytest.mark.parametrize("num_classes", [0, 7])
def test_pooling(timm, pool, num_classes):
    """Of a new model and of a reset one; with the classifier's weights, timm's numbers; kept with a checkpoint."""
    if num_classes and not pool:
        with pytest.raises(ValueError, match="global_pool '' returns the feature map, which has no classifier"):
            create_model(TINY, num_classes=num_classes, global_pool=pool)
        return
    torch.manual_seed(0)
    ours = create_model("efficientnet_b0", num_classes=5).double().eval()
    theirs = timm.create_model("efficientnet_b0", num_classes=num_classes, global_pool=pool).double().eval()
    ours.reset_classifier(num_classes, pool)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(X), theirs(X))
    torch.testing.assert_close(
        ours.forward_head(ours.forward_features(X), pre_logits=True),
        theirs.forward_head(theirs.forward_features(X), pre_logits=True),
    )
    new = create_model("efficientnet_b0", num_classes=num_classes, global_pool=pool)
    assert {k: v.shape for k, v in new.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert new.head_hidden_size == theirs.head_hidden_size and type(new.get_classifier()) is type(
        theirs.get_classifier()
    )
    ours.reset_classifier(3 if pool else 0)  # keeps the pooling
    assert ours.global_pool.pool_type == pool


def test_pooling_is_kept_with_a_checkpoint(tmp_path):
    model = create_model(TINY, num_classes=3, global_pool="catavgmax").eval()
    save_checkpoint(model, tmp_path / "m.safetensors")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(load_checkpoint(None, tmp_path / "m.safetensors").eval()(x), model(x))
    with pytest.raises(
        ValueError, match="global_pool must be one of 'avg', 'max', 'avgmax', 'catavgmax', '', got 'median'"
    ):
        model.reset_classifier(3, "median")


@pytest.mark.parametrize("fused", [True, False])
def test_grad_checkpointing(fused):
    """The same gradients, running statistics and random numbers, from less memory: blocks are run twice."""
    results, runs = [], []
    for enable in (False, True):
        torch.manual_seed(0)
        model = create_model(TINY, num_classes=3, fused=fused, drop_path_rate=0.5).double().train()
        model.set_grad_checkpointing(enable)
        counted = []
        model.blocks[2][0].conv_pw.register_forward_hook(lambda *args, counted=counted: counted.append(1))
        out = model(torch.randn(4, 3, 32, 32, dtype=torch.float64))
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters()), *model.buffers()])
        runs.append(len(counted))
    assert runs == [1, 2]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    features = create_model(TINY, features_only=True)
    features.set_grad_checkpointing()
    features.blocks[1][0].conv_pw.register_forward_hook(lambda *args: counted.append(1))
    counted.clear()
    sum(out.sum() for out in features(torch.randn(2, 3, 32, 32))).backward()
    assert len(counted) == 2


OLD = [
    ("tf_efficientnet_b0_ns", "tf_efficientnet_b0", "ns_jft_in1k"),
    ("tf_efficientnet_b8_ap", "tf_efficientnet_b8", "ap_in1k"),
    ("tf_efficientnet_l2_ns_475", "tf_efficientnet_l2", "ns_jft_in1k_475"),
    ("timm/tf_efficientnet_b3_ns", "tf_efficientnet_b3", "ns_jft_in1k"),
]


@pytest.mark.parametrize("name, model, tag", OLD)
def test_old_names(name, model, tag):
    with pytest.warns(UserWarning, match=f"model '{name}' is the old name of {model}.{tag}"):
        assert present_name(name) == (model, tag)
    with pytest.warns(UserWarning):
        assert create_model(name, device="meta").config.name == model


@pytest.mark.parametrize("prefix", ["timm/", "hf-hub:timm/", "hf_hub:timm/", "hf-hub:"])
def test_prefixes_of_names(prefix):
    assert present_name(f"{prefix}efficientnet_b0.ra_in1k") == ("efficientnet_b0", "ra_in1k")
    assert create_model(f"{prefix}efficientnet_b1", device="meta").config.name == "efficientnet_b1"
    assert present_name("efficientnet_b99_ns") == ("efficientnet_b99_ns", None)
    with pytest.raises(ValueError, match="unknown model 'timm/resnet50'"):
        create_model("timm/resnet50")


# Frozen BatchNorm


def norms(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)}


@pytest.mark.parametrize(
    "thaw", [lambda m: m.train(), lambda m: m.blocks.train(), lambda m: m.blocks[0].train(), lambda m: m.bn1.train()]
)
@pytest.mark.parametrize("kind", ["model", "features", "copy", "accelerated"])
def test_frozen_norms_stay_frozen(thaw, kind):
    """Under train() of whatever part, of the features-only form, of a copy; and go on where nothing is frozen any
    more.
    """
    model = create_model(TINY, num_classes=3, features_only=kind == "features", fused=kind != "accelerated")
    assert freeze(model, 1) == ["conv_stem", "bn1", "blocks.0", "blocks.1"]
    if kind == "copy":
        model = copy.deepcopy(model)
    if kind == "accelerated":
        from effkernels import accelerate

        accelerate(model)
    model.eval()
    thaw(model)
    frozen = {
        name: layer
        for name, layer in norms(model).items()
        if name == "bn1" or name.startswith(("blocks.0", "blocks.1"))
    }
    assert len(frozen) > 4 and not any(layer.training for layer in frozen.values())
    before = {name: layer.running_mean.clone() for name, layer in norms(model).items()}
    model.train()
    model(torch.randn(2, 3, 32, 32))
    for name, layer in norms(model).items():
        assert torch.equal(layer.running_mean, before[name]) == (name in frozen), name
    freeze(model, None)
    model.train()
    assert all(layer.training for layer in norms(model).values())


def test_features_freeze_to_their_end():
    model = create_model(TINY, features_only=True, out_indices=(1, 2))
    for until in ("head", "all"):
        assert freeze(model, until) == ["conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2"]
        assert not any(p.requires_grad for p in model.parameters())
    assert freeze(model, "stem") == ["conv_stem", "bn1"] and all(p.requires_grad for p in model.blocks.parameters())
    with pytest.raises(ValueError, match="until must be 'stem', a stage index from 0 to 2"):
        freeze(model, 3)


# Training


def test_plateau():
    """Ten per cent after two epochs without a better accuracy, and again after two more; warm-up first."""
    config = TrainConfig(sched="plateau", decay_rate=0.1, patience_epochs=2, lr=1.0, warmup_epochs=1, epochs=10)
    rates = [
        learning_rate(config, 10 * n, 10, 1, accuracies[:n])
        for accuracies in [[0.5, 0.4, 0.5, 0.3, 0.2, 0.1, 0.6, 0.5, 0.5]]
        for n in range(10)
    ]
    assert rates == pytest.approx([1 / 11, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    rates = [learning_rate(config, 10 * n, 10, 1, [0.5] * n) for n in range(1, 10)]
    assert rates == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01])


def test_epochs_without_gain():
    assert [epochs_without_gain(a) for a in ([], [0.1], [0.1, 0.1], [0.1, 0.3, 0.2, 0.3], [0.3, 0.2, 0.4])] == [
        0,
        0,
        1,
        2,
        0,
    ]


def test_early_stop(image_folder, tmp_path, capsys, monkeypatch):
    """It ends the run, and a resumed one at once; with more patience that goes on."""
    base = {
        "model": TINY,
        "img_size": 8,
        "batch_size": 10,
        "device": "cpu",
        "output": str(tmp_path),
        "lr": 1e-12,
        "epochs": 9,
    }
    config = TrainConfig(f"imagefolder:{image_folder}", early_stop=2, bn_momentum=0.0, **base)
    trainer = Trainer(config)
    trainer.run()
    assert (
        len(trainer.history) == 3
        and "early stop  2 epochs without a better held-out accuracy" in capsys.readouterr().out
    )
    again = Trainer(TrainConfig(**{**vars(config), "resume": "auto"}))
    evaluation = again.run()
    assert len(again.history) == 3 and evaluation.total == trainer.history[-1]["val_total"]
    more = Trainer(TrainConfig(**{**vars(config), "resume": "auto", "early_stop": 3}))
    more.run()
    assert len(more.history) == 4


def test_adam():
    """Weight decay is part of the gradient there, not of the step."""
    for opt, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        p = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = create_optimizer(TrainConfig(opt=opt, lr=0.1), [{"params": [p], "weight_decay": 0.5}])
        q = nn.Parameter(p.detach().clone())
        reference = kind([q], lr=0.1, weight_decay=0.5)
        for _ in range(3):
            p.grad, q.grad = torch.tensor([0.3, 0.1]), torch.tensor([0.3, 0.1])
            optimizer.step(), reference.step()
        torch.testing.assert_close(p, q)


def test_balanced_sampler():
    """Each class as often as any other, the same in every process and run, another in every epoch."""
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    orders = [TrainingOrder(1000, 10, rank=rank, world=2, size_of=lambda epoch: 8, labels=labels) for rank in (0, 0, 1)]
    drawn = [[draw.index for batch in order for draw in batch] for order in orders]
    assert drawn[0] == drawn[1] != drawn[2]
    counts = labels[torch.tensor(drawn[0] + drawn[2])].bincount()
    assert counts.sum() == 1000 and (counts - 1000 / 3).abs().max() < 60  # four standard deviations
    orders[0].begin(1, 0)
    assert [draw.index for batch in orders[0] for draw in batch] != drawn[0]


@pytest.mark.parametrize("given, weights", [("balanced", [1.0, 1.0, 1.0]), ("1,2.5,0", [1.0, 2.5, 0.0])])
def test_class_weights(image_folder, tmp_path, given, weights):
    config = TrainConfig(
        f"imagefolder:{image_folder}",
        model=TINY,
        img_size=8,
        batch_size=10,
        device="cpu",
        output=str(tmp_path),
        class_weights=given,
    )
    trainer = Trainer(config)
    assert trainer.class_weights.tolist() == pytest.approx(weights)
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 2, 1, 1])
    trainer.model.eval()
    loss = trainer.forward_backward(images, labels)
    expected = F.cross_entropy(
        trainer.model(images), labels, torch.tensor(weights), label_smoothing=config.label_smoothing
    )
    torch.testing.assert_close(loss, expected.detach())


def test_balanced_weights_of_a_set_that_is_not(image_folder, tmp_path):
    trainer = Trainer(
        TrainConfig(
            f"imagefolder:{image_folder}", model=TINY, img_size=8, batch_size=10, device="cpu", output=str(tmp_path)
        )
    )
    trainer.data.train.labels = [0] * 6 + [1] * 3 + [2] * 1
    object.__setattr__(trainer.config, "class_weights", "balanced")
    assert trainer._class_weights().tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])


@pytest.mark.parametrize("given", ["1,2", "a,b,c", "1,2,-1", "1,2,nan", "0,0,0", ""])
def test_class_weights_that_are_none(image_folder, tmp_path, given):
    config = TrainConfig(
        f"imagefolder:{image_folder}",
        model=TINY,
        img_size=8,
        device="cpu",
        output=str(tmp_path / "out"),
        class_weights=given,
    )
    with pytest.raises(InputError, match="class_weights must be balanced, or 3 numbers >= 0 with commas between, got"):
        Trainer(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given, meant",
    [
        *(
            ("--learning-rate", "--lr"),
            ("--optimizer=adam", "--opt"),
            ("--arch", "--model"),
            ("--wd", "--weight-decay"),
        ),
        *(
            ("--early-stopping", "--early-stop"),
            ("--patience", "--early-stop"),
            ("--batchsize", "--batch-size"),
            ("--image-size", "--img-size"),
        ),
    ],
)
def test_what_an_option_is_called_here(capsys, given, meant):
    with pytest.raises(SystemExit) as stop:
        main(["train", given, "1"])
    assert stop.value.code == 2 and capsys.readouterr().err.endswith(f"; did you mean {meant}?\n")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--early-stop", "0"], "early_stop must be an integer >= 1, got 0"),
        (["--patience-epochs", "0"], "patience_epochs must be an integer >= 1, got 0"),
        (["--sampler", "weighted"], "argument --sampler: invalid choice: 'weighted'"),
        (["--sched", "plateaux"], "argument --sched: invalid choice: 'plateaux'"),
        (["--in-chans", "0"], "in_chans must be an integer >= 1, got 0"),
    ],
)
def test_bad_options(capsys, tmp_path, argv, message):
    with pytest.raises(SystemExit) as stop:
        main(["train", *argv, "--output", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "out").exists()
