"""What is decoded of a file, and how: only a part, at a smaller scale, resized in uint8. The result must be that of all
of its pixels.
"""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image

from efficientnet.data import decoding
from efficientnet.data.decoding import Box, Picture, decode_with, decoding_device, read_image
from efficientnet.data.images import Prepared, Preprocess, drawing_from
from efficientnet.data.sets import CropFlip
from efficientnet.errors import InputError
from efficientnet.training.augment import training_crop
from efficientnet.training.settings import TrainConfig

CROPS = {"folder": CropFlip(), "area": training_crop(TrainConfig(scale=(0.1, 1.0)))}


@pytest.fixture(scope="module")
def photograph():
    """A photograph of 1280 x 848 pixels that are as soft as a large camera's."""
    return Image.fromarray(load_sample_image("china.jpg")).resize((1280, 848), Image.Resampling.BICUBIC)


def saved(image, path, orientation=1, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, **options)
    return path


def exact(image, size, interpolation, crop=None):
    """Resized in float64, and cut: what rounding starts from."""
    x = F.interpolate(image.double()[None], size, mode=interpolation, antialias=True)[0].clamp(0, 255)
    top, left = ((n - wants) // 2 for n, wants in zip(size, crop or size, strict=True))
    return x[:, top : top + (crop or size)[0], left : left + (crop or size)[1]]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("layout", ["decoded", "NCHW", "part"])
@pytest.mark.parametrize("kind", ["photograph", "noise"])
def test_resizing_in_uint8(photograph, channels, layout, kind):
    """Bilinear within two roundings of the exact result, bicubic no further from it than Pillow, which rounds twice
    too.
    """
    pixels = np.asarray(photograph.convert(decoding.MODES[channels]))
    if kind == "noise":
        pixels = np.random.default_rng(0).integers(0, 256, (300, 420, channels), dtype=np.uint8)
    pixels = np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], channels)[:300, :420])
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    image = image.contiguous() if layout == "NCHW" else image[:, 7:290, 5:401] if layout == "part" else image
    for size in ((64, 96), (224, 224), (400, 600)):
        for interpolation in ("bilinear", "bicubic"):
            found = Preprocess(size, (0.5,) * channels, (0.5,) * channels, interpolation).pixels(image)
            height, width = image.shape[1:]
            scale = max(size[0] / height, size[1] / width)
            whole = [max(n, round(side * scale)) for n, side in zip(size, (height, width), strict=True)]
            truth = exact(image, whole, interpolation, size)
            difference = (found - truth).abs().max().item()
            if interpolation == "bilinear":
                assert difference <= 1.01, "a half for each of two roundings; weights have 16 bits"
            else:
                planes = [Image.fromarray(plane.numpy()).resize(whole[::-1], Image.BICUBIC) for plane in image]
                pillow = exact(torch.from_numpy(np.stack(planes)), whole, "bilinear", size)  # only cut
                assert difference <= (pillow - truth).abs().max().item() + 1


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_crop_of_a_file_is_a_crop_of_its_pixels(tmp_path, photograph, crop, mode, channels):
    """Whether it is cut out before it is decoded or after; for every draw, in every mode."""
    small = photograph.resize((97, 61))
    if mode == "I;16":
        levels = np.asarray(small.convert("L")).astype(np.uint16) * 257
        small = Image.fromarray(levels)
    else:
        small = small.convert(mode)
    path = tmp_path / ("x.tif" if mode in ("CMYK", "LA") else "x.png")
    small.save(path)
    preprocess = Preprocess(24).of_channels(channels)
    prepared = Prepared(preprocess, CROPS[crop])
    image = read_image(path, channels)
    for seed in range(4):
        with drawing_from(f"{seed}"), Picture(path, path, channels) as picture:
            found = prepared.augmented(picture, 24)
        with drawing_from(f"{seed}"):
            assert torch.equal(found, prepared.augmented(image, 24))
        with drawing_from(f"{seed}"):
            whole = preprocess.pixels(CROPS[crop](image), crop_pct=1.0)
        assert (found.float() - whole.float()).abs().max() <= 1, "mirrored before or after it is resized"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_crops_of_turned_files(tmp_path, photograph, orientation, kind):
    path = saved(photograph.resize((96, 64)), tmp_path / "x", orientation, format=kind)
    image, seen = read_image(path), set()
    for seed in range(5):
        with drawing_from(f"{seed}"), Picture(path, path) as picture:
            assert picture.shape == tuple(image.shape) == ((3, 96, 64) if orientation >= 5 else (3, 64, 96))
            found = Prepared(Preprocess(16), CROPS["area"]).augmented(picture, 16)
        with drawing_from(f"{seed}"):
            assert torch.equal(found, Prepared(Preprocess(16), CROPS["area"]).augmented(image, 16))
        seen.add(found.sum().item())
    assert len(seen) == 5


