"""A training run. Every update can be the last one, and a resumed run goes on as if it had never stopped."""

import itertools
import math
import os
import shutil
import signal
import sys
import sysconfig
import threading
import time
import warnings
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from efficientnet.data.decoding import allow_pixels, decode_with
from efficientnet.data.images import ImageSet
from efficientnet.data.loading import Unreadable
from efficientnet.data.order import TrainingOrder
from efficientnet.data.sets import Data, load_data
from efficientnet.devices import compile_kernels, describe_backend, out_of_memory, pick_device, use_tf32
from efficientnet.errors import InputError, Interrupted, TrainingStopped
from efficientnet.files import replacing
from efficientnet.model.config import EfficientNetConfig
from efficientnet.model.profile import count_parameters
from efficientnet.model.transfer import freeze, parameter_groups
from efficientnet.training.augment import mixing, training_crop, training_finish
from efficientnet.training.cuda_graph import GraphedStep
from efficientnet.training.distributed import (
    join,
    lost_process,
    release,
    share_running_statistics,
    synchronize_batch_norm,
    without_reduction,
    wrap,
)
from efficientnet.training.logs import Log, plot_curves
from efficientnet.training.optim import average_of, create_optimizer, epochs_without_gain, learning_rate
from efficientnet.training.run_state import RunStates, read_state
from efficientnet.training.runner import Evaluation, Runner
from efficientnet.training.settings import TrainConfig, unused
from efficientnet.weights.checkpoints import describe_model, read_weights, save_checkpoint, stored_cfg
from efficientnet.weights.factory import create_model
from efficientnet.weights.pretrained import resolve

# Settings that may be changed when a run is resumed: its result stays the same.
FREE_SETTINGS = {
    "output",
    "resume",
    "device",
    "num_workers",
    "max_corrupt",
    "tensorboard",
    "log_interval",
    "checkpoint_interval",
    "checkpoint_hist",
    "auto_batch",
    "batch_size",
    "global_batch_size",
    "grad_accum_steps",
    "skip_nonfinite",
    "download",
    "max_pixels",
}


