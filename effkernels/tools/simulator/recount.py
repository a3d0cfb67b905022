"""Every access of a small launch, counted from its machine code: the proof that emulation and Triton's interpreter see
the same.

All programs are emulated, one after the other, with true counters; ``effkernels.tools.traffic`` counts the same launch
in the interpreter."""

import math

import numpy as np

from effkernels.tools.simulator import emulate, project
from effkernels.tools.simulator.launch import code_of

_ATOMICS = {"ATOMG", "ATOM", "RED", "REDG"}
_STORES = {"STG", "ST"}


def recount(launch: project.Launch, arch: int = 90) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """{argument: ((distinct bytes read, written), (bytes of every load, of every store))}, for those that the launch
    touches."""
    code = code_of(launch, arch)
    constants = project.constants(launch, code, apart=True)
    tensors = {tensor.slot: tensor for tensor in project.tensors(launch, apart=True)}
    seen = {(slot, kind): np.zeros(tensor.storage_bytes, bool) for slot, tensor in tensors.items() for kind in (0, 1)}
    requested = dict.fromkeys(seen, 0)
    counters: dict[int, int] = {}
    for number in range(math.prod(launch.grid)):
        path = emulate.run(code, constants, launch.grid, number, record=True, counters=counters)
        for k, of in path.requests.items():
            i = code.instructions[k]
            kinds = (0, 1) if i.base in _ATOMICS else (1,) if i.base in _STORES else (0,)
            for addresses in of.addresses:
                slots = addresses >> project.SLOT_BITS
                for slot in np.unique(slots).tolist():
                    if slot not in tensors:
                        raise IndexError(f"{launch.name}: {i} touches no argument")
                    tensor = tensors[slot]
                    first = (slot << project.SLOT_BITS) + (1 << (project.SLOT_BITS - 1))
                    offsets = addresses[slots == slot] - first
                    if offsets.min() < 0 or offsets.max() + i.width > tensor.storage_bytes:
                        raise IndexError(
                            f"{launch.name}: {i} touches '{tensor.name}' outside of its {tensor.storage_bytes} bytes"
                        )
                    for kind in kinds:
                        requested[slot, kind] += offsets.size * i.width
                        for byte in range(i.width):
                            seen[slot, kind][offsets + byte] = True
    found: dict[str, tuple] = {}
    for slot, tensor in tensors.items():
        distinct = tuple(int(np.count_nonzero(seen[slot, kind])) for kind in (0, 1))
        if any(distinct):
            found[tensor.name] = distinct, tuple(requested[slot, kind] for kind in (0, 1))
    return found
