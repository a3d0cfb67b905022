"""Freed memory is kept for the next tensors where the command line runs, unless somebody says otherwise."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from efficientnet import cli, memory

FAULTS = """
import resource
import torch
{before}
for i in range(18):
    if i == 15:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(40 * 2**20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
KEEP = "from efficientnet.memory import keep_freed_memory; assert keep_freed_memory() and keep_freed_memory()"


def glibc():
    return sys.platform == "linux" and "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")


def faults(before, **environment):
    """Pages that three tensors of 40 MB fetch, one after the other, where fifteen were freed before."""
    code = FAULTS.format(before=before)
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=mine | environment, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not glibc(), reason="only glibc can be told to keep memory")
def test_freed_memory_is_not_fetched_again():
    importing = "import efficientnet, efficientnet.memory, efficientnet.cli"
    assert faults(KEEP) < 20 < faults(importing), "told, and only imported"


@pytest.mark.parametrize(
    "name, value", [("MALLOC_TRIM_THRESHOLD_", "1000"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=4096")]
)
def test_what_the_user_set_stays(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("asked the C library"))
    assert not memory.keep_freed_memory.__wrapped__()


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_have_no_such_setting(monkeypatch, platform):
    monkeypatch.setattr(memory.sys, "platform", platform)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("asked the C library"))
    assert not memory.keep_freed_memory.__wrapped__()


def test_musl_has_none_either(monkeypatch):
    for name in (*memory.ENVIRONMENT, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed_memory.__wrapped__()


@pytest.mark.parametrize("refused", [None, -1, -4])
def test_it_says_whether_it_was_told(monkeypatch, refused):
    for name in (*memory.ENVIRONMENT, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    library = SimpleNamespace(mallopt=lambda parameter, value: int(parameter != refused))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    assert memory.keep_freed_memory.__wrapped__() == (refused is None)


@pytest.mark.parametrize("options, expected", [([], 1), (["--keep-memory"], 1), (["--no-keep-memory"], 0)])
def test_the_command_line_keeps_it(monkeypatch, capsys, options, expected):
    calls = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: calls.append(1))
    assert cli.main(["info", "efficientnet_b0", *options]) == 0
    assert len(calls) == expected
