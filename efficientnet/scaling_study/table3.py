"""What the paper reports of compound scaling on other networks: Table 3 of Tan & Le, arXiv 1905.11946v5."""

from typing import NamedTuple


class PaperRow(NamedTuple):
    """A row of the paper's Table 3: what was scaled, by how much, multiply-accumulates (in 1e9), ImageNet top-1 (in
    %).
    """

    what: str
    depth: float
    width: float
    resolution: float
    gmacs: float
    top1: float


# The FLOPs of the table are multiply-accumulates. It gives no numbers of parameters, and it gives the multipliers of a
# compound row only for MobileNetV1; those of the other two are taken to be the same.
TABLE_3 = {
    "mobilenet_v1": (
        PaperRow("baseline", 1, 1, 1, 0.6, 70.6),
        PaperRow("width", 1, 2, 1, 2.2, 74.2),
        PaperRow("resolution", 1, 1, 2, 2.2, 72.7),
        PaperRow("compound", 1.4, 1.2, 1.3, 2.3, 75.6),
    ),
    "mobilenet_v2": (
        PaperRow("baseline", 1, 1, 1, 0.3, 72.0),
        PaperRow("depth", 4, 1, 1, 1.2, 76.8),
        PaperRow("width", 1, 2, 1, 1.1, 76.4),
        PaperRow("resolution", 1, 1, 2, 1.2, 74.8),
        PaperRow("compound", 1.4, 1.2, 1.3, 1.3, 77.4),
    ),
    "resnet50": (
        PaperRow("baseline", 1, 1, 1, 4.1, 76.0),
        PaperRow("depth", 4, 1, 1, 16.2, 78.1),
        PaperRow("width", 1, 2, 1, 14.7, 77.7),
        PaperRow("resolution", 1, 1, 2, 16.4, 77.5),
        PaperRow("compound", 1.4, 1.2, 1.3, 16.7, 78.8),
    ),
}
