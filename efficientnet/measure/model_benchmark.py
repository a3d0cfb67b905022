"""The speed and memory of a network on this machine, for ``efficientnet benchmark``, under the keys of timm's
benchmark.py and some more.
"""

import csv
import gc
import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from efficientnet.choices import height_width
from efficientnet.devices import describe_backend, out_of_memory
from efficientnet.errors import InputError
from efficientnet.measure.roofline import model_bytes
from efficientnet.measure.timing import Stopwatch, kernel_times, peak_memory, quantiles, versions
from efficientnet.model.config import EfficientNetConfig
from efficientnet.model.profile import count_activations, count_macs, count_parameters
from efficientnet.weights.factory import create_model

MODES = ("infer", "train")
FORMATS = ("md", "json", "csv")
DTYPES = ("auto", "bfloat16", "float16", "float32")
# torch.compile's mode (None: eager) and memory format of the plain network.
BASELINES = {
    "eager": (None, torch.channels_last),
    "eager-nchw": (None, torch.contiguous_format),
    "compile": ("default", torch.channels_last),
    "compile-max-autotune": ("max-autotune", torch.channels_last),
    "compile-reduce-overhead": ("reduce-overhead", torch.channels_last),
}
# Relative L2 difference of the fused and the plain network's outputs that rounding explains, through up to 55 blocks.
MOST_DIFFERENCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}


class WrongOutputs(RuntimeError):
    """The outputs of a network are not those of its plain twin."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure.

    batch_size is where the search for one that fits the memory begins. img_size None is the model's own.

    Raises InputError that names the field, its value and what is accepted.
    """

    model: str = "efficientnet_b0"
    mode: str = "infer"
    batch_size: int = 256
    img_size: int | tuple[int, int] | None = None
    num_classes: int = 1000
    dtype: str = "auto"
    num_warm_iter: int = 10
    num_bench_iter: int = 40
    cuda_graph: bool = False

    def __post_init__(self):
        def check(field, accepted, ok):
            if not ok:
                raise InputError(f"{field} must be {accepted}, got {getattr(self, field)!r}")

        check("mode", f"one of {', '.join(MODES)}", self.mode in MODES)
        check("dtype", f"one of {', '.join(DTYPES)}", self.dtype in DTYPES)
        least = 2 if self.mode == "train" else 1  # one image of one pixel has no batch statistics
        check("batch_size", f"an integer >= {least}", self.batch_size >= least)
        check(
            "img_size",
            "an integer >= 32 or two, height and width",
            self.img_size is None or min(height_width(self.img_size)) >= 32,
        )
        check("num_classes", "an integer >= 1", self.num_classes >= 1)
        check("num_warm_iter", "an integer >= 1", self.num_warm_iter >= 1)
        check("num_bench_iter", "an integer >= 2", self.num_bench_iter >= 2)
        check("cuda_graph", "off in training", not (self.cuda_graph and self.training))
        object.__setattr__(self, "img_size", self.img_size or EfficientNetConfig.from_name(self.model).resolution)

    @property
    def training(self) -> bool:
        """Whether training steps are timed, not inference."""
        return self.mode == "train"


def smaller_batch(batch_size: int) -> int:
    """Three quarters of a batch size, as a multiple of 8 where there is one; 0 at the end."""
    smaller = 3 * batch_size // 4
    return smaller // 8 * 8 if smaller >= 8 else smaller


def with_decay(
    call: Callable[[int], dict], batch_size: int, least: int = 1, say: Callable[[str], None] = lambda line: None
) -> dict:
    """The result of ``call(batch size)`` with the largest of ever smaller batch sizes that the memory holds.

    Args:
        least: the smallest batch size that is tried.
        say: is told of each that does not fit.

    Raises InputError if none does.
    """
    while batch_size >= least:
        try:
            return call(batch_size)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not out_of_memory(error):
                raise
        # Out of the handler, whose traceback keeps the step's tensors alive.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        smaller = smaller_batch(batch_size)
        say(f"batch size {batch_size} does not fit into memory, trying {smaller}")
        batch_size = smaller
    raise InputError("not even the smallest batch fits into memory; a smaller --img-size or --model may")


