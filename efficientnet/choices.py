"""Values that both the settings of a run and other commands accept. No torch here: the command line is made from
them.
"""

AMP = ("none", "bf16", "fp16")  # autocast, and its dtype
DEVICES = ("auto", "cpu", "cuda")
DECODERS = ("cpu", "cuda")  # of JPEG files: Pillow, or nvJPEG on the GPU
MAX_PIXELS = 178_956_970  # of an image file: more is an error, as Pillow has it
INTERPOLATIONS = ("bilinear", "bicubic")  # of images that are resized


def image_size(value: object) -> int | tuple[int, int]:
    """Pixels of the images that a model sees: an integer for squares, or (height, width), which a file or a recipe has
    as a list, and a command line as "HxW". Squares are always an integer.

    Raises ValueError for anything else.
    """
    sides = value.replace("X", "x").split("x") if isinstance(value, str) else value
    sides = list(sides) if isinstance(sides, list | tuple) else [sides]
    if isinstance(value, str):
        sides = [int(side) if side.isascii() and side.isdigit() else side for side in sides]
    if len(sides) not in (1, 2) or not all(type(side) is int and side >= 1 for side in sides):
        raise ValueError(f"img_size must be an integer >= 1 or two, height and width, got {value!r}")
    return sides[0] if len(set(sides)) == 1 else tuple(sides)


def height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Of an ``image_size``."""
    return size if isinstance(size, tuple) else (size, size)
