"""How an image file becomes pixels: opening it, which part of it is decoded and at which scale, and its channels."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import torch

from efficientnet.choices import DECODERS, MAX_PIXELS
from efficientnet.data.torchvision_modules import torchvision_module
from efficientnet.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's mode of images with so many channels
# A JPEG file is decoded at a half, a quarter or an eighth of its size, by smaller inverse cosine transforms, where each
# pixel of the result still averages so many in each direction. docs/data.md has the differences that this makes.
DETAIL = 5
# What Pillow calls the turn that undoes an EXIF orientation; those from 5 on swap height and width.
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM"}
TURNS |= {5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}

_limits = {"pixels": MAX_PIXELS}


def allow_pixels(limit: int) -> None:
    """Let this process, and those forked from it, read files of up to ``limit`` pixels."""
    _limits["pixels"] = limit


_decoder = {"device": torch.device("cpu")}


def decoding_device() -> torch.device:
    """Where the pixels of files are, after they are decoded."""
    return _decoder["device"]


def decode_with(decoder: str, device: torch.device, num_workers: int) -> None:
    """Let this process decode JPEG files by Pillow ("cpu"), or by nvJPEG on the GPU ``device`` ("cuda").

    Raises InputError where that cannot be: for another decoder, a device that is no GPU, data workers, which cannot use
    their parent's GPU, and a torchvision without its compiled decoders.
    """
    if decoder not in DECODERS:
        raise InputError(f"decode must be one of {', '.join(DECODERS)}, got {decoder!r}")
    _decoder["device"] = torch.device("cpu")
    if decoder == "cpu":
        return
    if device.type != "cuda":
        raise InputError("decode 'cuda' needs a CUDA device, and the device is a CPU; accepted here: cpu")
    if num_workers:
        raise InputError(
            f"decode 'cuda' runs in the process that has the GPU: num_workers must be 0, got {num_workers}"
        )
    if (problem := _nvjpeg_problem(device)) is not None:
        raise InputError(f"decode 'cuda' is not available: {problem}; accepted here: cpu")
    _decoder["device"] = device


def _nvjpeg_problem(device):
    """Why torchvision cannot decode JPEG files on the GPU, or None; by decoding one."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    torchvision_module("io")
    if not hasattr(torch.ops.image, "decode_jpegs_cuda"):
        return f"torchvision has no compiled decoders that fit torch {torch.__version__}"
    try:
        _nvjpeg(file.getvalue(), device)
    except RuntimeError as error:  # built without nvJPEG, or a driver that does not fit
        return str(error).splitlines()[0]
    return None


def _nvjpeg(content, device):
    """The bytes of a JPEG file -> uint8 [3, H, W] on the GPU."""
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return torchvision_module("io").decode_jpeg(encoded, mode="RGB", device=device)


def turned(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """[C, H, W] as a camera was held that wrote this EXIF orientation, from 1 to 8."""
    pixels = pixels.transpose(1, 2) if orientation >= 5 else pixels
    dims = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation, [])
    return pixels.flip(dims) if dims else pixels