class Benchmark:
    """Measures networks on one device.

    Args:
        progress: ``progress(total, name)`` returns a context manager whose value's ``update()`` counts steps, or None.
        say: is told what does not fit into memory.
    """

    def __init__(
        self, device: torch.device, progress: Callable | None = None, say: Callable[[str], None] = lambda line: None
    ):
        self.device, self.say = device, say
        self.progress = progress or (lambda total, name: nullcontext())
        self.stopwatch = Stopwatch(device)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        self.copy_bandwidth = self.stopwatch.copy_bandwidth()
        self.machine = versions(device)

    def dtype(self, config: BenchmarkConfig) -> torch.dtype:
        """The compute dtype; "auto" is bf16 on a GPU and fp32 on a CPU."""
        name = config.dtype
        if name == "auto":
            name = "bfloat16" if self.device.type == "cuda" else "float32"
        return getattr(torch, name)

    def run(self, config: BenchmarkConfig, baseline: str | None = None) -> list[dict]:
        """A record of ours, and one of ``baseline`` at the same batch size where that fits.

        With a baseline our record also has "<mode>_speedup" and, on a GPU, "<mode>_memory_ratio".
        """
        if baseline is not None and baseline not in BASELINES:
            raise InputError(f"baseline must be one of {', '.join(BASELINES)}, got {baseline!r}")
        difference = self.difference(config)
        least = 2 if config.training else 1
        ours = with_decay(lambda batch: self.measure(config, batch), config.batch_size, least, self.say)
        ours[f"{config.mode}_difference"] = float(f"{difference:.3g}")
        if baseline is None:
            return [ours]
        batch = ours[f"{config.mode}_batch_size"]
        other = with_decay(lambda batch: self.measure(config, batch, baseline), batch, least, self.say)
        key = f"{config.mode}_samples_per_sec"
        ours[f"{config.mode}_speedup"] = round(ours[key] / other[key], 3)
        if peak := other.get(f"{config.mode}_peak_memory_mb"):
            ours[f"{config.mode}_memory_ratio"] = round(ours[f"{config.mode}_peak_memory_mb"] / peak, 3)
        return [ours, other]

    def _network(self, config, baseline: str | None, drop: bool = True):
        compile_mode, memory_format = BASELINES[baseline] if baseline else (None, torch.channels_last)
        rates = {} if drop else {"drop_rate": 0.0, "drop_path_rate": 0.0}
        torch.manual_seed(0)
        model = create_model(config.model, num_classes=config.num_classes, fused=baseline is None, **rates)
        dtype = self.dtype(config)
        model.to(self.device, torch.float32 if config.training else dtype, memory_format=memory_format).train(
            config.training
        )
        call = model if compile_mode is None else torch.compile(model, mode=compile_mode, dynamic=False)
        return model, call, memory_format

    def _images(self, config, batch: int, memory_format):
        images = torch.randn(batch, 3, *height_width(config.img_size), device=self.device)
        return images.to(self.dtype(config), memory_format=memory_format)

    def _autocast(self, config):
        dtype = self.dtype(config)
        mixed = config.training and dtype != torch.float32
        return torch.autocast(self.device.type, dtype) if mixed else nullcontext()

    def difference(self, config: BenchmarkConfig) -> float:
        """The relative L2 difference of our and the plain network's outputs on two images.

        Raises WrongOutputs where rounding does not explain it: what is wrong is not timed.
        """
        outs = []
        for baseline in (None, "eager"):
            model, _, memory_format = self._network(config, baseline, drop=False)
            torch.manual_seed(1)
            images = self._images(config, 2, memory_format)
            with torch.no_grad(), self._autocast(config):
                outs.append(model(images).double())
        difference = ((outs[0] - outs[1]).norm() / outs[1].norm()).item()
        bound = MOST_DIFFERENCE[self.dtype(config)]
        if not difference <= bound:
            raise WrongOutputs(
                f"{config.model}: the outputs differ from plain PyTorch's by {difference:.3g}, more than {bound:g}; "
                "not timed"
            )
        return difference

    def measure(self, config: BenchmarkConfig, batch: int, baseline: str | None = None) -> dict:
        """One record. Raises torch.OutOfMemoryError."""
        try:
            return self._measure(config, batch, baseline)
        finally:
            if baseline and BASELINES[baseline][0] is not None:
                # Forget what was compiled: beyond a limit torch would run eager code and say nothing.
                torch.compiler.reset()

    def _measure(self, config, batch, baseline):
        is_gpu, mode = self.device.type == "cuda", config.mode
        gc.collect()
        held = torch.cuda.memory_allocated() if is_gpu else 0
        model, call, memory_format = self._network(config, baseline)
        images = self._images(config, batch, memory_format)
        labels = torch.arange(batch, device=self.device) % config.num_classes
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) if config.training else None
        graphs = bool(baseline) and BASELINES[baseline][0] in ("max-autotune", "reduce-overhead")

        def step():
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            if not config.training:
                with torch.no_grad():
                    call(images)
                return
            optimizer.zero_grad()
            with self._autocast(config):
                loss = F.cross_entropy(call(images), labels)
            loss.backward()
            optimizer.step()

        name = f"{config.model} {mode} {baseline or 'ours'} x{batch}"
        with self.progress(config.num_warm_iter + config.num_bench_iter, name) as bar:
            extra = {}
            for _ in range(config.num_warm_iter):
                step()
                if bar is not None:
                    bar.update()
            if is_gpu:
                extra[f"{mode}_peak_memory_mb"] = round((peak_memory(step, graphs) - held) / 1e6, 1)
            how = ("kernels" if graphs else "graph") if config.cuda_graph else "step"
            timed, timing = self.stopwatch.prepared(step, how, capturable=not graphs)
            times = []
            for _ in range(config.num_bench_iter):
                times.append(self.stopwatch.seconds(timed))
                if bar is not None:
                    bar.update()
        if is_gpu:  # last: a profiler may leave launches slower
            extra[f"{mode}_launches"] = sum(count for count, _ in kernel_times(step).values())
        median, p20, p80 = quantiles(times)
        moved = model_bytes(
            model=model,
            training=config.training,
            batch=batch,
            itemsize=self.dtype(config).itemsize,
            size=config.img_size,
        )
        record = {
            "model": EfficientNetConfig.from_name(config.model).name,
            "implementation": baseline or "ours",
            f"{mode}_samples_per_sec": round(batch / median, 2),
            f"{mode}_step_time": round(1e3 * median, 3),
            f"{mode}_batch_size": batch,
            f"{mode}_img_size": config.img_size,
        }
        if not config.training:
            record["infer_gmacs"] = round(count_macs(model, config.img_size) / 1e9, 2)
            record["infer_macts"] = round(count_activations(model, config.img_size) / 1e6, 2)
        record["param_count"] = round(count_parameters(model) / 1e6, 2)
        record |= {
            f"{mode}_step_time_p20": round(1e3 * p20, 3),
            f"{mode}_step_time_p80": round(1e3 * p80, 3),
            f"{mode}_gb_per_s": round(moved / median / 1e9, 1),
            f"{mode}_share_of_copy": round(moved / median / self.copy_bandwidth, 3),
        }
        if baseline is None:
            with self._autocast(config):
                extra["backend"] = describe_backend(model, images)
        return (
            record | extra | {"timing": timing, "dtype": str(self.dtype(config)).removeprefix("torch."), **self.machine}
        )


def columns(records: list[dict]) -> list[str]:
    """Every key of the records, in the order in which it is first seen."""
    return list(dict.fromkeys(key for record in records for key in record))


def formatted(records: list[dict], form: str) -> str:
    """The records as text.

    "json" is a list of objects, "csv" a table, "md" a Markdown table without what all records share, which is said
    below it.
    """
    if form == "json":
        return json.dumps(records, indent=2) + "\n"
    names = columns(records)
    if form == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return out.getvalue()
    shared = [] if len(records) < 2 else [n for n in names[2:] if len({str(record.get(n)) for record in records}) == 1]
    own = [name for name in names if name not in shared and name != "backend"]
    lines = ["| " + " | ".join(own) + " |", "|" + "---|" * len(own)]
    lines += ["| " + " | ".join(str(record.get(name, "")) for name in own) + " |" for record in records]
    lines += ["", *(f"- {name}: {records[0][name]}" for name in shared)]
    lines += [f"- {record['model']}: {record['backend']}" for record in records if "backend" in record]
    return "\n".join(lines) + "\n"
