"""Triton's own launcher above a CUDA driver that starts nothing, so that a launch can be timed where there is no GPU.

``libcuda.so.1`` is compiled from the few functions below, which answer success. What runs above it is the code that
runs on a GPU: Triton's specialisation of arguments, its cache, and its launcher in C, up to ``cuLaunchKernelEx``.
"""

import contextlib
import ctypes
import functools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

# Every function of the driver that Triton's C code calls. Attributes are answered by what an H100 has of each that
# Triton asks for when it loads a kernel: registers and shared memory enough for all.
_SOURCE = """
#include "cuda.h"
static unsigned long long launches;
unsigned long long stand_in_launches(void) { return launches; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **e) { launches++; return 0; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)1; return 0; }
CUresult cuCtxSetCurrent(CUcontext c) { return 0; }
CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; return 0; }
CUresult cuCtxGetLimit(size_t *v, CUlimit l) { *v = 0; return 0; }
CUresult cuCtxSetLimit(CUlimit l, size_t v) { return 0; }
CUresult cuDeviceGet(CUdevice *d, int i) { *d = i; return 0; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) { *v = 232448; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)1; return 0; }
CUresult cuDriverGetVersion(int *v) { *v = 13010; return 0; }
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) { *v = 1024; return 0; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return 0; }
CUresult cuGetErrorString(CUresult e, const char **s) { *s = "the stand-in has no errors"; return 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *n) { *f = (CUfunction)1; return 0; }
CUresult cuModuleLoadData(CUmodule *m, const void *i) { *m = (CUmodule)1; return 0; }
CUresult cuModuleUnload(CUmodule m) { return 0; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; return 0; }
CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)v = p; return 0; }
"""


@functools.cache
def _library() -> tuple[str, ctypes.CDLL]:
    """(its folder, the library), compiled once a process."""
    compiler = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError("the stand-in driver is compiled from C, and there is neither gcc, clang nor cc")
    folder = tempfile.mkdtemp(prefix="effkernels-stand-in-")
    source, target = Path(folder, "cuda_stand_in.c"), Path(folder, "libcuda.so.1")
    source.write_text(_SOURCE, encoding="utf-8")
    include = Path(nvidia.__file__).parent / "include"
    command = [compiler, "-shared", "-fPIC", "-O2", f"-I{include}", "-Wl,-soname,libcuda.so.1", str(source)]
    found = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"the stand-in driver does not compile: {found.stderr}")
    library = ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)  # found by its name from now on
    library.stand_in_launches.restype = ctypes.c_ulonglong
    return folder, library


class StandInDriver(nvidia.CudaDriver):
    """Triton's driver for NVIDIA's GPUs, which finds one H100 and its default stream.

    starts: whether kernels can be started, or compiled only.
    """

    def __init__(self, starts: bool = True):
        if starts:
            super().__init__()
        self.get_device_capability = lambda device=None: (9, 0)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def _compile(source, target: GPUTarget, options: dict, **unused) -> triton.compiler.CompiledKernel:
    """Of triton.compile: a kernel without code, in no time, since nothing runs it."""
    options = triton.compiler.make_backend(target).parse_options(dict(options))
    unasked = dict.fromkeys(("global_scratch_size", "profile_scratch_size", "shared"), 0)
    aligned = dict.fromkeys(("global_scratch_align", "profile_scratch_align"), 1)
    fields = {"name": source.fn.__name__, "tmem_size": None, **unasked, **aligned, **options.__dict__}
    fields["target"] = {"backend": target.backend, "arch": target.arch, "warp_size": target.warp_size}
    with tempfile.TemporaryDirectory() as folder:
        metadata, code = Path(folder, "kernel.json"), Path(folder, "kernel.cubin")
        metadata.write_text(json.dumps(fields, default=str), encoding="utf-8")
        code.write_bytes(b"no code")
        return triton.compiler.CompiledKernel(source, {"kernel.json": metadata, "kernel.cubin": code}, "stand-in")


@contextlib.contextmanager
def compiling_for_h100() -> Iterator[None]:
    """Within: Triton compiles for an H100, where no GPU need be; nothing can be started."""
    with mock.patch.object(triton.runtime.driver, "_active", StandInDriver(starts=False)):
        yield


@contextlib.contextmanager
def standing_in() -> Iterator[Callable[[], int]]:
    """Within: kernels are started, without being compiled, on a GPU that does nothing. Yields what returns how many
    reached the driver so far.

    Raises RuntimeError where there is a GPU, whose driver would be called, or no C compiler.
    """
    if torch.cuda.is_available():
        raise RuntimeError("there is a GPU here: the stand-in driver is for machines without")
    folder, library = _library()
    with (
        mock.patch.object(triton.knobs.nvidia, "libcuda_path", folder),
        mock.patch.object(triton.runtime.driver, "_active", None),
        mock.patch.object(triton.compiler, "compile", _compile),
        mock.patch.object(triton.compiler.compiler, "max_shared_mem", lambda device: 232448),
    ):
        triton.runtime.driver.set_active(StandInDriver())
        yield library.stand_in_launches