class Box(NamedTuple):
    """A part of an image, in pixels, to be mirrored from left to right or not."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool = False

    @classmethod
    def whole(cls, image: "torch.Tensor | Picture") -> "Box":
        """All of an image [C, H, W]."""
        return cls(0, 0, *image.shape[1:])

    def of(self, image: torch.Tensor) -> torch.Tensor:
        """The part of [C, H, W], not yet mirrored."""
        return image[:, self.top : self.top + self.height, self.left : self.left + self.width]


class Picture:
    """An image file that is open, and not decoded before somebody wants a part of it.

    ``shape`` is that of the pixels, (channels, height, width), as the camera was held (EXIF orientation).

    Args:
        file: a path, or an open binary file.
        name: what an error calls it.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).

    Raises InputError naming a file that is no image, is damaged or has more pixels than are allowed.
    """

    def __init__(self, file: str | os.PathLike | BinaryIO, name: object, channels: int = 3):
        self._file, self._name, self._channels, self._image = file, name, channels, None
        with self._decoding() as Image:
            self._image = Image.open(file)
            height, width = self._image.height, self._image.width
            if width * height > _limits["pixels"]:
                raise ValueError(f"{width} x {height} pixels, more than {_limits['pixels']}; --max-pixels allows more")
            if not self._scales:  # a decoder may find another size than the header has
                self._image.load()
                height, width = self._image.height, self._image.width
            self._orientation = _orientation(self._image)
        self.shape = (channels, *((width, height) if self._orientation >= 5 else (height, width)))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._image is not None:
            self._image.close()

    @property
    def _scales(self):
        return self._image.format in ("JPEG", "MPO")

    def part(
        self, box: Box | None = None, size: tuple[int, int] | None = None, interpolation: str = "bilinear"
    ) -> torch.Tensor:
        """uint8 [channels, H, W] of the ``box``, or of the whole image, not mirrored. It can be asked for once.

        Args:
            size: (height, width) to which the caller is going to resize it. Where that is far smaller, a JPEG file is
                decoded at a smaller scale and resized here, to this size, by ``interpolation``.
        """
        box = box or Box.whole(self)
        with self._decoding() as Image:
            if (device := decoding_device()).type != "cpu":
                return box.of(self._on(device))
            image, scale = self._image, self._scale(box, size)
            if scale > 1 and image.draft(None, (image.width // scale, image.height // scale)) is None:
                scale = 1  # a file of a kind that its decoder cannot scale
            if self._orientation != 1:
                image = image.transpose(getattr(Image.Transpose, TURNS[self._orientation]))
            left, top = box.left // scale, box.top // scale
            right, bottom = -(-(box.left + box.width) // scale), -(-(box.top + box.height) // scale)
            if (left, top, right, bottom) != (0, 0, *image.size):
                image = image.crop((left, top, right, bottom))
            if scale > 1:  # the box may begin and end within a pixel
                x, y = box.left / scale - left, box.top / scale - top
                inside = (x, y, x + box.width / scale, y + box.height / scale)
                resample = getattr(Image.Resampling, interpolation.upper())
                image = _converted(image, self._channels).resize(size[::-1], resample, inside)
            return to_channels(image, self._channels)

    def _on(self, device):
        """All pixels, on the GPU: of a grey or RGB JPEG file decoded there, of others by Pillow."""
        if not (self._scales and self._channels == 3 and self._image.mode in ("L", "RGB")):
            pixels = to_channels(self._image, self._channels).to(device)
        elif isinstance(self._file, (str, os.PathLike)):
            pixels = _nvjpeg(Path(self._file).read_bytes(), device)
        else:
            self._file.seek(0)
            pixels = _nvjpeg(self._file.read(), device)
        return turned(pixels, self._orientation)

    def _scale(self, box, size):
        """How many times smaller the image is decoded. A size that this does not divide would end in a pixel that is
        partly outside.
        """
        scale = 1
        if size is None or not self._scales:
            return scale
        shortest = min(box.height / size[0], box.width / size[1])
        while scale < 8 and shortest >= DETAIL * 2 * scale and not any(side % (2 * scale) for side in self.shape[1:]):
            scale *= 2
        return scale

    @contextmanager
    def _decoding(self) -> Iterator[ModuleType]:
        """Pillow's module Image. Within, its limit of pixels gives way to ours, and what a decoder raises becomes an
        InputError that names the file, which is closed.
        """
        from PIL import Image

        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield Image
        except (FileNotFoundError, IsADirectoryError, PermissionError):
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
            self.close()
            detail = str(error).replace(repr(self._file), "")  # of an open file that is an address
            raise InputError(
                f"cannot decode image {str(self._name)!r} ({type(error).__name__}: {detail.strip()})"
            ) from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def read_image(path: str | os.PathLike, channels: int = 3) -> torch.Tensor:
    """Decode an image file with Pillow: uint8 [channels, H, W], grey, RGB or RGBA, as a camera held it (EXIF
    orientation).

    Raises InputError naming a file that is no image, is damaged or has more pixels than are allowed.
    """
    with Picture(path, path, channels) as picture:
        return picture.part().cpu()


def _orientation(image):
    """How the camera was held, by an image's EXIF data: 1, or one of TURNS. Damaged data say nothing."""
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # of many classes, as decoders'
        return 1
    return found if found in TURNS else 1


def _converted(image, channels):
    """The image in the mode of so many channels: itself where it has it."""
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def to_channels(image: "Image.Image", channels: int = 3) -> torch.Tensor:
    """An image of Pillow in any mode -> uint8 [channels, H, W]. 16-bit pixels become 8-bit ones; Pillow
    would clip them at 255.
    """
    import numpy as np

    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return with_channels(torch.from_numpy(grey.astype(np.uint8))[None], channels)
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of an unknown range")
    pixels = torch.from_numpy(np.array(_converted(image, channels)))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)


def with_channels(image: torch.Tensor, channels: int) -> torch.Tensor:
    """uint8 [1 or 3, H, W] -> uint8 [channels, H, W], as Pillow converts: grey by luminance, an opacity of 255."""
    if len(image) == channels:
        return image
    if len(image) == 3 and channels == 1:
        red, green, blue = image.to(torch.int32)
        return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[None]
    colours = image.expand(3, -1, -1)
    return colours if channels == 3 else torch.cat([colours, torch.full_like(colours[:1], 255)])
