"""Checkpoints: our own, safetensors with all it takes to rebuild the model and prepare its images; and those of other
libraries.
"""

import argparse
import datetime
import decimal
import errno
import fractions
import json
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from efficientnet.choices import height_width, image_size
from efficientnet.files import replacing
from efficientnet.model.config import EfficientNetConfig, StageConfig
from efficientnet.model.network import EfficientNet
from efficientnet.weights.layouts import (
    LAYOUTS,
    Layout,
    config_plan,
    conventions,
    guess_config,
    recognise,
    tidy,
    translate,
)
from efficientnet.weights.pretrained import fetch

METADATA_KEY = "efficientnet"
METADATA_SLOT = "__efficientnet__"  # in a torch file; no module has such a name
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
# The usual names of the weights among other things; "average" is that of this program's own training states.
EMA_WRAPPERS = (
    "average",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "model_ema_state_dict",
    "ema_model_state_dict",
    "ema_model",
)
EMA_WRAPPERS += ("ema", "module_ema", "model_averaged", "teacher", "teacher_state_dict")
WRAPPERS = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "net_state_dict",
    "network",
    "weights",
    "params",
    "module",
)
WRAPPERS += ("student", "student_state_dict", "backbone")
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")  # of what save_pretrained writes


def save_checkpoint(model: nn.Module, path: str | os.PathLike, **metadata) -> None:
    """Write the model's state_dict as safetensors, whole or not at all.

    Args:
        model: an ``EfficientNet`` describes itself in the metadata, so that ``load_checkpoint(None, path)`` can build
            it; of any other module only the weights are kept.
        metadata: JSON values to keep with the weights, such as ``classes``, ``preprocess``, ``epoch``.
    """
    from safetensors.torch import save

    if isinstance(model, EfficientNet):
        metadata = {**describe_model(model), **metadata}
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        # save_file would make a file that others cannot read.
        temporary.write_bytes(save(state, {METADATA_KEY: json.dumps(metadata)}))


def _write(state, path, metadata):
    """Write a state_dict and its metadata in the format of the path's suffix, whole or not at all."""
    state = {key: tensor.contiguous() for key, tensor in state.items()}
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            from safetensors.torch import save

            temporary.write_bytes(save(state, {METADATA_KEY: json.dumps(metadata)}))
        else:
            state = OrderedDict(state)
            # Where state_dict() keeps versions of modules: other libraries load the file as if nothing were there.
            state._metadata = OrderedDict({METADATA_SLOT: json.dumps(metadata)})
            torch.save(state, temporary)


def load_checkpoint(
    model: "nn.Module | str | None",
    source: str | os.PathLike,
    *,
    fused: bool = True,
    layout: str | None = None,
    padding: str | None = None,
    bn_eps: float | None = None,
    bn_momentum: float | None = None,
    use_ema: bool = True,
) -> nn.Module:
    """Load weights of any known layout strictly: every key present, none left over, every shape equal. Returns the
    model.

    Args:
        model: the module to load into; or a model's name, whose classes and input channels are read off the weights and
            whose padding and BatchNorm are those of the library that the weights come from; or None to build the model
            that the file describes (files from ``save_checkpoint`` and ``convert`` do).
        source: a file of safetensors or torch.save, by what is in it, whatever its name. Torch's is read without
            running code from it, bare or under "state_dict", "model", "ema" and the like, with or without "module.",
            "model.", "backbone." and the like before each key. Or a folder that save_pretrained wrote; or an http(s)
            URL; or the id of a repository on the Hugging Face Hub.
        fused: the blocks of a model that is built here, as in ``create_model``.
        layout: a name from ``efficientnet.weights.layouts.LAYOUTS``. None: the one that knows the keys. A module that
            is not an ``EfficientNet`` takes only its own keys.
        padding, bn_eps, bn_momentum: what the weights were trained with, which no tensor tells. None: what the file
            says, else what is usual with its layout (torchvision and NVIDIA: "symmetric"; lukemelas and Hugging Face:
            "same", 1e-3, 0.01; timm's names do not say: then the model or its name decides).
        use_ema: of a training checkpoint the averaged weights, if it has them.

    Raises FileNotFoundError, ConnectionError for a URL or id that cannot be reached, or ValueError that names the file
    and what is wrong with it. It may be unreadable, truncated or in need of code to run; of an unknown layout; with
    keys missing, unexpected or misshapen; or trained with another padding, BatchNorm epsilon or activation than the
    model has. In that last case no shape would tell, and the logits would be wrong: build the model with the right
    ones, or say here what the weights were trained with.
    """
    weights = read_weights(source, use_ema=use_ema)
    known = {"padding": padding, "bn_eps": bn_eps, "bn_momentum": bn_momentum}
    known = {field: value for field, value in known.items() if value is not None}
    if model is None:
        config, sizes = _described(weights)
        model = EfficientNet(replace(config, **known), fused=fused, **sizes)
    elif isinstance(model, str):
        config = EfficientNetConfig.from_name(model)
        state = weights.in_timm_names(config, layout)
        settings = weights.trained_with(config) | known
        settings = {field: settings[field] for field in ("padding", "bn_eps", "bn_momentum") if field in settings}
        model = EfficientNet(replace(config, **settings), fused=fused, **_sizes(state, weights.path))
    load_weights(model, weights, layout=layout, known=known)
    return model


