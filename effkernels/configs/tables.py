"""Launch configurations that were measured, or predicted: a JSON table for each GPU architecture, whose rows override
the analytic rules of configs/rules.py. A measured row wins over a simulated one.

``python -m effkernels.tune`` writes them; nothing else measures anything. A table is
effkernels/configs/sm_<major><minor>.json, or the file that EFFKERNELS_TABLE names; it is read once, when the first
kernel of that architecture starts. Without one the rules decide. (static_sm<arch>.json beside them is what
``effkernels.inspect`` knows of the machine code.)

Where a configuration does not compile, or needs more than the GPU has, a launcher (kernels/common.py) tries FALLBACKS
in turn; the first that works is remembered for the rest of the process.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from effkernels.configs.gpus import GPUS, Gpu

FOLDER = Path(__file__).parent
# Changes to a rule's configuration: none (where a table had said otherwise), the least shared memory, the registers
# that ptxas chooses, the fewest registers a thread.
FALLBACKS = ({}, {"stages": 1}, {"stages": 1, "maxnreg": None}, {"stages": 1, "maxnreg": None, "num_warps": 8})
_remembered: dict[tuple, dict] = {}
_fallback: dict | None = None
_overrides: dict[str, dict] = {}
_watchers: list[list] = []
_disabled = False
_stand_in: Gpu | None = None


def key_of(names: Iterable[str], values: Iterable) -> str:
    """The bucket of a rule's arguments, e.g. "K=3 stride=1 C=128 dtype=bfloat16": integers above 16 rounded up to a
    power of two."""
    parts = []
    for name, value in zip(names, values, strict=True):
        if name == "device":
            continue
        if isinstance(value, torch.dtype):
            value = str(value).removeprefix("torch.")
        elif isinstance(value, int) and value > 16:
            value = 1 << (value - 1).bit_length()
        parts.append(f"{name}={value}")
    return " ".join(parts)


def default_path(capability: tuple[int, int]) -> Path:
    """The file that EFFKERNELS_TABLE names, else that of the architecture beside this one."""
    return Path(os.environ.get("EFFKERNELS_TABLE") or FOLDER / f"sm_{capability[0]}{capability[1]}.json")


def read(path: Path, capability: tuple[int, int] | None = None) -> dict:
    """The table in ``path``, checked: {"gpu", "capability", "triton", "rows": [{"family", "key", "config", ...}]}.

    Raises ValueError that names the file if it is not such a table, or was measured on another architecture than
    ``capability``.
    """
    advice = "correct or remove it, or measure again with python -m effkernels.tune"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        measured = tuple(table["capability"])
        for row in table["rows"]:
            if not (isinstance(row["family"], str) and isinstance(row["key"], str)):
                raise TypeError("family and key must be strings")
            if source_of(row) not in ("measured", "simulated"):
                raise TypeError(f"source must be measured or simulated, got {row['source']!r}")
            if not all(value is None or isinstance(value, (int, bool)) for value in row["config"].values()):
                raise TypeError(f"config must hold integers, got {row['config']}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a table of launch configurations ({type(error).__name__}: {error}): {advice}"
        ) from error
    if capability is not None and measured != capability:
        names = [f"sm_{major}{minor}" for major, minor in (measured, capability)]
        raise ValueError(f"{path} was measured on {names[0]}, this GPU is {names[1]}: {advice}")
    return table


def source_of(row: dict) -> str:
    """Where a row's times come from: "measured" or "simulated"."""
    return row.get("source", "measured")


