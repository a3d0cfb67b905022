"""Times how one core prepares photographs for a network at 224 pixels, from the JPEG file to the normalised fp32 image:
ours against torchvision's transforms as its reference scripts use them, first version (of Pillow's images, then
tensors) and second.

The photographs are made of scikit-learn's two: 500 x 375 pixels, in files as large as ImageNet's are on average
(0.1 MB), and 12 megapixels, tiled of enlarged ones with a sensor's noise, as soft and as large as a camera's (3 to
4 MB). A row's ``differences`` compare evaluation with the file's pixels all decoded and resized in float32.
"""

import io
import os
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks import libraries
from benchmarks.conftest import median_interval
from efficientnet.data.decoding import read_image
from efficientnet.data.images import ImageSet, Preprocess
from efficientnet.data.order import Draw
from efficientnet.data.torchvision_modules import torchvision_module
from efficientnet.measure.timing import quantiles, versions
from efficientnet.memory import keep_freed_memory
from efficientnet.training.augment import training_crop
from efficientnet.training.settings import TrainConfig

SHAPES: dict = {}  # no rows of networks, for a campaign
SIZES = {"500x375": 12, "12-megapixels": 4}  # photographs, and how many of them are prepared for one measurement
PAIRS = 31  # measurements of ours beside each other way
PREPROCESS = Preprocess(224, crop_pct=0.875)
MEAN, STD = PREPROCESS.mean, PREPROCESS.std


def photograph(name: str, size: str) -> bytes:
    """A JPEG file made of one of scikit-learn's photographs."""
    original = Image.fromarray(load_sample_image(f"{name}.jpg"))  # 640 x 427
    file = io.BytesIO()
    if size == "500x375":
        original.crop((35, 0, 605, 427)).resize((500, 375), Image.Resampling.LANCZOS).save(file, "JPEG", quality=98)
        return file.getvalue()
    soft = np.asarray(original.resize((1280, 854), Image.Resampling.BICUBIC))
    row = np.concatenate([soft, soft[:, ::-1]] * 2, 1)  # mirrored, so that tiles have no seams
    pixels = np.concatenate([row, row[::-1]] * 2)[:3000, :4000]
    noisy = pixels + np.random.default_rng(0).normal(0, 3, (3000, 4000, 1))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()


@pytest.fixture(scope="module", params=SIZES)
def photographs(request, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("china", "flower"):
        (folder / f"{name}.jpg").write_bytes(photograph(name, request.param))
    return sorted(folder.iterdir())


def ours(paths, training):
    """A function from a number to the prepared image of that draw."""
    images = ImageSet(paths, [0] * len(paths), PREPROCESS, training_crop(TrainConfig(scale=(0.08, 1.0))))

    def prepare(i):
        item = Draw(i % len(paths), i, 224) if training else i % len(paths)
        return PREPROCESS.normalize(images[item][0])

    return prepare


def torchvisions(paths, training, version):
    """The same of torchvision's transforms."""
    t = torchvision_module("transforms" if version == 1 else "transforms.v2")
    steps = [t.RandomResizedCrop(224), t.RandomHorizontalFlip()] if training else [t.Resize(256), t.CenterCrop(224)]
    to_tensor = [t.ToTensor()] if version == 1 else [t.PILToTensor(), t.ToDtype(torch.float32, scale=True)]
    transform = t.Compose([*steps, *to_tensor, t.Normalize(MEAN, STD)])

    def prepare(i):
        with open(paths[i % len(paths)], "rb") as file, Image.open(file) as image:
            return transform(image.convert("RGB"))

    return prepare


def differences(paths, interpolation):
    """Of the pixels of evaluation to those of a whole file resized in float32 and rounded, in levels of 255."""
    preprocess = Preprocess(224, interpolation=interpolation, crop_pct=0.875)
    found = []
    for i, path in enumerate(paths):
        pixels = read_image(path)
        size = [round(side * 256 / min(pixels.shape[1:])) for side in pixels.shape[1:]]
        x = F.interpolate(pixels.float()[None], size, mode=interpolation, antialias=True)[0].round().clamp(0, 255)
        top, left = ((side - 224) // 2 for side in size)
        prepared = ImageSet(paths, [0] * len(paths), preprocess)[i][0]
        found.append((prepared.float() - x[:, top : top + 224, left : left + 224]).abs())
    all_of_them = torch.stack(found)
    return {
        "largest": int(all_of_them.max()),
        "mean": round(all_of_them.mean().item(), 4),
        "share_over_1": round((all_of_them > 1).float().mean().item(), 6),
    }


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("step", ["training", "evaluation"])
def test_images_cpu(benchmark, photographs, step):
    if (problem := libraries.problem("torchvision")) is not None:
        benchmark.skipped = True
        pytest.skip(problem)
    torch.set_num_threads(1)
    keep_freed_memory()
    training, name = step == "training", photographs[0].parent.name[:-1]
    count = SIZES[name]
    others = {f"torchvision v{version}": torchvisions(photographs, training, version) for version in (1, 2)}
    prepare = ours(photographs, training)
    draws = iter(range(10**9))

    def several(prepare):
        for _ in range(count):
            prepare(next(draws))

    def milliseconds(prepare):
        started = time.process_time()
        several(prepare)
        return 1e3 * (time.process_time() - started) / count

    for each in (prepare, *others.values()):
        several(each)
    times, ratios = {each: [] for each in ("ours", *others)}, {other: [] for other in others}
    for i in range(PAIRS):
        for other, call in others.items():
            pair = {"ours": prepare, other: call}
            for each in list(pair)[:: 1 if i % 2 else -1]:  # either comes first in every second pair
                times[each].append(milliseconds(pair[each]))
            ratios[other].append(times["ours"][-1] / times[other][-1])
    benchmark.group = f"images {name} {step}"
    benchmark.pedantic(several, args=(prepare,), rounds=5, warmup_rounds=1)
    median, p20, p80 = quantiles(times["ours"])
    device = versions(torch.device("cpu")) | libraries.versions()
    benchmark.extra_info.update(
        kind="images",
        shape=name,
        step=step,
        variant="ours",
        timing="process",
        batch_size=1,
        dtype="uint8",
        file_mb=round(sum(path.stat().st_size for path in photographs) / len(photographs) / 1e6, 3),
        median_ms=median,
        p20_ms=p20,
        p80_ms=p80,
        images_per_s=1e3 / median,
        others_ms={other: quantiles(times[other])[0] for other in others},
        time_over={other: median_interval(ratios[other]) for other in others},
        load_average=os.getloadavg()[0],
        **(
            {} if training else {"differences": {how: differences(photographs, how) for how in ("bilinear", "bicubic")}}
        ),
        **device | {"device": f"one thread of {device['device']}"},
        date=datetime.now(timezone.utc).date().isoformat(),
    )