@pytest.fixture
def scales(monkeypatch):
    """The scales at which files are decoded in a test."""
    found, scale = [], Picture._scale
    monkeypatch.setattr(Picture, "_scale", lambda self, *args: found.append(scale(self, *args)) or found[-1])
    return found


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size, expected", [(84, 2), (42, 4), (21, 8), (85, 1)])
def test_a_large_jpeg_is_decoded_at_a_smaller_scale(
    tmp_path, photograph, scales, size, expected, interpolation, orientation
):
    """848 pixels become 84: each is the mean of ten, of five at half the scale. The differences are those of
    rounding.
    """
    path = saved(photograph, tmp_path / "x.jpg", orientation, quality=92)
    prepare = Preprocess(size, interpolation=interpolation)
    image = read_image(path)
    with Picture(path, path) as picture:
        found = prepare.pixels(picture)
    assert scales == [1, expected]
    height, width = image.shape[1:]
    whole = [round(side * size / 848) for side in (height, width)]
    difference = (found - exact(image, whole, interpolation, (size, size))).abs()
    assert difference.mean() < 0.4 and difference.max() < (2.6 if interpolation == "bilinear" else 4)
    box = Box(*((1, 301, 846, 844) if height < width else (301, 1, 844, 846)), mirrored=True)
    with Picture(path, path) as picture:
        found = prepare.pixels(picture, box=box)
    difference = (found.float() - prepare.pixels(image, box=box).float()).abs()
    assert difference.mean() < 0.4 and difference.max() <= 10, "a part that begins between two of the decoded pixels"
    if expected > 1:
        assert 0 < difference[:, 1:-1, 1:-1].max() <= 4, "only its border is made of other pixels"


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_kinds_of_jpeg_at_a_smaller_scale(tmp_path, photograph, scales, mode, channels):
    path = saved(photograph.convert(mode), tmp_path / "x.jpg", quality=92)
    prepare = Preprocess((32, 48)).of_channels(channels)
    with Picture(path, path, channels) as picture:
        found = prepare.pixels(picture)
    assert scales == [4] and found.shape == (channels, 32, 48)
    assert (found.float() - prepare.pixels(read_image(path, channels)).float()).abs().max() <= 4


def test_odd_sizes_are_decoded_whole(tmp_path, photograph, scales):
    """At half the scale their last column would be a column and nothing."""
    path = saved(photograph.crop((0, 0, 1279, 848)), tmp_path / "x.jpg")
    with Picture(path, path) as picture:
        found = Preprocess(64).pixels(picture)
    assert scales == [1]
    assert torch.equal(found, Preprocess(64).pixels(read_image(path)))


def test_other_formats_are_decoded_whole(tmp_path, photograph, scales):
    path = saved(photograph, tmp_path / "x.png", compress_level=1)
    with Picture(path, path) as picture:
        found = Preprocess(64).pixels(picture)
    assert scales == [1] and torch.equal(found, Preprocess(64).pixels(read_image(path)))


def test_pillows_own_limit_of_pixels_gives_way(tmp_path, photograph, monkeypatch):
    """Also where a part is cut out, which Pillow refuses beyond twice its limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = saved(photograph, tmp_path / "x.jpg")
    with Picture(path, path) as picture:
        assert picture.part(Box(1, 1, 800, 1200)).shape == (3, 800, 1200)
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.fixture
def nvjpeg(monkeypatch):
    """The files that a GPU would decode; Pillow takes its place, and the CPU's memory."""
    files = []

    def decode(content, device):
        files.append(content)
        image = Image.open(io.BytesIO(content)).convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    monkeypatch.setattr(decoding, "_nvjpeg", decode)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: self)
    monkeypatch.setitem(decoding._decoder, "device", torch.device("cuda"))
    return files


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_that_a_gpu_decodes_are_turned_and_cut(tmp_path, photograph, nvjpeg, orientation):
    small = photograph.resize((96, 64))
    path, box = saved(small, tmp_path / "x.jpg", orientation), Box(3, 5, 40, 30)
    other = saved(small, tmp_path / "x.png", orientation)
    for file, same, found in ((path, path, 1), (io.BytesIO(path.read_bytes()), path, 2), (other, other, 2)):
        with Picture(file, "x") as picture:
            part = picture.part(box)
        assert len(nvjpeg) == found, "PNG files are Pillow's"
        decoding._decoder["device"] = torch.device("cpu")
        assert torch.equal(part, box.of(read_image(same)))
        decoding._decoder["device"] = torch.device("cuda")


