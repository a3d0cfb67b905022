"""Checkpoints: safetensors weights that carry, as metadata, all it takes to rebuild the model and prepare its images."""

import errno
import json
import os
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from efficientnet.config import EfficientNetConfig, StageConfig
from efficientnet.model import EfficientNet, create_model

METADATA_KEY = "efficientnet"
TORCH_SUFFIXES = (".pt", ".pth", ".bin")


@contextmanager
def replacing(path):
    """A temporary path in the folder of ``path`` that takes its name when the block ends well: ``path`` is never half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(model: nn.Module, path, **metadata) -> None:
    """Write the model's state_dict as safetensors, whole or not at all.

    Args:
        model: an ``EfficientNet`` describes itself in the metadata, so that ``load_checkpoint(None, path)`` can build it;
            of any other module only the weights are kept.
        metadata: JSON values to keep with the weights, e.g. ``classes``, ``preprocess``, ``epoch``.
    """
    from safetensors.torch import save

    if isinstance(model, EfficientNet):
        metadata = {**describe_model(model), **metadata}
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(state, {METADATA_KEY: json.dumps(metadata)}))  # save_file would make it unreadable for others


def load_checkpoint(model: "nn.Module | str | None", path, *, fused: bool = True) -> nn.Module:
    """Load weights strictly: every key present, none left over, every shape equal. Returns the model.

    Args:
        model: the module to load into; or a model's name, whose classes and input channels are read off the weights; or None
            to build the model that the file describes (files from ``save_checkpoint`` do).
        path: .safetensors, or a state_dict saved by torch (.pt, .pth, .bin), which is read without running code from it.
        fused: blocks of a model that is built here, as in ``create_model``.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong: unreadable or truncated, keys missing, unexpected
    or misshapen, or weights trained with another padding, BatchNorm epsilon or activation (no shape would tell).
    """
    state, metadata = _read(path)
    if model is None:
        model = _build(metadata, path, fused)
    elif isinstance(model, str):
        model = create_model(model, fused=fused, **_sizes(state, path))
    if isinstance(model, EfficientNet) and "config" in metadata:
        for field in ("padding", "bn_eps", "act"):
            stored, actual = metadata["config"].get(field), getattr(model.config, field)
            if stored != actual:
                raise ValueError(f"checkpoint {str(path)!r} was trained with {field}={stored!r}, but the model has {field}={actual!r}")
    _check_fit(model, state, path)
    model.load_state_dict(state, strict=False)  # what strict would refuse is refused above, in one line
    return model


def read_metadata(path) -> dict:
    """What ``save_checkpoint`` kept with the weights; {} for a file from elsewhere. Raises as ``load_checkpoint``."""
    return _read(path)[1]


def describe_model(model: EfficientNet) -> dict:
    """All that ``load_checkpoint(None, path)`` needs to build the model again, as JSON values."""
    return {
        "config": json.loads(json.dumps(asdict(model.config))),
        "num_classes": model.num_classes,
        "in_chans": model.in_chans,
        "drop_rate": model.drop_rate,
        "drop_path_rate": model.drop_path_rate,
    }


def save_training_state(path, state: dict) -> None:
    """torch.save of tensors and plain values, whole or not at all."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_training_state(path) -> dict:
    """What ``save_training_state`` wrote, on the CPU. Raises FileNotFoundError, or ValueError for any other file."""
    path = _existing(path)
    state = _torch_load(path)
    if not isinstance(state, dict) or "optimizer" not in state:
        raise ValueError(f"{str(path)!r} is no training state (those are named *.train.pt)")
    return state


def _existing(path):
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such checkpoint file", str(path))
    return path


def _read(path):
    """(state_dict, metadata) of a checkpoint file; the metadata is {} where the file has none of ours."""
    path = _existing(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}
                metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"checkpoint {str(path)!r} is unreadable or truncated: {_first_line(error)}") from error
        return state, metadata if isinstance(metadata, dict) else {}
    if path.suffix not in TORCH_SUFFIXES:
        raise ValueError(f"checkpoint {str(path)!r} must end in .safetensors, {', '.join(TORCH_SUFFIXES)}")
    state, metadata = _torch_load(path), {}
    if isinstance(state, dict) and isinstance(state.get("metadata"), dict):  # a training state of ours
        metadata = state["metadata"]
    for key in ("state_dict", "model"):  # the usual names of the weights among other things
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"checkpoint {str(path)!r} holds no state_dict")
    return state, metadata


def _torch_load(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports damage as RuntimeError, UnpicklingError, EOFError, KeyError and more
        raise ValueError(f"checkpoint {str(path)!r} is unreadable or truncated: {_first_line(error)}") from error


def _build(metadata, path, fused):
    if "config" not in metadata:
        raise ValueError(f"checkpoint {str(path)!r} does not say which model it is for: name the model")
    try:
        config = dict(metadata["config"])
        config["stages"] = tuple(StageConfig(**stage) for stage in config["stages"])
        sizes = {key: metadata[key] for key in ("num_classes", "in_chans", "drop_rate", "drop_path_rate")}
        return EfficientNet(EfficientNetConfig(**config), fused=fused, **sizes)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"checkpoint {str(path)!r} describes a model that this version cannot build: {_first_line(error)}") from error


def _sizes(state, path):
    """num_classes and in_chans, read off the shapes of the weights."""
    stem, classifier = state.get("conv_stem.weight"), state.get("classifier.weight")
    if stem is None or stem.dim() != 4:
        raise ValueError(f"checkpoint {str(path)!r} has no weight 'conv_stem.weight' of 4 dimensions: its layout is not this family's")
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
        raise ValueError(f"checkpoint {str(path)!r} does not fit the model ({len(expected)} keys): {'; '.join(problems)}")


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