@dataclass
class Weights:
    """A checkpoint that was read: its tidy state_dict, our metadata ({} if it has none), and where it came from."""

    state: dict
    metadata: dict
    path: Path
    raw: dict  # before its keys were tidied
    layout: Layout | None = None

    def recognise(self, name: str | None = None) -> Layout:
        """Set and return the layout: the named one, or the one that knows the keys."""
        if name is not None and name not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {name!r}")
        if name is not None:
            self.layout = LAYOUTS[name]
        elif self.layout is None:
            try:
                self.layout = recognise(self.state)
            except ValueError as error:
                raise ValueError(f"checkpoint {str(self.path)!r} {error}") from None
        return self.layout

    def in_timm_names(self, config: EfficientNetConfig, layout: str | None = None) -> dict:
        """The state_dict under the names of ``EfficientNet``."""
        return translate(self.state, self.recognise(layout), LAYOUTS["timm"], config_plan(config))

    def num_classes(self, config: EfficientNetConfig) -> int:
        """The number of classes, read off the classifier; 0 if there is none."""
        return _sizes(self.in_timm_names(config), self.path)["num_classes"]

    def trained_with(self, config: EfficientNetConfig) -> dict:
        """padding, bn_eps, bn_momentum and act of these weights, as far as the file says them or its layout implies
        them.
        """
        stored = self.metadata.get("config")
        if isinstance(stored, dict) and "padding" in stored:  # ours; other programs keep a "config" too
            return {field: stored[field] for field in ("padding", "bn_eps", "bn_momentum", "act") if field in stored}
        return conventions(self.recognise(), config)