def test_kinds_of_jpeg_that_a_gpu_leaves_to_pillow(tmp_path, photograph, nvjpeg):
    small = photograph.resize((40, 30))
    for mode, channels in (("CMYK", 3), ("RGB", 1), ("RGB", 4)):
        path = saved(small.convert(mode), tmp_path / f"{mode}.jpg")
        with Picture(path, path, channels) as picture:
            assert picture.part().shape == (channels, 30, 40)
    assert nvjpeg == []


@pytest.mark.parametrize(
    "decoder, device, workers, message",
    [
        ("cuda", "cpu", 0, "decode 'cuda' needs a CUDA device, and the device is a CPU; accepted here: cpu"),
        ("cuda", "cuda", 2, "the process that has the GPU: num_workers must be 0, got 2"),
        ("nvjpeg", "cuda", 0, "decode must be one of cpu, cuda, got 'nvjpeg'"),
    ],
)
def test_a_decoder_that_cannot_be(decoder, device, workers, message):
    with pytest.raises(InputError, match=message):
        decode_with(decoder, torch.device(device), workers)
    assert decoding_device() == torch.device("cpu")


def test_a_torchvision_that_cannot_decode_on_a_gpu(monkeypatch):
    """Without its compiled decoders, and with some that were built without nvJPEG, or do not fit the driver."""
    operators = SimpleNamespace(image=SimpleNamespace())
    monkeypatch.setattr(torch, "ops", operators)
    monkeypatch.setattr(decoding, "torchvision_module", lambda name: None)
    with pytest.raises(InputError, match="decode 'cuda' is not available: torchvision has no compiled decoders that"):
        decode_with("cuda", torch.device("cuda"), 0)
    operators.image.decode_jpegs_cuda = None
    monkeypatch.setattr(decoding, "_nvjpeg", lambda *args: (_ for _ in ()).throw(RuntimeError("no nvJPEG\nat 0x1")))
    with pytest.raises(InputError, match="is not available: no nvJPEG; accepted here: cpu"):
        decode_with("cuda", torch.device("cuda"), 0)
    assert decoding_device() == torch.device("cpu")
    monkeypatch.setattr(decoding, "_nvjpeg", lambda *args: None)
    decode_with("cuda", torch.device("cuda", 1), 0)
    assert decoding_device() == torch.device("cuda", 1)
    decode_with("cpu", torch.device("cuda"), 4)
    assert decoding_device() == torch.device("cpu")


@pytest.mark.parametrize(
    "command", ["train --data {0}", "validate --data {0} --checkpoint {1}", "predict {0} --checkpoint {1}"]
)
def test_commands_without_a_gpu_say_so(run, trained, image_folder, tmp_path, command):
    folder = image_folder if command.startswith("predict") else f"imagefolder:{image_folder}"
    argv = command.format(folder, trained[1] / "best.safetensors").split()
    if argv[0] == "train":
        argv += ["--output", str(tmp_path / "out")]
    code, _, err = run(*argv, "--decode", "cuda", "--device", "cpu")
    assert (code, err.count("\n")) == (2, 1) and "decode 'cuda' needs a CUDA device" in err
    assert not (tmp_path / "out").exists()


def test_a_truncated_jpeg_is_named_at_every_scale(photograph, scales):
    whole = io.BytesIO()
    photograph.save(whole, "JPEG")
    for size in (32, 500):
        with Picture(io.BytesIO(whole.getvalue()[:-2000]), "x.jpg") as picture:
            assert picture.shape == (3, 848, 1280), "the header is whole"
            with pytest.raises(InputError, match=r"cannot decode image 'x.jpg' \(OSError: image file is truncated"):
                Preprocess(size).pixels(picture)
    assert scales == [4, 1]
