"""A PNG of small images, each with what a model says of it."""

import os
from pathlib import Path

import torch

from efficientnet.errors import InputError
from efficientnet.files import replacing

CELL, MARGIN, LINE = 160, 8, 14  # pixels: side of an image, space between cells, height of a line of text


class ContactSheet:
    """Rows of ``columns`` cells, each an image with up to ``lines`` lines of text below it. A page is written as soon
    as it is full.

    The first page is ``path``, further ones are NAME-2.png, NAME-3.png and so on: any number of images takes the memory
    of one page.

    Raises InputError if ``path`` does not end in .png or its folder does not exist.
    """

    def __init__(self, path: str | os.PathLike, lines: int, columns: int = 8, rows: int = 12):
        self.path, self.lines, self.columns, self.rows = Path(path), lines, columns, rows
        self.cells: list[tuple[torch.Tensor | None, list[str]]] = []
        self.pages: list[Path] = []
        if self.path.suffix.lower() != ".png":
            raise InputError(f"contact_sheet must end in .png, got {str(path)!r}")
        if not self.path.parent.is_dir():
            raise InputError(f"contact_sheet {str(path)!r}: folder {str(self.path.parent)!r} does not exist")

    def add(self, image: torch.Tensor | None, *text: str) -> None:
        """Add a cell.

        Args:
            image: uint8 [3, H, W], or None for one that cannot be read.
            text: a line each.
        """
        self.cells.append((None if image is None else _thumbnail(image), list(map(_drawable, text))))
        if len(self.cells) == self.columns * self.rows:
            self.close()

    def close(self) -> None:
        """Write the page that was begun, if any."""
        if not self.cells:
            return
        number = len(self.pages) + 1
        page = self.path if number == 1 else self.path.with_stem(f"{self.path.stem}-{number}")
        with replacing(page) as temporary:
            self._draw().save(temporary, "PNG")
        self.pages.append(page)
        self.cells = []

    def _draw(self):
        from PIL import Image, ImageDraw

        columns = min(self.columns, len(self.cells))
        rows = -(-len(self.cells) // columns)
        width, height = CELL + MARGIN, CELL + LINE * self.lines + MARGIN
        sheet = Image.new("RGB", (MARGIN + columns * width, MARGIN + rows * height), "white")
        draw, font = ImageDraw.Draw(sheet), _font()
        for i, (image, text) in enumerate(self.cells):
            x, y = MARGIN + i % columns * width, MARGIN + i // columns * height
            if image is None:
                draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill="lightgrey")
            else:
                sheet.paste(image, (x + (CELL - image.width) // 2, y + (CELL - image.height) // 2))
            for line, words in enumerate(text[: self.lines]):
                draw.text(
                    (x, y + CELL + LINE * line),
                    _fitting(words, font),
                    fill="dimgrey" if line == 0 else "black",
                    font=font,
                )
        return sheet


def _drawable(text):
    """A file's name may have what no font draws, bytes that are no text, and line ends."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _thumbnail(image):
    from PIL import Image, ImageOps

    return ImageOps.contain(
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), (CELL, CELL), Image.Resampling.BICUBIC
    )


def _font():
    """Matplotlib's own font: Pillow's knows Latin letters only."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), LINE - 3)


def _fitting(words, font):
    """The end of ``words`` that fits below an image; of a path the end tells most."""
    if font.getlength(words) <= CELL:
        return words
    while words and font.getlength(f"\N{HORIZONTAL ELLIPSIS}{words}") > CELL:
        words = words[1:]
    return f"\N{HORIZONTAL ELLIPSIS}{words}"
