"""Functions run in processes of their own, forked from one that has imported everything: a tenth of a second each, not
several.
"""

import os
import socket
import sys
import time
from multiprocessing import connection, get_context, set_start_method
from pathlib import Path
from unittest.mock import patch

import matplotlib.figure  # noqa: F401
import PIL.Image
import torch

import effkernels.adapters.accelerate  # noqa: F401
from efficientnet.data.torchvision_modules import torchvision_module
from efficientnet.training.distributed import leave
from efficientnet.training.trainer import Trainer

torchvision_module("transforms.v2")
PIL.Image.init()
torch.set_num_threads(1)

_started = []


def start(target, *args, log=os.devnull, env=None):
    """A process that runs ``target(*args)``; what it prints is added to the file ``log``, what it returns is read by
    ``results``.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["__main__", "support.processes"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, target, args, str(log), env or {}))
    # The server, started with the first process, must find these.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        process.start()
    sender.close()
    process.receiver, process.log = receiver, log
    _started.append(process)
    return process


def start_group(world: int, target, *args, log=os.devnull) -> list:
    """Processes that find each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(target, *args, log=f"{log}.{rank}", env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]


def results(*processes, seconds=300) -> list:
    """What the processes return. Fails, and ends them all, as soon as one fails, or if one takes far longer than any
    may.
    """
    values, open_, deadline = (
        {},
        dict(zip([p.receiver for p in processes], processes, strict=True)),
        time.monotonic() + seconds,
    )
    try:
        while open_:
            ready = connection.wait(open_, max(0, deadline - time.monotonic()))
            assert ready, f"{len(open_)} of {len(processes)} processes neither returned nor ended in {seconds} s"
            for receiver in ready:
                process = open_.pop(receiver)
                try:
                    values[process] = receiver.recv()
                except EOFError:
                    pass
                process.join(max(1, deadline - time.monotonic()))
                said = "" if process.log == os.devnull else Path(process.log).read_text()[-2000:]
                assert process.exitcode == 0 and process in values, (
                    f"a process ended with exit code {process.exitcode}: {said}"
                )
    finally:
        end(processes)
    return [values[process] for process in processes]


def end(processes=None) -> None:
    """Of these processes, or of all that were ever started here, not one is left."""
    for process in _started[:] if processes is None else processes:
        process.kill()
        process.join()
        _started.remove(process)


def threads() -> list[str]:
    """The names of this process's threads."""
    return sorted(task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir())


def train(config):
    """A run: (rows of its epochs, running statistics and weights as they are in this process)."""
    trainer = Trainer(config)
    trainer.run()
    leave()
    return trainer.history, {key: value.numpy() for key, value in trainer.model.state_dict().items()}


def _child(sender, target, args, log, env):
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(env)
    set_start_method("fork", force=True)  # data workers start as they do in a user's process, which no server started
    try:
        value = target(*args)
    finally:
        leave()  # a program does so by itself at its exit, of which a forked process knows nothing
        assert not any("gloo" in name for name in threads()), f"threads of the process group are left: {threads()}"
    sender.send(value)
    sender.close()
