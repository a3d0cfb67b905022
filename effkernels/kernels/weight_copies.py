"""Weights of 1x1 convolutions in the dtype and order that the kernels multiply them in, written once a step from the
live parameters.

A parameter is fp32 [O, K, 1, 1] as a rule. Read as it is by every tile of a product, it costs twice the bytes, is
rounded again and goes through registers on its way to shared memory; a copy in the compute dtype is loaded there as it
lies. The forms of a copy:

    plain       [O, K]                     w[o, k]
    permuted    [O, ceil(K / 32), 32]      w[o, k(k')] at [o, k'], 0 for k >= K: the order of ``pointwise_forward``'s
                                           fragments; of three dimensions, so that none takes it for a plain one

In each 32 columns, counted in binary, k = (q1 q0 f h e) lies at k' = (f h q1 q0 e): q is the lane that loads 8
neighbouring values of k, f the step of 16 in which the tensor cores take them, h the half of that step, e the odd one
of a pair.

Nothing is kept from one step to the next, so nothing goes stale.
"""

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import weight_form
from effkernels.kernels.common import cast, sized_jit

BLOCK = 1024  # elements of a program


@triton.jit
def copy_block(weight, copy, O, K, block, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """Elements block * BLOCK ... of one copy."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    if FORM == "permuted":
        padded = tl.cdiv(K, 32) * 32
        o, k = at // padded, at % padded
        k = k // 32 * 32 + k // 2 % 4 * 8 + k // 16 % 2 * 4 + k // 8 % 2 * 2 + k % 2
        inside = o < O
    else:
        tl.static_assert(FORM == "plain")
        o, k = at // K, at % K
        inside = o < O
    w = tl.load(weight + o * K + k, mask=inside & (k < K), other=0.0)
    tl.store(copy + at, cast(w.to(tl.float32), copy.dtype.element_ty), mask=inside)


@sized_jit
def weight_copies_kernel(weights, copies, sizes, FORMS: tl.constexpr, BLOCK: tl.constexpr):
    """Block program_id(0) of copy program_id(1). sizes: 2 O + 1 and 2 K + 1 of each: Triton compiles again for a size
    of 1 or a multiple of 16 in a tuple, which such numbers never are.
    """
    for c in tl.static_range(len(FORMS)):
        if tl.program_id(1) == c:
            copy_block(
                weight=weights[c],
                copy=copies[c],
                O=sizes[2 * c] // 2,
                K=sizes[2 * c + 1] // 2,
                block=tl.program_id(0),
                FORM=tl.constexpr(FORMS[c]),  # Triton 3.6 takes a string out of a tuple as it is
                BLOCK=BLOCK,
            )


def weight_copies(wanted: list[tuple[torch.Tensor, str]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Copies in ``dtype`` of live weights, in one launch.

    wanted: a list of (weight [O, K, 1, 1] or [O, K], form), as many as there are, those of a block or of a whole
        network.

    Returns: for each the copy. A plain one that has the dtype already is the weight itself, [O, K].
    """
    results, todo = [], []
    for weight, form in wanted:
        O, K = weight.shape[:2]
        if form == "plain" and weight.dtype == dtype:
            results.append(weight.view(O, K))
            continue
        shape = {"plain": (O, K), "permuted": (O, triton.cdiv(K, 32), 32)}[form]
        results.append(weight.new_empty(shape, dtype=dtype))
        todo.append((weight, results[-1], (2 * O + 1, 2 * K + 1), form))
    if todo:
        weights, copies, sizes, forms = zip(*todo, strict=True)
        weight_copies_kernel[(triton.cdiv(max(copy.numel() for copy in copies), BLOCK), len(copies))](
            weights=weights, copies=copies, sizes=sum(sizes, ()), FORMS=forms, BLOCK=BLOCK, num_warps=4
        )
    return results


def forward_weights(
    wanted: list[tuple[torch.Tensor | None, int, bool]], dtype: torch.dtype, pool: bool = False
) -> list[torch.Tensor | None]:
    """What ``pointwise_forward`` is to be given of each (weight or None, rows of its product, whether it transforms x
    on load): a copy, made in one launch for all of them, where that makes it faster, else the live weight. ``pool`` and
    whether x is transformed must be what ``pointwise_forward`` will be told, since a copy's form does not show.
    """
    results = [weight for weight, *_ in wanted]
    chosen = {}
    for i, (weight, rows, transforms) in enumerate(wanted):
        if weight is not None:
            O, K = weight.shape[:2]
            form = weight_form(K=K, N=O, rows=rows, transforms=transforms, pool=pool, dtype=dtype)
            if form != "live":
                chosen[i] = (weight, form)
    for i, copy in zip(chosen, weight_copies(list(chosen.values()), dtype), strict=True):
        results[i] = copy
    return results