def load_weights(
    model: nn.Module, weights: Weights, *, layout: str | None = None, known: dict | None = None, adapt: bool = False
) -> None:
    """The second half of ``load_checkpoint``: check the weights, then fill ``model`` with them.

    Args:
        known: what the caller says that the weights were trained with.
        adapt: a classifier of other classes keeps its fresh weights, with a warning; a stem of other input channels
            takes the three-channel weights, summed for one channel, else repeated and scaled by 3 / in_chans.
    """
    state, path = weights.raw, weights.path
    while isinstance(wrapped := getattr(model, "module", getattr(model, "_orig_mod", None)), nn.Module):
        model = wrapped  # of DistributedDataParallel or torch.compile
    if isinstance(model, EfficientNet):
        state = weights.in_timm_names(model.config, layout)
        for field, trained in (weights.trained_with(model.config) | (known or {})).items():
            actual = getattr(model.config, field)
            if field != "bn_momentum" and trained != actual:  # momentum matters to further training only
                raise ValueError(
                    f"checkpoint {str(path)!r} ({weights.layout.name} layout) was trained with {field}={trained!r}, "
                    "but the model has "
                    f"{field}={actual!r}: build it with create_model(..., {field}={trained!r}), or, if the weights "
                    "were trained "
                    f"otherwise, load_checkpoint(..., {field}={actual!r})"
                )
        if adapt:
            state = _adapt(model, dict(state), path)
    _check_fit(model, state, path)
    model.load_state_dict(state, strict=False)  # what strict would refuse is refused above, in one line


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str,
    *,
    layout: str | None = None,
    model: str | None = None,
    padding: str | None = None,
    bn_eps: float | None = None,
    use_ema: bool = True,
) -> EfficientNetConfig:
    """Write the weights of ``source`` under the names of another library. Returns the network that they are for.

    Args:
        source: as in ``load_checkpoint``.
        target: a file to write: .safetensors, or .pt, .pth, .bin for ``torch.save`` of a plain state_dict. Either
            remembers the model's description, padding and BatchNorm included, for ``load_checkpoint``.
        to, layout: names of layouts, of the target and of the source. ``layout`` None: the one that knows the keys.
        model: the model's name. None: what the file says, or the published variant of that size; timm's names, which
            "efficientnet_*" and "tf_efficientnet_*" share, need it.
        padding, bn_eps: what the weights were trained with, as in ``load_checkpoint``.

    It warns if the other library's own model has another padding or epsilon: there the weights would give other logits.

    Raises what ``load_checkpoint`` raises.
    """
    target = Path(target)
    if to not in LAYOUTS:
        raise ValueError(f"to must be one of {', '.join(LAYOUTS)}, got {to!r}")
    if target.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise ValueError(f"target {str(target)!r} must end in .safetensors, {', '.join(TORCH_SUFFIXES)}")
    weights = read_weights(source, use_ema=use_ema)
    found = weights.recognise(layout)
    if model is not None:
        config = EfficientNetConfig.from_name(model)
    elif "config" in weights.metadata:
        config, _ = _described(weights)
    elif found.name == "timm":
        raise ValueError(
            f"checkpoint {str(source)!r} has timm's names, which efficientnet_* and tf_efficientnet_* share: name the "
            "model"
        )
    elif (config := guess_config(weights.state, found)) is None:
        raise ValueError(f"checkpoint {str(source)!r} is not of a published variant's size: name the model")
    known = {"padding": padding, "bn_eps": bn_eps}
    trained = weights.trained_with(config) | {field: value for field, value in known.items() if value is not None}
    config = replace(config, **trained)
    state = weights.in_timm_names(config, layout)
    network = EfficientNet(config, fused=False, device="meta", **_sizes(state, weights.path))
    _check_fit(network, state, weights.path)

    usual = conventions(LAYOUTS[to], config)
    if differing := [
        f"{field}={getattr(config, field)!r}"
        for field in ("padding", "bn_eps")
        if usual.get(field) not in (None, getattr(config, field))
    ]:
        library = ", ".join(f"{field}={usual[field]!r}" for field in ("padding", "bn_eps"))
        warnings.warn(
            f"these weights were trained with {', '.join(differing)}, but {to}'s own models have {library}: there they "
            "give other logits",
            stacklevel=2,
        )
    _write(
        translate(state, LAYOUTS["timm"], LAYOUTS[to], config_plan(config)),
        target,
        {**weights.metadata, **describe_model(network)},
    )
    return config


def read_metadata(source: str | os.PathLike) -> dict:
    """What ``save_checkpoint`` kept with the weights; {} for a file from elsewhere. Raises what ``load_checkpoint``
    raises.
    """
    return read_weights(source).metadata


def read_weights(source: str | os.PathLike, *, use_ema: bool = True) -> Weights:
    """Read a file, a URL or a repository of the Hub, as ``load_checkpoint`` does, and tidy its keys."""
    path = fetch(source)
    raw, metadata = _read(path, use_ema)
    return Weights(tidy(raw), metadata, path, raw)


