"""What a training run depends on. No torch here: the command line reads its defaults from this file."""

import math
from dataclasses import dataclass

AMP = ("none", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")


class InputError(ValueError):
    """What the user gave cannot be used; the message says what, and what can."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything a training run depends on. The defaults are tuned for ``data="digits"`` on two CPU cores.

    The optimizer is AdamW (no decay on biases and BatchNorm), its learning rate a linear warm-up and then a half cosine to zero.

    Args:
        img_size: pixels; None: 32 for the digits, the model's own size for image folders.
        amp: autocast to "bf16" or "fp16" (with loss scaling), or "none".
        resume: a ``last.train.pt`` to continue from; the other fields should be those of the run that wrote it, and then the
            result is that of the run had it never stopped (on one machine, with deterministic operators).
        drop_rate, drop_path_rate: as ``create_model``.

    Raises InputError (a ValueError) naming the field, its value and what is accepted.
    """

    data: str = "digits"
    model: str = "efficientnet_b0"
    img_size: int | None = None
    epochs: int = 10
    batch_size: int = 64
    lr: float = 6e-3
    weight_decay: float = 0.01
    warmup_epochs: float = 2.0
    label_smoothing: float = 0.1
    drop_rate: float | None = None
    drop_path_rate: float | None = None
    seed: int = 0
    device: str = "auto"
    amp: str = "none"
    fused: bool = True
    channels_last: bool = True
    num_workers: int = 0
    val_fraction: float = 0.2
    output: str = "runs/train"
    resume: str | None = None
    tensorboard: bool = False

    def __post_init__(self):
        def check(field, accepted, ok):
            if not ok:
                raise InputError(f"{field} must be {accepted}, got {getattr(self, field)!r}")

        for field, minimum in (("epochs", 1), ("batch_size", 2), ("seed", 0), ("num_workers", 0)):
            value = getattr(self, field)
            check(field, f"an integer >= {minimum}", isinstance(value, int) and not isinstance(value, bool) and value >= minimum)
        check("lr", "a finite number > 0", 0 < self.lr < math.inf)
        for field in ("weight_decay", "warmup_epochs"):
            check(field, "a finite number >= 0", 0 <= getattr(self, field) < math.inf)
        check("label_smoothing", "in [0, 1)", 0 <= self.label_smoothing < 1)
        check("amp", f"one of {', '.join(AMP)}", self.amp in AMP)
