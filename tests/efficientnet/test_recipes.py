"""Recipes: every preset makes a configuration and a trainer, options override them, and a wrong one is named."""

import pytest

from efficientnet import list_models
from efficientnet.cli import main
from efficientnet.errors import InputError
from efficientnet.training.recipes import FOLDER, list_recipes, load_recipe
from efficientnet.training.settings import TrainConfig

TINY = ("--model", "efficientnet_d0.1_w0.1_r32", "--device", "cpu", "--amp", "none", "--num-workers", "0")


def test_every_file_is_a_recipe():
    assert {path.stem for path in FOLDER.glob("*.toml")} == {*list_recipes(), "paper"}
    assert list_recipes() == [*(f"paper-b{i}" for i in range(8)), "digits"]
    crops = []
    for name in list_recipes():
        config = TrainConfig(**load_recipe(name))
        assert config.model in list_models() and config.label_smoothing == 0.1 and config.model_ema
        if name.startswith("paper"):
            assert config.opt == "rmsproptf" and config.weight_decay == 1e-5
        crops.append(config.crop_pct)
    assert crops[:8] == sorted(crops[:8]) == [0.875, 0.882, 0.89, 0.904, 0.922, 0.934, 0.942, 0.949]


def test_the_papers_recipe_has_the_papers_numbers():
    """Section 5.2 of the paper, and what its TensorFlow release adds."""
    config = TrainConfig(**load_recipe("paper-b3"))
    assert (config.opt, config.alpha, config.momentum, config.opt_eps) == ("rmsproptf", 0.9, 0.9, 1e-3)
    assert (config.lr_base, config.lr_base_size, config.sched, config.decay_rate, config.decay_epochs) == (
        0.016,
        256,
        "step",
        0.97,
        2.4,
    )
    assert (config.warmup_epochs, config.epochs, config.bn_momentum, config.bn_eps) == (5, 350, 0.01, 1e-3)
    assert (config.model_ema, config.model_ema_decay, config.aa, config.scale) == (True, 0.9999, "auto", (0.08, 1.0))
    assert config.drop_rate is None and config.drop_path_rate is None and config.model == "tf_efficientnet_b3"


def test_a_recipe_trains_and_options_override_it(image_folder, tmp_path, monkeypatch):
    """paper-b0 as it is but for the network's size: AutoAugment, crops, averages, the step schedule."""
    from efficientnet.training.trainer import Trainer

    seen = []

    class Spy(Trainer):
        def __init__(self, config):
            super().__init__(config)
            seen.append(self)

    monkeypatch.setattr("efficientnet.training.trainer.Trainer", Spy)
    options = (
        "--data",
        f"imagefolder:{image_folder}",
        "--epochs",
        "1",
        "-b",
        "10",
        "--img-size",
        "16",
        "--drop",
        "0.0",
        "--dr",
        "0.5",
    )
    assert main(["train", "--recipe", "paper-b0", *TINY, *options, "--output", str(tmp_path), "--no-model-ema"]) == 0
    (trainer,) = seen
    given = {
        "model": TINY[1],
        "device": "cpu",
        "amp": "none",
        "num_workers": 0,
        "data": options[1],
        "epochs": 1,
        "batch_size": 10,
    }
    given |= {"img_size": 16, "drop_rate": 0.0, "decay_rate": 0.5, "output": str(tmp_path), "model_ema": False}
    assert trainer.config == TrainConfig(**load_recipe("paper-b0") | given)
    assert (
        type(trainer.optimizer).__name__ == "RMSpropTF"
        and trainer.average is None
        and trainer.model.bn1.momentum == 0.01
    )
    assert trainer.step == 3 and trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.016 * 10 / 256 * 3 / 3)


def test_a_recipe_of_ones_own(tmp_path):
    (tmp_path / "mine.toml").write_text('extends = "paper-b1"\nepochs = 7\nscale = [0.5, 0.9]\n')
    settings = load_recipe(str(tmp_path / "mine.toml"))
    assert settings == load_recipe("paper-b1") | {"epochs": 7, "scale": [0.5, 0.9]}
    assert TrainConfig(**settings).scale == (0.5, 0.9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs =", "r.toml' is not TOML: "),
        ("epoch = 3", "unknown setting 'epoch'; did you mean epochs?"),
        ('extends = "paper-b9"', "unknown recipe 'paper-b9'; accepted: .*paper-b"),
        ('extends = "RECIPE"', "extends itself"),
    ],
)
def test_a_wrong_recipe_is_named(tmp_path, text, message):
    path = tmp_path / "r.toml"
    path.write_text(text.replace("RECIPE", str(path)))
    with pytest.raises(InputError, match=message):
        load_recipe(str(path))


def test_a_wrong_value_in_a_recipe_is_named(tmp_path, capsys):
    path = tmp_path / "r.toml"
    path.write_text('lr = "much"\n')
    with pytest.raises(SystemExit) as stop:
        main(["train", "--recipe", str(path), "--output", str(tmp_path / "out")])
    message = f"efficientnet: error: lr must be a finite number > 0, got 'much' (recipe {str(path)!r})\n"
    assert stop.value.code == 2 and capsys.readouterr() == ("", message) and not (tmp_path / "out").exists()