def stored_cfg(metadata: dict) -> dict | None:
    """A ``pretrained_cfg`` made of the preprocessing that training keeps with a checkpoint; None if it has none."""
    if "preprocess" not in metadata:
        return None
    stored = metadata["preprocess"]
    hw = height_width(image_size(stored["img_size"]))
    cfg = {"architecture": metadata["config"]["name"], "input_size": (3, *hw)}
    cfg |= {"interpolation": stored["interpolation"], "crop_pct": stored["crop_pct"]}
    return cfg | {
        "mean": tuple(stored["mean"]),
        "std": tuple(stored["std"]),
        "first_conv": "conv_stem",
        "classifier": "classifier",
    }


def describe_model(model: EfficientNet) -> dict:
    """All that ``load_checkpoint(None, path)`` needs to build the model again, as JSON values."""
    description = {
        "config": json.loads(json.dumps(asdict(model.config))),
        "num_classes": model.num_classes,
        "in_chans": model.in_chans,
        "drop_rate": model.drop_rate,
        "drop_path_rate": model.drop_path_rate,
    }
    if model.output_stride != 32:
        description["output_stride"] = model.output_stride
    if getattr(model.global_pool, "pool_type", "avg") != "avg":
        description["global_pool"] = model.global_pool.pool_type
    return description


def save_training_state(path: str | os.PathLike, state: dict) -> None:
    """Write tensors and plain values with torch.save, whole or not at all."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_training_state(path: str | os.PathLike) -> dict:
    """Read onto the CPU what ``save_training_state`` wrote. Raises FileNotFoundError, or ValueError for any other
    file.
    """
    path = _existing(path)
    state = _torch_load(path)
    if not isinstance(state, dict) or "optimizer" not in state:
        raise ValueError(f"{str(path)!r} is no training state (those are named *.train.pt)")
    return state


def _existing(path):
    path = Path(path).expanduser()
    if path.is_dir():
        found = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
        if found is None:
            raise ValueError(
                f"folder {str(path)!r} has none of {', '.join(FOLDER_FILES)}, which save_pretrained writes"
            )
        return found
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such checkpoint file", str(path))
    return path


def _read(path, use_ema=True):
    """(state_dict, metadata) of a checkpoint file; the metadata is {} where the file has none of ours."""
    path = _existing(path)
    with open(path, "rb") as file:
        start = file.read(512)
    if (other := _other_file(start)) is not None:
        raise ValueError(f"checkpoint {str(path)!r} {other}")
    of_torch = start.startswith((b"PK", b"\x80"))  # a zip archive, or a pickle as before torch 1.6
    if start[8:9] == b"{" or path.suffix.lower() == ".safetensors" and not of_torch:  # after the header's length
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}
                metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"checkpoint {str(path)!r} is unreadable or truncated: {_first_line(error)}") from error
        return state, metadata if isinstance(metadata, dict) else {}
    if (other := _other_archive(path)) is not None:
        raise ValueError(f"checkpoint {str(path)!r} is {other}; accepted are files of safetensors and of torch.save")
    state, metadata = _torch_load(path), {}
    if isinstance(state, dict) and isinstance(state.get("metadata"), dict):  # a training state of ours
        metadata = state["metadata"]
    state = _unwrapped(state, path, EMA_WRAPPERS + WRAPPERS if use_ema else WRAPPERS + EMA_WRAPPERS)
    if isinstance(described := getattr(state, "_metadata", {}).get(METADATA_SLOT), str):
        metadata = json.loads(described)
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}, metadata


def _other_file(start):
    """What a file that begins so is instead of a checkpoint, or None."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "is a pointer of git-lfs, not the weights: `git lfs pull` fetches them"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not the weights: the download got a page in their place"
    if not start:
        return "is unreadable or truncated: it is empty"
    for magic, what in ((b"\x1f\x8b", "compressed by gzip: unpack it"), (b"\x89HDF", "HDF5, as of Keras")):
        if start.startswith(magic):
            return f"is {what}; accepted are files of safetensors and of torch.save"
    words = start.decode("utf-8", errors="ignore").strip()
    if words and all(letter.isprintable() or letter.isspace() for letter in words) and len(words) > 0.9 * len(start):
        return f"is text, not the weights: {words.splitlines()[0][:60]!r}"
    return None