def write(path: Path, table: dict) -> None:
    """One row a line; the file is replaced as a whole, so that an interruption leaves the old one."""
    rows = sorted(table["rows"], key=lambda row: (row["family"], row["key"]))
    head = json.dumps({name: value for name, value in table.items() if name != "rows"})
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(f'{head[:-1]}, "rows": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n", encoding="utf-8")
    temporary.replace(path)


@functools.cache
def _table(capability: tuple[int, int]) -> tuple[Path, dict[tuple[str, str], dict]]:
    """(file, changed fields by family and key) of an architecture."""
    path = default_path(capability)
    if not path.exists():
        if os.environ.get("EFFKERNELS_TABLE"):
            raise ValueError(f"EFFKERNELS_TABLE names {path}, which does not exist")
        return path, {}
    rows = sorted(read(path, capability)["rows"], key=lambda row: source_of(row) == "measured")  # these win
    return path, {(row["family"], row["key"]): row["config"] for row in rows}


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


_caches = [_table]
_listeners: list[Callable[[], None]] = []


def _architecture(device: torch.device | None) -> tuple[int, int] | None:
    """Capability of the GPU a rule is asked for (the current one, where it is not told), or None for the CPU and
    ``meta``, unless that stands for a GPU."""
    if _disabled:
        return None
    if _stand_in is not None and (device is None or device.type == "meta"):
        return _stand_in.capability
    if device is not None:
        return _capability(device.index) if device.type == "cuda" else None
    return _capability(torch.cuda.current_device()) if torch.cuda.is_initialized() else None


def _replaced(config, fields: dict, source):
    try:
        return dataclasses.replace(config, **fields)
    except TypeError as error:
        raise ValueError(f"{source}: {error}") from error


def _fallen_back(config, fields: dict):
    """``config`` with those of the fields that it has."""
    return dataclasses.replace(config, **{name: value for name, value in fields.items() if hasattr(config, name)})


def tuned(rule: Callable) -> Callable:
    """A rule ``<family>_config(...)`` of configs/rules.py whose result a row of its family and bucket overrides."""
    family = rule.__name__.removesuffix("_config")
    signature = inspect.signature(rule)
    names = list(signature.parameters)

    @functools.lru_cache(maxsize=4096)
    def decided(capability, *args):
        config, key = rule(*args), key_of(names, args)
        if (fields := _remembered.get((capability, family, key))) is not None:
            return _fallen_back(config, fields)
        if capability is not None:
            path, rows = _table(capability)
            if fields := rows.get((family, key)):
                return _replaced(config, fields, f"{path}, family {family}")
        return config

    @functools.wraps(rule)
    def config(*args, **kwargs):
        if kwargs:
            args = signature.bind(*args, **kwargs).args
        if _watchers or family in _overrides:
            chosen = _fallen_back(rule(*args), _fallback or {})
            chosen = _replaced(chosen, _overrides.get(family, {}), f"override of {family}")
            for seen in _watchers:
                seen.append((family, key_of(names, args), chosen))
            return chosen
        return decided(_architecture(args[names.index("device")] if "device" in names else None), *args)

    _caches.append(decided)
    return config


def forget() -> None:
    """Look tables up afresh, and try again what has failed."""
    _remembered.clear()
    _forget_decisions()


def when_decisions_change(forget: Callable[[], None]) -> None:
    """Have ``forget`` called when what rules decided before may no longer hold."""
    _listeners.append(forget)


def _forget_decisions() -> None:
    for cache in _caches:
        cache.cache_clear()
    for listener in _listeners:
        listener()


@contextlib.contextmanager
def override(family: str, **fields: int | bool | None) -> Iterator[None]:
    """Within: the rule of ``family`` returns its configuration with these fields, whatever the arguments; tables do not
    count."""
    _overrides[family] = fields
    try:
        yield
    finally:
        del _overrides[family]


@contextlib.contextmanager
def watch() -> Iterator[list[tuple[str, str, object]]]:
    """Within: (family, key, configuration) of every rule asked is in the list this yields; tables do not count."""
    seen: list = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)


@contextlib.contextmanager
def falling_back(fields: dict) -> Iterator[list[tuple[str, str, object]]]:
    """Within: every rule returns its configuration with ``fields``, as far as it has them. What it was asked, as
    ``watch`` lists it, is remembered at the end, unless by an error."""
    global _fallback
    before, _fallback = _fallback, fields
    try:
        with watch() as asked:
            yield asked
    finally:
        _fallback = before
    capability = _architecture(None)
    _remembered.update({(capability, family, key): fields for family, key, _ in asked})
    _forget_decisions()


def overridden() -> bool:
    """Whether a configuration was asked for by name, so that no other may stand in for it."""
    return bool(_overrides)


def disturbed() -> bool:
    """Whether rules are watched, or answer for another than the GPU at hand or what was asked for by name."""
    return bool(_overrides or _watchers or _disabled or _stand_in)


@contextlib.contextmanager
def rules_only() -> Iterator[None]:
    """Within: no table counts, as on the CPU."""
    global _disabled
    before, _disabled = _disabled, True
    try:
        yield
    finally:
        _disabled = before


def stand_in() -> Gpu:
    """The GPU whose processors and architecture rules assume for tensors of the ``meta`` device."""
    return _stand_in or GPUS["h200"]


@contextlib.contextmanager
def meta_is(gpu: Gpu) -> Iterator[None]:
    """Within: tensors of the ``meta`` device get the configurations that this GPU's would, from its table too."""
    global _stand_in
    before, _stand_in = _stand_in, gpu
    _forget_decisions()
    try:
        yield
    finally:
        _stand_in = before
        _forget_decisions()
