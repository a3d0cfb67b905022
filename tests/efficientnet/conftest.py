"""Shared by all: a small folder of images, one short training run on it, and commands run in this process."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from efficientnet.cli import main

torch.set_num_threads(1)  # tiny tensors: a second thread gains little, and on a busy machine each waits for the other

COLOURS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30)}


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    if "support.processes" in sys.modules:  # of the tests that start some
        sys.modules["support.processes"].end()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """12 noisy 20 x 24 PNGs of each of three colours: a data set for runs of seconds."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for i in range(12):
            pixels = np.clip(np.array(colour) + rng.normal(0, 40, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def trained(image_folder, tmp_path_factory):
    """(config, output folder, evaluation) of a finished run."""
    from efficientnet.training.settings import TrainConfig
    from efficientnet.training.trainer import Trainer

    output = tmp_path_factory.mktemp("run")
    data = f"imagefolder:{image_folder}"
    config = TrainConfig(data, img_size=8, epochs=4, batch_size=10, lr=3e-3, device="cpu", output=str(output))
    return config, output, Trainer(config).run()


@pytest.fixture
def run(capsys):
    """Run one command in this process: (exit code, stdout, stderr)."""

    def command(*argv):
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return command