def _other_archive(path):
    """What a zip archive is that is none of torch.save's, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return None
    if any(name.endswith("/constants.pkl") for name in names):
        return "TorchScript, which is a program: torch.jit.load(PATH).state_dict() has its weights"
    return None if any(name.endswith("/data.pkl") for name in names) else f"an archive of {', '.join(names[:2])}, ..."


def _unwrapped(state, path, wrappers):
    """The state_dict in what a training script saved: it is itself the file, or is under one of ``wrappers``, the first
    that is there, or is in the only dictionary that holds tensors.
    """
    while True:
        if not isinstance(state, dict):
            raise ValueError(f"checkpoint {str(path)!r} holds no state_dict but a {type(state).__name__}")
        inner = [state[key] for key in wrappers if isinstance(state.get(key), dict) and state[key]]
        if not inner and not any(isinstance(value, torch.Tensor) for value in state.values()):
            inner = [value for value in state.values() if _holds_weights(value)]
            inner = inner if len(inner) == 1 else []
            if not inner:
                keys = ", ".join(map(str, list(state)[:5])) or "none"
                raise ValueError(
                    f"checkpoint {str(path)!r} holds no state_dict under {', '.join(wrappers)}; its keys are {keys}"
                )
        if not inner:
            return state
        state = inner[0]


def _holds_weights(value):
    """Whether a value is a state_dict, or a dictionary with one in it; an optimizer's state has numbers for keys."""
    if not isinstance(value, dict) or not value or not all(isinstance(key, str) for key in value):
        return False
    return all(isinstance(inner, torch.Tensor) for inner in value.values()) or any(map(_holds_weights, value.values()))


def _safe_types():
    """Classes that training scripts keep beside the weights: values, no code."""
    import numpy as np

    multiarray = (getattr(np, "_core", None) or np.core).multiarray
    numbers = [np.ndarray, np.dtype, multiarray.scalar, multiarray._reconstruct]
    numbers += [type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdFDUS"]
    # numpy 1's names of them, in files that it wrote.
    numbers += [(getattr(multiarray, name), f"numpy.core.multiarray.{name}") for name in ("scalar", "_reconstruct")]
    systems = ("pathlib", "pathlib._local")
    paths = [
        (_path, f"{module}.{name}")
        for module in systems
        for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")
    ]
    values = [
        argparse.Namespace,
        SimpleNamespace,
        (_mapping, "collections.defaultdict"),
        (_sequence, "collections.deque"),
        decimal.Decimal,
        fractions.Fraction,
        range,
        slice,
        dict,
        list,
        set,
        tuple,
        int,
        float,
        str,
        bool,
    ]
    return [*values, datetime.datetime, datetime.timedelta, *numbers, *paths]


def _mapping(factory=None):
    """In place of a defaultdict, which the restricted reader cannot fill."""
    return {}


def _sequence(items=(), length=None):
    """In place of a deque, the same."""
    return list(items)


def _path(*parts):
    """In place of a path, also one of another system."""
    return "/".join(map(str, parts))


def _torch_load(path):
    try:
        # Not the path, whose suffix may have torch.load read something else.
        with torch.serialization.safe_globals(_safe_types()), open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports damage as RuntimeError, UnpicklingError, EOFError, KeyError and more
        if refused := _refused(error):
            raise ValueError(
                f"checkpoint {str(path)!r} is refused: reading it would run code ({refused}). Safe: the .safetensors "
                "of these weights, or "
                "torch.save(model.state_dict(), PATH) or safetensors.torch.save_file(model.state_dict(), PATH), "
                "written where you trust it"
            ) from error
        raise ValueError(f"checkpoint {str(path)!r} is unreadable or truncated: {_detail(error)}") from error


def _detail(error):
    """Torch's line about a file, without its advice to let the file run code."""
    text = str(error)
    if "weights_only" not in text and "Weights only" not in text:
        return _first_line(error)
    found = re.search(r"WeightsUnpickler error: *(.*)", text)
    return found[1].partition(" Please ")[0].strip() if found and found[1].strip() else "torch.load cannot read it"


def _refused(error):
    """What torch's restricted reader would not do for a file, or None if the file is only damaged."""
    text = str(error)
    if not isinstance(error, pickle.UnpicklingError):
        return None
    if called := re.search(r"GLOBAL ([\w.]+)|(?:class|function|instantiate) ([\w.]+\.\w+)", text):
        return f"it calls {called[1] or called[2]}"
    # Of pickle protocol 3 and later; torch.save writes 2.
    return (
        f"{operand[0]}: not written by torch.save"
        if (operand := re.search(r"Unsupported operand (?:14[0-9]|15[01])\b", text))
        else None
    )


def _described(weights):
    """(config, other arguments of ``EfficientNet``) from a file's metadata."""
    metadata, path = weights.metadata, weights.path
    if "config" not in metadata:
        raise ValueError(f"checkpoint {str(path)!r} does not say which model it is for: name the model")
    try:
        config = dict(metadata["config"])
        config["stages"] = tuple(StageConfig(**stage) for stage in config["stages"])
        sizes = {key: metadata[key] for key in ("num_classes", "in_chans", "drop_rate", "drop_path_rate")}
        sizes |= {"output_stride": metadata.get("output_stride", 32), "global_pool": metadata.get("global_pool", "avg")}
        return EfficientNetConfig(**config), sizes
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"checkpoint {str(path)!r} describes a model that this version cannot build: {_first_line(error)}"
        ) from error


