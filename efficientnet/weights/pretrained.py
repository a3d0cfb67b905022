"""Published weights by name: where they are, how their images are prepared, and how a file is fetched into a cache."""

import hashlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from efficientnet.model.config import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from torch import nn
    from torchvision import transforms

IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # AdvProp's and timm's later recipes
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# A name with one of them is meant as a file.
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".tar", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class WeightSet:
    """Weights of timm's collection on the Hugging Face Hub. ``crop_pct`` is the share of the shorter side that the crop
    keeps.
    """

    model: str
    tag: str
    img_size: int
    crop_pct: float
    norm: tuple = IMAGENET
    num_classes: int = 1000
    crop_mode: str = "center"

    @property
    def hub_id(self) -> str:
        """The repository on the Hub."""
        return f"timm/{self.model}.{self.tag}"

    @property
    def cfg(self) -> dict:
        """How images are prepared, under timm's keys."""
        mean, std = self.norm
        return {
            "architecture": self.model,
            "tag": self.tag,
            "hf_hub_id": self.hub_id,
            "num_classes": self.num_classes,
            "input_size": (3, self.img_size, self.img_size),
            "interpolation": "bicubic",
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
            "mean": mean,
            "std": std,
            "first_conv": "conv_stem",
            "classifier": "classifier",
        }


def _tensorflow_sets():
    """Google's releases: baseline, AutoAugment, RandAugment, AdvProp, Noisy Student."""
    sizes = {
        "b0": (224, 0.875),
        "b1": (240, 0.882),
        "b2": (260, 0.89),
        "b3": (300, 0.904),
        "b4": (380, 0.922),
        "b5": (456, 0.934),
    }
    sizes |= {"b6": (528, 0.942), "b7": (600, 0.949), "b8": (672, 0.954)}
    tags = {
        variant: ["ns_jft_in1k", "aa_in1k", "ap_in1k"] + (["in1k"] if variant <= "b5" else [])
        for variant in sizes
        if variant != "b8"
    }
    tags["b5"].append("ra_in1k")
    tags["b7"].append("ra_in1k")
    tags["b8"] = ["ap_in1k", "ra_in1k"]
    for variant, (size, crop) in sizes.items():
        for tag in tags[variant]:
            yield WeightSet(
                model=f"tf_efficientnet_{variant}",
                tag=tag,
                img_size=size,
                crop_pct=crop,
                norm=INCEPTION if tag == "ap_in1k" else IMAGENET,
            )


# The first of a model is its default.
WEIGHTS = (
    WeightSet("efficientnet_b0", "ra_in1k", 224, 0.875),
    WeightSet(model="efficientnet_b0", tag="ra4_e3600_r224_in1k", img_size=224, crop_pct=0.9, norm=INCEPTION),
    WeightSet(model="efficientnet_b1", tag="ra4_e3600_r240_in1k", img_size=240, crop_pct=0.9, norm=INCEPTION),
    WeightSet("efficientnet_b1", "ft_in1k", 224, 0.875),
    WeightSet("efficientnet_b2", "ra_in1k", 256, 0.875),
    WeightSet("efficientnet_b3", "ra2_in1k", 288, 0.875),
    WeightSet("efficientnet_b4", "ra2_in1k", 320, 0.875),
    WeightSet("efficientnet_b5", "sw_in12k_ft_in1k", 448, 1.0, crop_mode="squash"),
    WeightSet("efficientnet_b5", "sw_in12k", 416, 0.95, num_classes=11821),
    *_tensorflow_sets(),
    WeightSet("tf_efficientnet_l2", "ns_jft_in1k_475", 475, 0.936),
    WeightSet("tf_efficientnet_l2", "ns_jft_in1k", 800, 0.96),
)


def list_pretrained(model: str | None = None) -> list[str]:
    """ "MODEL.TAG" of every weight set, or of one model's, the default first."""
    return [f"{w.model}.{w.tag}" for w in WEIGHTS if model in (None, w.model)]


def resolve(model: str, pretrained: bool | str | os.PathLike) -> tuple[object, dict | None]:
    """(what ``load_checkpoint`` reads, preprocessing or None) for ``create_model(model, pretrained=...)``.

    Args:
        pretrained: True for the model's default set, a tag of one ("ra_in1k" or "efficientnet_b0.ra_in1k"), or a path,
            URL or Hub id.

    Raises ValueError that names the tags there are.
    """
    sets = {w.tag: w for w in WEIGHTS if w.model == model}
    if pretrained is True and sets:
        chosen = next(iter(sets.values()))
        return chosen.hub_id, chosen.cfg
    if isinstance(pretrained, str):
        tag = pretrained.removeprefix("hf-hub:").removeprefix(f"timm/{model}.").removeprefix(f"{model}.")
        if tag in sets and not Path(pretrained).is_file():
            return sets[tag].hub_id, sets[tag].cfg
    if pretrained is True or not _names_a_file(pretrained):
        tags = f"its tags: {', '.join(sets)}" if sets else "none is published: give a path, a URL or a Hub id"
        raise ValueError(f"pretrained weights {pretrained!r} of {model!r} are not known; {tags}")
    return pretrained, None