class Trainer:
    """A training run. The constructor reads and checks all input; ``run`` trains.

    Files in ``config.output``, each whole at every moment:

    - ``checkpoints/step-*.train.pt``: all that ``resume`` needs, weights included; the newest ``checkpoint_hist`` are
      kept;
    - ``last.safetensors``, ``best.safetensors``: the weights (averaged, with ``model_ema``) of the last epoch and of
      the best held-out accuracy, for ``load_checkpoint``;
    - ``metrics.jsonl``, ``steps.jsonl``: a row for each epoch, and for every few updates; ``curves.png``, at the end;
    - ``samples/``: held-out digits.

    Raises InputError for what cannot be used, TrainingStopped where a run cannot go on, Interrupted where a signal ends
    it.
    """

    def __init__(self, config: TrainConfig):
        device = pick_device(config.device)
        self.processes = join(device.type, config.dist_timeout)
        with lost_process(self.processes, lambda: "it had not begun to train"):
            self._prepare(config, device)

    def _prepare(self, config, device):
        self.output = Path(config.output).expanduser()
        config = self.config = _for_processes(config, device, self.processes.world)
        if device.type == "cuda":
            device = torch.device("cuda", self.processes.local_rank)
            use_tf32(config.tf32)
        self.runner = Runner(device, config.amp, config.channels_last, self.processes)

        torch.manual_seed(config.seed)
        self.model = self._create_model()
        self.unreadable = Unreadable(config.max_corrupt, self.say)
        self.mix = mixing(config, len(self.data.classes))
        self.class_weights = self._class_weights()
        if config.auto_batch:
            config = self.config = self._fit_memory()
        self.order = self._order(config)
        self.loader = self.runner.batches(
            self.data.train, num_workers=config.num_workers, order=self.order, unreadable=self.unreadable
        )
        self.val_batch_size = 2 * config.batch_size
        self.val_loader = self._val_loader()
        self.steps = self.order.steps

        self.average = average_of(self.model, config.model_ema_decay) if config.model_ema else None
        self.forward = wrap(_compiled(self.model, device) if config.compile else self.model, self.processes)
        self.compiled: set[int] = set()  # sizes of images that the compiled model has been trained with
        self.optimizer = create_optimizer(
            config, parameter_groups(self.model, config.lr, config.weight_decay, config.layer_decay)
        )
        self.scaler = torch.amp.GradScaler(self.runner.device.type, enabled=config.amp == "fp16")
        self.forward_backward = (
            GraphedStep(self._forward_backward, self.model) if config.cuda_graphs else self._forward_backward
        )

        self.step, self.skipped = 0, 0  # updates behind us; those of them left out
        self.history: list[dict] = []
        # The sum and the number of losses, of the present epoch and of the next row of steps.jsonl; and the seconds of
        # the epoch, and those of them spent waiting for data.
        self.sums = {name: torch.zeros(2, device=self.runner.device) for name in ("epoch", "row")}
        self.seconds = {"epoch": 0.0, "wait": 0.0}
        torch.manual_seed(config.seed * 1_000_003 + 1 + self.processes.rank)  # dropout and drop-path of this process
        self.states = RunStates(self.output / "checkpoints", config.checkpoint_hist)
        self.signal = None
        resumed = self._resume() if config.resume else False
        self.processes.by_first(self._check_output)
        if not resumed and self.processes.first:
            self._set_aside()

    def _create_model(self):
        """Read the data set, and return a model for it."""
        config = self.config
        img_size = config.img_size
        if img_size is None:
            img_size = 32 if config.data.startswith("digits") else EfficientNetConfig.from_name(config.model).resolution
        prepare = {"interpolation": config.interpolation, "crop_pct": config.crop_pct}
        source = classes = None
        if config.pretrained is not None:
            source, classes, cfg = _pretrained(config)
            prepare |= {field: tuple(cfg[field]) for field in ("mean", "std") if field in cfg}
        sizes = {"num_classes": config.num_classes, "num_samples": config.train_num_samples}
        part = {"val_data": config.val_data, "download": config.download}
        allow_pixels(config.max_pixels)
        decode_with(config.decode, self.runner.device, config.num_workers)
        prepare["in_chans"] = config.in_chans
        self.data: Data = load_data(config.data, img_size, config.val_fraction, **part, **sizes, **prepare)
        train = self.data.train
        train.seed, train.finish = config.seed, training_finish(config, self.data.preprocess.mean)
        train.augment = training_crop(config, self.data.preprocess.hw) or train.augment
        if config.progressive_size is not None and config.progressive_size > img_size:
            raise InputError(f"progressive_size must be at most img_size {img_size}, got {config.progressive_size}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "classifier is re-initialised")  # that is what training is for
            model = create_model(
                config.model,
                pretrained=source or False,
                num_classes=len(self.data.classes),
                in_chans=config.in_chans,
                drop_rate=config.drop_rate,
                drop_path_rate=config.drop_path_rate,
                bn_momentum=config.bn_momentum,
                bn_eps=config.bn_eps,
                fused=config.fused,
            )
        if classes != model.num_classes:
            # The release's classifier starts at +-1 / sqrt(classes): fine for 1000, but with 10 the first logits are so
            # large and wrong that it takes hundreds of steps to unlearn them (12 epochs of the digits at lr 3e-3: 81 %
            # so, 97 % from zero).
            torch.nn.init.zeros_(model.classifier.weight)
        model = self.runner.place(model)
        if config.sync_bn:
            model = synchronize_batch_norm(model)
        if config.freeze_until is not None:
            until = int(config.freeze_until) if config.freeze_until.isdigit() else config.freeze_until
            freeze(model, until, bn={"all": True, "weights": "weights", "none": False}[config.freeze_bn])
        return model

    def _val_loader(self):
        return self.runner.batches(
            self.data.val, self.val_batch_size, self.config.num_workers, unreadable=self.unreadable
        )

    def _labels(self, name):
        if not isinstance(self.data.train, ImageSet):
            raise InputError(
                f"{name} needs to know the training images' classes, which a webdataset tells only as it is read"
            )
        return torch.tensor(self.data.train.labels)

    def _class_weights(self):
        """fp32 [classes] on the device, or None."""
        given, classes = self.config.class_weights, len(self.data.classes)
        if given is None:
            return None
        if given == "balanced":
            counts = self._labels("class_weights balanced").bincount(minlength=classes).float()
            return (counts.sum() / (classes * counts.clamp(min=1))).to(self.runner.device)
        try:
            weights = torch.tensor([float(part) for part in given.split(",")])
        except ValueError:
            weights = torch.tensor([])
        if len(weights) != classes or not (weights.isfinite() & (weights >= 0)).all() or not weights.any():
            raise InputError(
                f"class_weights must be balanced, or {classes} numbers >= 0 with commas between, got {given!r}"
            )
        return weights.to(self.runner.device)

    def _order(self, config):
        place = (self.processes.rank, self.processes.world)
        labels = self._labels("sampler balanced") if config.sampler == "balanced" else None
        return TrainingOrder(
            len(self.data.train), config.batch_size, config.grad_accum_steps, *place, config.seed, self.img_size, labels
        )

    def img_size(self, epoch: int) -> int | tuple[int, int]:
        """The pixels of the training images of an epoch: the model's.

        With ``progressive_size`` they grow from it to the model's in equal stages, in multiples of 8.
        """
        config, last = self.config, self.data.preprocess.img_size
        stage = min(config.progressive_stages - 1, epoch * config.progressive_stages // config.epochs)
        if config.progressive_size is None or stage == config.progressive_stages - 1:
            return last
        size = config.progressive_size + (last - config.progressive_size) * stage / (config.progressive_stages - 1)
        return max(8, round(size / 8) * 8)

    # Training

    def run(self) -> Evaluation:
        """Train to the end, print as it goes, and return the evaluation of the final weights on the held-out images."""
        from tqdm import tqdm

        # The bar is redrawn after so many seconds: a log file needs no film.
        total, interval = self.config.epochs * self.steps, 0.1 if sys.stderr.isatty() else 5
        self.log = Log(self.output, self.step, self.config.tensorboard) if self.processes.first else None
        if self.log and self.history:
            self.log.rewrite(self.history)
        self._announce()
        self._compile_kernels()
        self._write_samples()
        bar = tqdm(
            total=total,
            initial=self.step,
            unit="batch",
            mininterval=interval,
            dynamic_ncols=True,
            disable=not self.processes.first,
        )
        evaluation = None
        with (
            bar,
            self._noticing_signals(),
            lost_process(self.processes, self._how_to_continue),
            closing(self.loader),
            self._closing_val_loader(),
        ):
            self.bar = bar
            while len(self.history) < self.config.epochs and not self._stays():
                epoch = len(self.history)
                if self.step < (epoch + 1) * self.steps:
                    self._train_epoch(epoch)
                evaluation = self._finish_epoch(epoch)
        del self.bar
        release(self.forward)
        if evaluation is None:  # resumed after its end
            row = self.history[-1]
            evaluation = Evaluation(row["val_loss"], row["val_correct"], row["val_total"])
        if self.processes.first:
            with self._writing("curves"), replacing(self.output / "curves.png") as path:
                plot_curves(self.history, path)
            best = max(self.history, key=lambda row: row["val_acc"])
            self.say(f"checkpoint  {self.output / 'last.safetensors'}")
            self.say(
                f"best        {100 * best['val_acc']:.2f} % in epoch {best['epoch']}, "
                f"{self.output / 'best.safetensors'}"
            )
            self.say(
                f"time        {sum(row['seconds'] for row in self.history):.0f} s of training, {self.skipped} updates "
                "left out"
            )
            self.say(f"test accuracy: {evaluation}")
        return evaluation

    def _stays(self) -> bool:
        """Whether the accuracy has not risen for the epochs of ``early_stop``."""
        patience, waited = self.config.early_stop, epochs_without_gain([row["val_acc"] for row in self.history])
        if patience is None or waited < patience:
            return False
        if self.processes.first:
            self.say(f"early stop  {waited} epochs without a better held-out accuracy")
        return True

    def _train_epoch(self, epoch):
        config, first = self.config, self.step - epoch * self.steps
        self.order.begin(epoch, first)
        self.model.train()
        batches = iter(self.loader)
        for step in range(first, self.steps):
            started, waited = time.perf_counter(), self.loader.wait
            self._update(batches)
            self.compiled.add(self.img_size(epoch))
            self.step += 1
            self.seconds["epoch"] += time.perf_counter() - started
            self.seconds["wait"] += self.loader.wait - waited
            self._log_step(epoch, step)
            if self.processes.any(self.signal is not None):
                self._save_and_leave()
            if config.checkpoint_interval and self.step % config.checkpoint_interval == 0 and step + 1 < self.steps:
                self._save_state()

    def _update(self, batches):
        """One update of the weights from ``grad_accum_steps`` batches."""
        config = self.config
        lr = self._learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        buffers = (
            [buffer.clone() for buffer in self.model.buffers()]
            if config.skip_nonfinite or self.scaler.is_enabled()
            else None
        )
        try:
            loss = self._gradients(batches)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not out_of_memory(error):
                raise
            half = max(1, config.batch_size // 2)
            raise TrainingStopped(
                f"out of memory with batches of {config.batch_size}: try --batch-size {half} --grad-accum-steps "
                f"{config.grad_accum_steps * config.batch_size // half}, or --auto-batch; {self._how_to_continue()}"
            ) from error
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        # The norm is the same in every process, since the gradients are. The loss is not, but the norm decides for it
        # too: a loss that is not finite has no finite gradient.
        self.norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        finite = bool(torch.isfinite(self.norm))
        if finite or self.scaler.get_scale() > 1.0:  # under loss scaling, an overflow only asks for a smaller scale
            if finite and config.clip_grad is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_grad, self.norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self._not_finite(loss)
        if not finite:
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):  # BatchNorm has seen the batch
                buffer.copy_(before)
        else:
            if self.average is not None:
                self.average.update_parameters(self.model)
            for sums in self.sums.values():
                sums += torch.stack([loss, torch.ones_like(loss)])

    def _learning_rate(self, step):
        return learning_rate(self.config, step, self.steps, self.order.images, [row["val_acc"] for row in self.history])

    def _gradients(self, batches):
        """The mean loss of the accumulated batches. Their gradients are in the parameters afterwards."""
        accum = self.config.grad_accum_steps
        loss = torch.zeros((), device=self.runner.device)
        self.optimizer.zero_grad(set_to_none=not self.config.cuda_graphs)
        for a in range(accum):
            images, labels = next(batches)
            if self.mix:
                images, labels = self.mix(images, labels)
            with without_reduction(self.forward, a + 1 < accum):
                loss += self.forward_backward(images, labels)
        return loss

    def _forward_backward(self, images, labels):
        """A batch's share of the loss. Its share of the gradients is added to those in the parameters."""
        with self.runner.autocast():
            logits = self.forward(images)
        loss = (
            F.cross_entropy(logits.float(), labels, self.class_weights, label_smoothing=self.config.label_smoothing)
            / self.config.grad_accum_steps
        )
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _not_finite(self, loss):
        self.skipped += 1
        epoch, step = divmod(self.step, self.steps)
        names = self.loader.names(epoch, step)
        what = f"loss {loss.item():.4g}, gradient norm {self.norm.item():.4g}"
        where = (
            f"step {self.step + 1} (epoch {epoch + 1}, batch {step + 1}: "
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        )
        if self.skipped > self.config.skip_nonfinite:
            already = f" after {self.skipped - 1} others that were left out" if self.skipped > 1 else ""
            raise TrainingStopped(
                f"{what} in {where}{already}: a lower --lr or --clip-grad may help, --skip-nonfinite leaves such "
                "updates out; " + self._how_to_continue()
            )
        self.say(f"left out, {self.skipped} of at most {self.config.skip_nonfinite}: {what} in {where}")

    @contextmanager
    def _closing_val_loader(self):
        """The one that there is at the end."""
        try:
            yield
        finally:
            self.val_loader.close()

    def _evaluate(self, epoch) -> Evaluation:
        """Of the held-out images, in batches that fit the memory: their size changes no figure, and each process may
        have its own.
        """
        alone = self.processes.world == 1  # several processes would have to agree, batch by batch
        while True:
            try:
                return self.runner.evaluate(self.evaluated, self.val_loader, lambda: alone and self.signal is not None)
            except InterruptedError:
                self._save_and_leave()
            except InputError as error:  # images that cannot be read
                raise InputError(f"{error}; epoch {epoch + 1} is trained: {self._how_to_continue()}") from error
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if self.val_batch_size == 1:
                    raise TrainingStopped(
                        f"out of memory with one held-out image; {self._how_to_continue()}"
                    ) from error
            self.val_loader.close()
            self.val_batch_size //= 2
            self.val_loader = self._val_loader()
            self.say(f"out of memory: evaluation goes on in batches of {self.val_batch_size}")

    def _finish_epoch(self, epoch) -> Evaluation:
        self._save_state()  # whatever becomes of the evaluation, the epoch is not trained again
        for model in self._models():
            share_running_statistics(model, self.processes, self.config.dist_bn)
        evaluation = self._evaluate(epoch)
        images = self.steps * self.order.images
        row = {
            "epoch": epoch + 1,
            "train_loss": self._mean(self.sums["epoch"]),
            "val_loss": evaluation.loss,
            "val_acc": evaluation.accuracy,
            "val_acc5": evaluation.accuracy5,
            "val_correct": evaluation.correct,
            "val_total": evaluation.total,
            "lr": self._learning_rate(self.step - 1),
            "images_per_s": images / self.seconds["epoch"],
            "data_wait": self.seconds["wait"] / self.seconds["epoch"],
            "seconds": self.seconds["epoch"],
        }
        self.history.append(row)
        self.sums["epoch"].zero_()
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        if self.processes.first:
            self._save_weights(row)
        self._save_state()
        if self.log:
            with self._writing("the epoch's row"):
                self.log.epoch(self.history, self.step)
            self.say(
                f"epoch {epoch + 1:3d}/{self.config.epochs}  train loss {row['train_loss']:.3f}  held-out loss "
                f"{evaluation.loss:.3f}  "
                f"accuracy {100 * evaluation.accuracy:6.2f} %  {row['images_per_s']:.0f} images/s, "
                f"{100 * row['data_wait']:.0f} % waiting"
            )
        return evaluation

    def _log_step(self, epoch, step):
        self.bar.update()
        if self.step % self.config.log_interval:
            return
        loss = self._mean(self.sums["row"])
        self.sums["row"].zero_()
        if self.log:
            rate = (step + 1) * self.order.images / self.seconds["epoch"]
            self.bar.set_postfix_str(f"epoch {epoch + 1}/{self.config.epochs}, loss {loss:.3f}", refresh=False)
            lr = self._learning_rate(self.step - 1)
            row = {"step": self.step, "epoch": epoch + 1, "loss": loss, "lr": lr, "grad_norm": self.norm.item()}
            with self._writing("the update's row"):
                self.log.step(row | {"images_per_s": rate, "data_wait": self.seconds["wait"] / self.seconds["epoch"]})

    @property
    def evaluated(self) -> torch.nn.Module:
        """The model whose weights are evaluated and kept: the average, or the trained one where there is none."""
        return self.model if self.average is None else self.average.module

    def _mean(self, sums):
        """The mean loss over all processes, each of which has the sum and the number of its own batches."""
        total, count = self.processes.sum(sums.double()).tolist()
        return total / count if count else math.nan

    def say(self, text: str) -> None:
        """Print a line, above the progress bar where there is one."""
        if not self.processes.first:
            text = f"process {self.processes.rank}: {text}"
        if getattr(self, "bar", None) is not None:
            self.bar.write(text)
        else:
            print(text)
        sys.stdout.flush()

    # Nothing lost

    def _metadata(self):
        return {"classes": self.data.classes, "preprocess": asdict(self.data.preprocess)}

    def _save_weights(self, row):
        metadata = self._metadata() | {"epoch": row["epoch"], "metrics": row}
        with self._writing("weights"):
            save_checkpoint(self.evaluated, self.output / "last.safetensors", **metadata)
            if row["val_acc"] > max((earlier["val_acc"] for earlier in self.history[:-1]), default=-1.0):
                save_checkpoint(self.evaluated, self.output / "best.safetensors", **metadata)

    @contextmanager
    def _writing(self, what):
        """Within, a file that cannot be written ends the run, with what it was and how to go on."""
        try:
            yield
        except OSError as error:
            raise TrainingStopped(f"cannot write {what}: {error}; {self._how_to_continue()}") from error

    def _save_state(self):
        # What differs between processes: random numbers, and running statistics until they are shared.
        local = {
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.runner.device.type == "cuda" else None,
            "sums": {name: sum_.cpu() for name, sum_ in self.sums.items()},
            "unreadable": self.unreadable.seen,
        }
        if self.processes.world > 1:
            local["buffers"] = [{k: v.cpu() for k, v in model.named_buffers()} for model in self._models()]
        everyone = self.processes.gather(local)
        if not self.processes.first:
            return
        self.states.save(
            {
                "step": self.step,
                "model": self.model.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "processes": everyone,
                "order": self._order_description(),
                "history": self.history,
                "seconds": self.seconds,
                "skipped": self.skipped,
                "settings": asdict(self.config),
                "metadata": describe_model(self.model) | self._metadata(),
            }
        )

    def _models(self):
        return [self.model] if self.average is None else [self.model, self.average.module]

    def _order_description(self):
        description = {
            "images an update": self.order.images,
            "updates an epoch": self.steps,
            "processes": self.processes.world,
        }
        return description | self.loader.description

    def _resume(self) -> bool:
        path = self.config.resume
        state = None
        if path == "auto":

            def newest():
                nonlocal state
                found, state = self.states.newest(self.say) or (None, None)
                return found

            path = self.processes.by_first(newest)
            if path is None:
                return False
        if state is None:
            state = read_state(path)
        stored, ours = (
            _flat(described) for described in (state["metadata"], describe_model(self.model) | self._metadata())
        )
        for field in ("name", *ours):  # the name first: it explains the rest
            if field != "preprocess" and stored[field] != ours[field]:
                raise InputError(
                    f"resume {str(path)!r} was trained with {field} {stored[field]!r}, but this run has {ours[field]!r}"
                )
        for what, value in self._order_description().items():
            if state["order"].get(what) != value:
                raise InputError(
                    f"resume {str(path)!r} was trained with {state['order'].get(what)} {what}, but this run has {value}"
                )
        done = len(state["history"])
        if self.config.resume != "auto" and done >= self.config.epochs:
            raise InputError(
                f"resume {str(path)!r} has {done} epochs behind it; epochs must be more, got {self.config.epochs}"
            )
        if (state["average"] is None) != (self.average is None):
            raise InputError(
                f"resume {str(path)!r} was trained {'without' if state['average'] is None else 'with'} model_ema"
            )
        # The state of the one is none of another's; the others are for the beginning.
        for name in ("opt", "pretrained", "freeze_until"):
            before, now = (settings.get(name) for settings in (state["settings"], vars(self.config)))
            if before != now:
                raise InputError(f"resume {str(path)!r} was trained with {name} {before!r}, but this run has {now!r}")
        for name, value in state["settings"].items():
            if (
                name not in FREE_SETTINGS
                and (now := getattr(self.config, name, None)) != value
                and self.processes.first
            ):
                idle = unused(self.config).get(name)
                what = f"is {now!r} from here on" if idle is None else f"is {now!r}, without effect: the run has {idle}"
                self.say(f"resume: {name} was {value!r}, {what}")
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        try:
            self._load_optimizer(state)
        except ValueError as error:
            raise InputError(f"resume {str(path)!r} has another optimizer: {error}") from error
        if state["scaler"]:  # empty where the run had no amp fp16
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.history, self.skipped = state["step"], state["history"], state["skipped"]
        self.seconds = state["seconds"]
        local = state["processes"][self.processes.rank]
        self.unreadable.seen = local["unreadable"]
        self.sums = {name: sum_.to(self.runner.device) for name, sum_ in local["sums"].items()}
        for model, buffers in zip(self._models(), local.get("buffers", ()), strict=False):
            model.load_state_dict(buffers, strict=False)
        torch.set_rng_state(local["rng"])
        if local["cuda_rng"] is not None and self.runner.device.type == "cuda":
            torch.cuda.set_rng_state(local["cuda_rng"])
        if self.processes.first:
            epoch, step = divmod(self.step, self.steps)
            self.say(f"resumed     {path}: epoch {epoch + 1}, batch {step + 1}")
        return True

    def _load_optimizer(self, state):
        """The moments of the parameters, and the settings of this run, whose groups may be others: layer_decay makes
        them.

        Raises ValueError where the moments are not those of the parameters that are trained.
        """
        ours = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        layer_decay = state["settings"].get("layer_decay", 1.0)
        theirs = parameter_groups(self.model, self.config.lr, self.config.weight_decay, layer_decay)
        stored = state["optimizer"]
        sizes = [[len(group["params"]) for group in groups] for groups in (theirs, stored["param_groups"])]
        if sizes[0] != sizes[1]:
            raise ValueError(f"it has groups of {sizes[1]} parameters, and this run of {sizes[0]}")
        index = {
            id(p): i
            for group, saved in zip(theirs, stored["param_groups"], strict=True)
            for p, i in zip(group["params"], saved["params"], strict=True)
        }
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            i: stored["state"][index[id(p)]] for i, p in enumerate(parameters) if index[id(p)] in stored["state"]
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        for group, settings in zip(self.optimizer.param_groups, ours, strict=True):
            group.update(settings)

    def _check_output(self):
        """Find out before any work whether files can be written."""
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            with replacing(self.output / "writable") as probe:
                probe.write_bytes(b"x")
            (self.output / "writable").unlink()
        except OSError as error:
            raise InputError(f"output {str(self.output)!r} cannot be written: {error.strerror or error}") from error

    def _set_aside(self):
        """Move an old run's checkpoints out of the way of a new run in the same folder.

        They must not be taken for the new run's own, nor be lost.
        """
        if self.states.paths():
            number = next(n for n in itertools.count(1) if not (self.output / f"checkpoints.old{n}").exists())
            old = self.output / f"checkpoints.old{number}"
            os.replace(self.states.folder, old)
            self.say(f"note        the checkpoints of an earlier run are now in {old}")

    def _how_to_continue(self):
        last = next(iter(self.states.paths()), None)
        return (
            f"the last good checkpoint is {last}, continue with --resume auto" if last else "no checkpoint exists yet"
        )

    @contextmanager
    def _noticing_signals(self):
        """Within, a process that is asked to stop finishes its update, together with the others, and saves its state.

        Asked again, it leaves at once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        pid, before = os.getpid(), {}

        def notice(signum, frame):
            # This is a worker of the data loader. Ctrl-C reaches it too, and the last update may need its images.
            if os.getpid() != pid:
                if signum == signal.SIGTERM:
                    os._exit(128 + signum)
                return
            # torchrun sends SIGTERM after a Ctrl-C; that is not asking again.
            signal.signal(signum, before[signum])
            if self.config.compile and self.img_size(len(self.history)) not in self.compiled:
                # Compiling takes minutes, and a Ctrl-C ends the compiler too, so the update is not waited for.
                signal.raise_signal(signum)
            else:
                self.signal = signum

        before.update({signum: signal.signal(signum, notice) for signum in (signal.SIGINT, signal.SIGTERM)})
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _save_and_leave(self):
        self._save_state()
        raise Interrupted(self.signal or signal.SIGTERM, next(iter(self.states.paths()), None))

    def _fit_memory(self) -> TrainConfig:
        """The configuration whose batch fits the memory of every process.

        The batch is halved, and twice as many are accumulated, until a forward and a backward succeed.
        """
        config = self.config
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        # What the optimizer and the average will take.
        reserved = [torch.zeros_like(p) for p in self.model.parameters() for _ in range(2 + config.model_ema)]
        while True:
            try:
                with torch.random.fork_rng():
                    images = torch.zeros(
                        config.batch_size, config.in_chans, *self.data.preprocess.hw, dtype=torch.uint8
                    )
                    batch = self.runner.to_device(
                        images, torch.zeros(config.batch_size, dtype=torch.long), self.data.preprocess
                    )
                    with self.runner.autocast():
                        logits = self.model.train()(batch[0])
                    F.cross_entropy(logits.float(), batch[1]).backward()
                fits = True
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                fits = False
            self.model.zero_grad()
            if self.runner.device.type == "cuda":
                torch.cuda.empty_cache()
            too_large = self.processes.sum(torch.tensor(0.0 if fits else 1.0, device=self.runner.device)).item()
            if not too_large:
                break
            if config.batch_size % 2 or config.batch_size < 4:
                raise InputError(
                    f"auto_batch: not even batches of {config.batch_size} images fit the memory, and that cannot be "
                    "halved"
                )
            config = replace(config, batch_size=config.batch_size // 2, grad_accum_steps=2 * config.grad_accum_steps)
        del reserved
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        if self.processes.first:
            self.say(f"auto-batch  {config.batch_size} images at a time, {config.grad_accum_steps} accumulated")
        return config

    # What is printed and kept besides

    def _announce(self):
        if not self.processes.first:
            return
        (height, width), config = self.data.preprocess.hw, self.config
        images = torch.zeros(2, config.in_chans, height, width, device=self.runner.device).to(
            memory_format=self.runner.memory_format
        )
        with self.runner.autocast():
            backend = describe_backend(self.model.train(), images)
        device = self.runner.device
        where = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        if self.processes.world > 1:
            where = f"{self.processes.world} processes, {where}"
        counts = f"{self.data.train.size} training and {self.data.val.size} held-out images"
        print(
            f"model       {config.model}, {count_parameters(self.model):,} parameters, {len(self.data.classes)} classes"
        )
        print(f"data        {config.data}, {counts}, {height} x {width}")
        print(f"device      {where}, amp {config.amp}")
        print(f"backend     {backend}")
        print(f"output      {self.output}", flush=True)

    def _compile_kernels(self):
        """In parallel, before the first update; of several processes on a machine the first one compiles for all."""
        together = self.processes.world > 1 and self.config.sync_bn  # no process can run a step alone
        if self.runner.device.type != "cuda" or self.config.compile or together:
            return
        if self.processes.local_rank == 0:
            size = self.data.preprocess.hw
            images = torch.zeros(self.config.batch_size, self.config.in_chans, *size, device=self.runner.device)
            with self.runner.autocast():
                compile_kernels(self.model, images.to(memory_format=self.runner.memory_format), training=True)
        if self.processes.world > 1:
            torch.distributed.barrier()

    def _write_samples(self):
        """Write one held-out digit of each class as a PNG, for ``predict``."""
        if not self.config.data.startswith("digits") or not self.processes.first:
            return
        from PIL import Image

        folder = self.output / "samples"
        folder.mkdir(exist_ok=True)
        for label, name in enumerate(self.data.classes):
            image = self.data.val.images[self.data.val.labels.index(label)]
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")


def _for_processes(config, device, world):
    """The configuration of one process of ``world`` on ``device``. Raises InputError for what these cannot do."""
    if config.sync_bn and world == 1:
        raise InputError(
            "sync_bn needs several processes (torchrun --nproc-per-node N -m efficientnet train ...), this run has one"
        )
    if config.cuda_graphs:
        never = {
            "a CUDA device, and this run is on the CPU": device.type != "cuda",
            f"one process, and this run has {world}": world > 1,
            f"images of one size, and progressive_size is {config.progressive_size}": config.progressive_size
            is not None,
            "a model that is not compiled, and compile is on": config.compile,
        }
        for what in (what for what, given in never.items() if given):
            raise InputError(f"cuda_graphs needs {what}; leave --cuda-graphs out")
    if config.compile and device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        never = {
            f"a C++ compiler, and there is no {compiler} (CXX names another)": shutil.which(compiler) is None,
            "Python's C headers (Debian: python3-dev)": not Path(sysconfig.get_path("include"), "Python.h").is_file(),
        }
        for what in (what for what, given in never.items() if given):
            raise InputError(f"compile needs {what}; leave --compile out")
    if config.global_batch_size is None:
        return config
    parts = world * config.grad_accum_steps
    if config.global_batch_size % parts or config.global_batch_size < 2 * parts:
        raise InputError(
            f"global_batch_size must be divisible into batches of 2 or more for {world} processes x "
            f"{config.grad_accum_steps} accumulated, "
            f"got {config.global_batch_size}; try {max(2, math.ceil(config.global_batch_size / parts)) * parts}"
        )
    return replace(config, batch_size=config.global_batch_size // parts)


def _compiled(model, device):
    # On the CPU every kernel would be a C++ file of its own, which takes half a second for the kernel and seconds for
    # its headers. Where the code that calls them is C++ too, all are one file.
    return torch.compile(model, options={"cpp_wrapper": True} if device.type == "cpu" else None)


def _pretrained(config):
    """(source, number of classes, how images are prepared) of the weights that ``config.pretrained`` names."""
    network = EfficientNetConfig.from_name(config.model)
    source, cfg = resolve(network.name, True if config.pretrained == "default" else config.pretrained)
    weights = read_weights(source)
    return source, weights.num_classes(network), cfg or stored_cfg(weights.metadata) or {}


def _flat(description):
    return {**description["config"], **{key: value for key, value in description.items() if key != "config"}}