def adapt_input_conv(weight: torch.Tensor, in_chans: int) -> torch.Tensor:
    """The first convolution's weight [O, 3, k, k] for images of other channels, [O, in_chans, k, k], as timm makes it.

    One channel takes the sum over the three. More or fewer take the three in turn, scaled by 3 / in_chans, so that the
    response to a grey image stays.

    Raises ValueError for weights of another number of channels.
    """
    found = weight.shape[1]
    if found == in_chans:
        return weight
    if found != 3:
        raise ValueError(f"in_chans is {in_chans}, but the weights are for {found} channels (three can be adapted)")
    if in_chans == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, -(-in_chans // 3), 1, 1)[:, :in_chans]
    return (repeated * (3 / in_chans)).to(weight.dtype)


def _adapt(model, state, path):
    """``state`` changed to fit a model of other classes or input channels."""
    stem, classifier = state.get("conv_stem.weight"), state.get("classifier.weight")
    if stem is not None and stem.dim() == 4 and stem.shape[1] != model.in_chans:
        state["conv_stem.weight"] = adapt_input_conv(stem, model.in_chans)
    if classifier is None or classifier.shape[0] != model.num_classes:
        found = "none" if classifier is None else classifier.shape[0]
        for key in ("classifier.weight", "classifier.bias"):
            state.pop(key, None)
            if model.num_classes:
                state[key] = model.state_dict()[key]
        if model.num_classes:
            warnings.warn(
                f"classifier is re-initialised: num_classes is {model.num_classes}, but checkpoint {str(path)!r} has "
                f"{found}",
                stacklevel=4,
            )
    return state


def _sizes(state, path):
    """num_classes and in_chans, read off the shapes of the weights."""
    stem, classifier = state.get("conv_stem.weight"), state.get("classifier.weight")
    if stem is None or stem.dim() != 4:
        raise ValueError(
            f"checkpoint {str(path)!r} has no weight 'conv_stem.weight' of 4 dimensions: its layout is not this "
            "family's"
        )
    return {"in_chans": stem.shape[1], "num_classes": 0 if classifier is None else classifier.shape[0]}


def _check_fit(model, state, path):
    expected = model.state_dict()
    # As nn.BatchNorm2d itself does: files older than the counter come without it.
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    misshapen = [
        f"{key} (expected {tuple(expected[key].shape)}, got {tuple(tensor.shape)})"
        for key, tensor in state.items()
        if key in expected and tensor.shape != expected[key].shape
    ]
    problems = []
    for what, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
        if keys:
            problems.append(f"{len(keys)} {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}")
    if problems:
        raise ValueError(
            f"checkpoint {str(path)!r} does not fit the model ({len(expected)} keys): {'; '.join(problems)}"
        )


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