def _names_a_file(source):
    text = os.fspath(source)
    return Path(text).is_file() or "/" in text or os.sep in text or Path(text).suffix.lower() in SUFFIXES


def transform(source: "str | dict | nn.Module") -> "transforms.Compose":
    """The evaluation transform of a model, of a ``pretrained_cfg``, or of a weight set ("efficientnet_b0.ra_in1k").

    It is a ``torchvision.transforms.Compose`` from a PIL image to float32 [3, H, W]: the shorter side is resized to
    ``floor(size / crop_pct)`` (in crop mode "squash" both sides are), then come the centre crop, scaling to [0, 1] and
    normalisation.
    """
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    if isinstance(source, str):
        cfg = next((w.cfg for w in WEIGHTS if f"{w.model}.{w.tag}" == source), None)
        if cfg is None:
            raise ValueError(f"unknown weight set {source!r}; known: {', '.join(list_pretrained())}")
    else:
        cfg = source if isinstance(source, dict) else source.pretrained_cfg
    size = tuple(cfg["input_size"][1:])
    resized = tuple(math.floor(n / cfg["crop_pct"]) for n in size)
    squash = cfg.get("crop_mode", "center") == "squash"
    return transforms.Compose(
        [
            transforms.Resize(resized if squash else min(resized), InterpolationMode(cfg["interpolation"])),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(cfg["mean"], cfg["std"]),
        ]
    )


def fetch(source: str | os.PathLike) -> Path:
    """The local file of ``source``.

    A path stays as it is. A URL or Hub id ("owner/name", "hf-hub:owner/name@revision") is fetched once: Hub files go
    where huggingface_hub keeps them (HF_HOME; HF_HUB_OFFLINE=1 takes only what is there), others to torch.hub's cache.

    Raises ConnectionError with the cause and the cache path that was looked in, ModuleNotFoundError without
    huggingface_hub.
    """
    text = os.fspath(source)
    if re.match(r"https?://", text):
        return _from_url(text)
    hub_id = re.fullmatch(r"(hf-hub:)?([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", text)
    if hub_id and (hub_id[1] or _like_hub_id(text)):
        return _from_hub(hub_id[2], hub_id[3])
    return Path(source).expanduser()


def _like_hub_id(text):
    path = Path(text)
    return not (text[0] in "./~" or path.exists() or path.parent.is_dir() or path.suffix.lower() in SUFFIXES)


def _from_url(url):
    import torch

    name = Path(url.partition("?")[0].partition("#")[0]).name
    digest = re.search(r"-([0-9a-f]{8,})\.", name)  # torch.hub's custom: the file's SHA-256 is in its name
    if not digest:
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"  # two places may have files of one name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), digest and digest[1], progress=False)
        # OSError covers urllib's errors; a RuntimeError says that the digest is another.
        except (OSError, ValueError, RuntimeError) as error:
            raise ConnectionError(
                f"cannot fetch {url!r} ({error}), and it is not in the cache as {str(path)!r}"
            ) from error
    return path


def _from_hub(repo, revision=None):
    from huggingface_hub import HfApi, constants, hf_hub_download

    cause, names = None, []
    try:  # one request: where there is no connection, hf_hub_download would repeat its own for half a minute a file
        info = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        names = [sibling.rfilename for sibling in info.siblings or ()]
    except Exception as error:  # offline, no connection, no such repository, no right to it: of many classes
        cause = error
    for filename in HUB_FILES:
        if cause is None and filename not in names:
            continue
        try:
            return Path(hf_hub_download(repo, filename, revision=revision, local_files_only=not names))
        except Exception as error:  # not in the cache either, or a broken connection
            cause = cause or error
    cause = cause or f"its files are {', '.join(names[:5])}"
    cache = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    line = " ".join(str(cause).split())
    raise ConnectionError(
        f"cannot fetch {' or '.join(HUB_FILES)} of {repo!r} from the Hub ({line}), nor from the cache {str(cache)!r}; "
        "there is no such file here either"
    ) from (cause if isinstance(cause, Exception) else None)
