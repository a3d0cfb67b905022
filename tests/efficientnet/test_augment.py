"""Augmentation by torchvision's transforms: of the image alone, between its bounds, with labels that follow."""

import pytest
import torch

from efficientnet.errors import InputError
from efficientnet.training.augment import mixing, training_crop, training_finish
from efficientnet.training.settings import TrainConfig

MEAN = (0.2, 0.4, 0.6)


def ramp(height=40, width=60):
    """uint8 [3, H, W] that tells rows and columns apart."""
    rows, columns = torch.arange(height).view(-1, 1).expand(height, width), torch.arange(width).expand(height, width)
    return torch.stack([rows, columns, rows + columns]).to(torch.uint8)


def test_crops_are_boxes_of_the_area_asked_for():
    torch.manual_seed(0)
    crop, image, areas, mirrored = training_crop(TrainConfig(scale=(0.2, 0.6), hflip=0.5)), ramp(), [], 0
    for _ in range(200):
        part = crop(image)
        rows, columns = part[0, :, 0].tolist(), part[1, 0].tolist()
        mirrored += columns != sorted(columns)
        assert rows == list(range(rows[0], rows[0] + len(rows)))
        assert sorted(columns) == list(range(min(columns), min(columns) + len(columns)))
        areas.append(len(rows) * len(columns) / (40 * 60))
    assert 0.17 < min(areas) < 0.25 and 0.55 < max(areas) < 0.65 and 70 < mirrored < 130
    assert training_crop(TrainConfig()) is None


def test_crops_are_distributed_as_torchvisions():
    """Height, width, and where the part begins, by their quantiles; in the image of a shape that often does not fit."""
    from efficientnet.data.torchvision_modules import torchvision_module

    for height, width, scale in ((375, 500, (0.08, 1.0)), (100, 300, (0.5, 1.0))):
        torch.manual_seed(0)
        crop = training_crop(TrainConfig(scale=scale))
        theirs = torchvision_module("transforms.v2").RandomResizedCrop(1, scale)
        drawn = [theirs.make_params([torch.empty(1, height, width)]) for _ in range(2000)]
        for key in ("height", "width", "top", "left"):
            ours = sorted(getattr(crop.draw(height, width), key) for _ in range(2000))
            other = sorted(box[key] for box in drawn)
            assert all(abs(ours[i] - other[i]) <= 0.03 * max(height, width) for i in range(100, 2000, 200)), key


@pytest.mark.parametrize("size, found", [((10, 500), (10, 13)), ((500, 10), (13, 10)), ((1, 3), (1, 1))])
def test_a_part_that_never_fits_in_is_the_middle(size, found):
    box = training_crop(TrainConfig(scale=(1.0, 1.0))).draw(*size)
    assert (box.height, box.width) == found
    assert (box.top, box.left) == tuple((side - part) // 2 for side, part in zip(size, found, strict=True))


def test_random_erasing_leaves_the_mean():
    torch.manual_seed(0)
    finish, image = training_finish(TrainConfig(reprob=0.5), MEAN), torch.full((3, 32, 32), 255, dtype=torch.uint8)
    erased = [finish(image) for _ in range(100)]
    changed = [picture for picture in erased if not torch.equal(picture, image)]
    assert 30 < len(changed) < 70
    for picture in changed:
        assert {tuple(pixel) for pixel in picture.flatten(1).T.tolist()} == {(255, 255, 255), (51, 102, 153)}


@pytest.mark.parametrize("aa", ["auto", "original", "v0", "rand", "rand-m9-n3", "rand-m9-mstd0.5-inc1"])
def test_policies_change_images_and_keep_their_kind(aa):
    torch.manual_seed(0)
    finish = training_finish(TrainConfig(aa=aa), MEAN)
    results = [finish(ramp()) for _ in range(10)]
    assert all(result.shape == (3, 40, 60) and result.dtype == torch.uint8 for result in results)
    assert sum(not torch.equal(result, ramp()) for result in results) >= 5


@pytest.mark.parametrize("aa", ["augmix", "rand-m11", "rand-n0", "rand-m"])
def test_an_unknown_policy_is_named(aa):
    with pytest.raises(InputError, match=f"aa must be auto or rand.* got '{aa}'"):
        training_finish(TrainConfig(aa=aa), MEAN)


@pytest.mark.parametrize("settings", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}])
def test_mixed_labels_are_the_shares_of_the_images(settings):
    """Image i is the number i everywhere, of class i: the labels must be what the pixels are made of."""
    torch.manual_seed(0)
    mix = mixing(TrainConfig(**settings), 4)
    images, labels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 64, 64).clone(), torch.arange(4)
    for _ in range(10):
        mixed, probabilities = mix(images, labels)
        assert probabilities.shape == (4, 4)
        torch.testing.assert_close(probabilities.sum(1), torch.ones(4))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), probabilities @ torch.arange(4.0), rtol=1e-4, atol=1e-4)
    assert mixing(TrainConfig(), 4) is None
