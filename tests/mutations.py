"""Does a test notice? Deliberate faults of one line in kernels and launchers, each against the test that should fail
for it.

    python tests/mutations.py [--only WORD] [--jobs 2]

Each fault is made in a copy of the tree (the first place where its text stands), and the test runs there in Triton's
interpreter: "caught" if it fails, "missed" if it passes, "stale" if the text is no longer there. Exit code 1 unless all
are caught.
"""

import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = "tests/effkernels/"
DEPTHWISE = "test_modules.py::test_depthwise_conv_bn_act[cpu-args0-kwargs0-autocast0-True]"
BATCHNORM = "test_reference.py::test_bn_act_add"
SUMS = "test_batchnorm.py::test_backward_in_one_launch"
FORWARD = "kernels/pointwise_forward.py"
PRODUCT = "test_pointwise_forward.py::test_product[cpu-2-9-10-24-40-bfloat16-copy]"
STATISTICS = "test_pointwise_forward.py::test_statistics[cpu-3-5-7-12-10-bfloat16-live]"
SLICES = "test_pointwise_forward.py::test_several_slices_of_columns[cpu-fragments]"
GATES = "test_pointwise_forward.py::test_inference_epilogue[cpu-17-2-2-70-33-bfloat16-copy]"
DEPTHWISE_PRODUCTS = "test_depthwise.py::test_forward_by_products"
TWO_ROWS = "test_depthwise.py::test_backward_with_two_rows_an_iteration"
BLOCK = "test_modules.py::test_mbconv_in_training[cpu-8-8-3-1-6-0.5-symmetric-silu-0.3-5-4-None]"
PROJECT = "test_project_backward.py::"
HARD_SWISH = "test_activations.py::test_derivative"


@dataclass(frozen=True)
class Fault:
    what: str
    file: str
    old: str
    new: str
    test: str


FAULTS = [
    # ---- convolution
    Fault(
        "taps mirrored",
        "kernels/depthwise_forward.py",
        "* K + j - o * STRIDE]",
        "* K + K - 1 - j + o * STRIDE]",
        DEPTHWISE,
    ),
    Fault(
        "padding on the wrong side",
        "kernels/depthwise_forward.py",
        "top, bottom, left, right = pads",
        "bottom, top, right, left = pads",
        DEPTHWISE,
    ),
    Fault(
        "height's padding for the width",
        "geometry.py",
        "*pad_amounts(width, kernel_size, stride, padding)",
        "*pad_amounts(height, kernel_size, stride, padding)",
        DEPTHWISE,
    ),
    Fault(
        "dgrad of the other rows of a stride",
        "kernels/depthwise_backward.py",
        "if i // K % STRIDE == r:",
        "if i // K % STRIDE != r:",
        DEPTHWISE,
    ),
    Fault(
        "a wgrad row off",
        "kernels/depthwise_backward.py",
        "if (W0 + i // K) % STRIDE == r:",
        "if (W0 + i // K + 1) % STRIDE == r:",
        DEPTHWISE,
    ),
    Fault(
        "a row of the next program counted as well",
        "kernels/depthwise_backward.py",
        "row_x = row_x & (t0 + u < TH + M - 1)",
        "row_x = row_x & (t0 + u < TH + M)",
        f"{TWO_ROWS}[cpu-3-1-1-9]",
    ),
    Fault(
        "two rows an iteration, but one further",
        "kernels/depthwise_backward.py",
        "off_dy += UNROLL * OW * C",
        "off_dy += OW * C",
        f"{TWO_ROWS}[cpu-5-1-2-8]",
    ),
    Fault(
        "a column beyond dy taken to be inside",
        "kernels/depthwise_backward.py",
        "min(OW - last + M - 1, cfg.TW",
        "min(OW - last + M, cfg.TW",
        f"{TWO_ROWS}[cpu-3-1-1-9]",
    ),
    Fault(
        "a column beyond x taken to be inside",
        "kernels/depthwise_backward.py",
        "min(W + left - last * stride,",
        "min(W + left + 1 - last * stride,",
        f"{TWO_ROWS}[cpu-3-2-2-11]",
    ),
    Fault(
        "padding activated",
        "kernels/depthwise_forward.py",
        "a * (in_x[j].to(tl.float32) * row_in)[:, None]",
        "a",
        BLOCK,
    ),
    Fault(
        "a product's taps not a stride apart",
        "kernels/depthwise_products.py",
        "+ k % 4 - STRIDE * (n % 2)",
        "+ k % 4 - n % 2",
        DEPTHWISE_PRODUCTS,
    ),
    Fault(
        "a product's padding activated",
        "kernels/depthwise_products.py",
        "shift = tl.where(in_x[2 * i + j], shift1, 0.0)",
        "shift = shift1",
        DEPTHWISE_PRODUCTS,
    ),
    Fault(
        "pooled sums of the first rows alone",
        "kernels/depthwise_products.py",
        "* chunks + g // groups) * strips_w",
        "* chunks) * strips_w",
        DEPTHWISE_PRODUCTS,
    ),
    Fault(
        "statistics of columns outside",
        "kernels/depthwise_products.py",
        "d = tl.where(in_y[4 * q + o], d, 0.0)",
        "d = d + 0.0",
        DEPTHWISE_PRODUCTS,
    ),
    # ---- BatchNorm
    Fault("a row too many", "kernels/batchnorm.py", "ok = (r < rows)[:, None]", "ok = (r <= rows)[:, None]", BATCHNORM),
    Fault("no eps", "kernels/batchnorm.py", "tl.sqrt(m2 / total + eps)", "tl.sqrt(m2 / total)", BATCHNORM),
    Fault(
        "momentum of the old value",
        "kernels/batchnorm.py",
        "old_mean + factor *",
        "old_mean + (1.0 - factor) *",
        BATCHNORM,
    ),
    Fault(
        "batches counted twice",
        "kernels/batchnorm.py",
        "tl.load(num_batches) + 1",
        "tl.load(num_batches) + 2",
        BATCHNORM,
    ),
    Fault("biased running variance", "kernels/batchnorm.py", "m2 / (total - 1.0)", "m2 / total", BATCHNORM),
    Fault(
        "unbiased variance to normalise",
        "kernels/batchnorm.py",
        "m2 / total + eps",
        "m2 / (total - 1.0) + eps",
        BATCHNORM,
    ),
    Fault("stale running statistics", "kernels/batchnorm.py", "if running_mean is not None:", "if False:", BATCHNORM),
    Fault(
        "cumulative average a batch late",
        "kernels/batchnorm.py",
        "1.0 / tl.load(num_batches)",
        "1.0 / (tl.load(num_batches) + 1)",
        "test_modules.py::test_cumulative_momentum",
    ),
    Fault(
        "tiles merged without Chan's term",
        "kernels/grouped_statistics.py",
        "- s1 * shift + delta * delta * count[:, None]",
        "- s1 * shift",
        DEPTHWISE,
    ),
    Fault(
        "gradient without the variance's rstd",
        "kernels/batchnorm.py",
        "k1 = -scale * rstd * dgamma",
        "k1 = -scale * dgamma",
        BATCHNORM,
    ),
    Fault(
        "a second image never started",
        "kernels/batchnorm.py",
        "apply_kernel[(triton.cdiv(C, cfg.BLOCK_C) * N *",
        "apply_kernel[(triton.cdiv(C, cfg.BLOCK_C) *",
        BATCHNORM,
    ),
    Fault(
        "an offset of 32 bits",
        "kernels/batchnorm.py",
        "n = (block // image_blocks).to(tl.int64)",
        "n = block // image_blocks",
        "test_memory.py::test_offsets_pass_2_to_the_31[not expanded]",
    ),
    # ---- the rest of the block
    Fault("no residual", "kernels/batchnorm.py", "if residual is not None:", "if False:", BATCHNORM),
    Fault(
        "drop-path forgotten in the backward",
        "kernels/batchnorm.py",
        "g = g * branch_factor(tl.load(branch_draws + n, mask=row_ok, other=0.0), keep)[:, None]",
        "g = g * 1.0",
        SUMS,
    ),
    Fault(
        "gate added",
        "kernels/pointwise_forward.py",
        "a = a.to(tl.float32) * load(gates",
        "a = a.to(tl.float32) + load(gates",
        GATES,
    ),
    # ---- forward of 1x1 convolutions
    Fault(
        "rows of the fragments in the order of memory",
        FORWARD,
        "return i // (16 * WARPS) * (16 * WARPS) +",
        "return i + 0 *",
        PRODUCT,
    ),
    Fault(
        "columns of a fragment in another order",
        FORWARD,
        "(0, 2, 1, 3, 5, 6, 4, 7)",
        "(0, 2, 1, 3, 5, 4, 6, 7)",
        PRODUCT,
    ),
    Fault(
        "columns of the copy in the order of memory",
        "kernels/weight_copies.py",
        "k // 2 % 4 * 8",
        "k // 8 % 4 * 8",
        PRODUCT,
    ),
    Fault("columns of weights that stay in the order of memory", FORWARD, "(0, 2, 3, 1, 4)", "(0, 1, 2, 3, 4)", SLICES),
    Fault("rows beyond the end counted", FORWARD, "d = tl.where(valid, d, 0.0)", "d += 0.0", STATISTICS),
    Fault(
        "threads' sums without Chan's term", FORWARD, "- s * shift + delta * delta * held", "- s * shift", STATISTICS
    ),
    Fault("a batch counted by each slice of columns", FORWARD, "start == 0", "start >= 0", SLICES),
    Fault(
        "sums without a pivot",
        FORWARD,
        "PIVOT=dtype == torch.float32",
        "PIVOT=False",
        "test_pointwise_forward.py::test_statistics_of_a_large_mean[cpu-float32-live]",
    ),
    Fault(
        "the gate of the tile's first image",
        FORWARD,
        "((base + row) // rows * K)",
        "((base + row * 0) // rows * K)",
        GATES,
    ),
    Fault(
        "rows beyond an image pooled",
        FORWARD,
        "acc = tl.where(ok, acc, 0.0)",
        "acc += 0.0",
        "test_pointwise_forward.py::test_pooled_head[cpu-3-5-7-12-10-bfloat16-live]",
    ),
    Fault(
        "the next tile's rows for this one's",
        FORWARD,
        "xs=next_xs,",
        "xs=xs,",
        SLICES,
    ),
    Fault(
        "rows past an image counted in the sums of slopes",
        "kernels/batchnorm.py",
        "dphi = tl.where(ok, dphi, 0.0)",
        "dphi *= 1.0",
        PROJECT + "test_gradients_and_sums[cpu-split-bf16]",
    ),
    Fault(
        "rows past an image left in the sums of slopes",
        "kernels/project_backward.py",
        "tl.sum(s2, 1) - outside,",
        "tl.sum(s2, 1),",
        PROJECT + "test_gradients_and_sums[cpu-fused-bf16]",
    ),
    Fault(
        "the gate of the image before",
        "kernels/project_backward.py",
        "gates + next_image * E",
        "gates + image * E",
        PROJECT + "test_many_programs_give_what_one_gives[cpu-fused]",
    ),
    Fault(
        "the weight in memory's order of channels",
        "kernels/project_backward.py",
        "c0 + index % 8 * V + index // 16 * 2 + index // 8 % 2",
        "c0 + index",
        PROJECT + "test_gradients_and_sums[cpu-fused-bf16]",
    ),
    Fault(
        "sums of y2 that is not centred",
        "kernels/batchnorm.py",
        "centred = v - mean",
        "centred = v",
        PROJECT + "test_a_mean_far_from_zero[cpu-14.0-split]",
    ),
    Fault(
        "the weight gradient of what has no gate",
        "kernels/batchnorm.py",
        "cast(phi * gate, q.dtype.element_ty)",
        "cast(phi, q.dtype.element_ty)",
        PROJECT + "test_gradients_and_sums[cpu-split-bf16]",
    ),
    Fault(
        "drop-path forgotten in dy",
        "kernels/project_backward.py",
        "scale *= branch_factor(tl.load(branch_draws + image), keep)",
        "scale *= 1.0",
        PROJECT + "test_draws_stand_for_factors",
    ),
    Fault(
        "pooled by parts, not pixels",
        "kernels/squeeze_excite.py",
        "* inverse_pixels\n",
        "/ parts\n",
        BLOCK,
    ),
    Fault(
        "a unit of the first channels only",
        "kernels/squeeze_excite.py",
        "parts=splits, n_stride=R",
        "parts=1, n_stride=R",
        "test_squeeze_excite.py::test_pool_and_gate",
    ),
    Fault(
        "the product of one image without the units before",
        "kernels/squeeze_excite.py",
        "acc + tl.sum(w * x, 1)[None, :]",
        "tl.sum(w * x, 1)[None, :]",
        "test_squeeze_excite.py::test_pool_and_gate",
    ),
    Fault("pooling's gradient not divided", "kernels/squeeze_excite.py", "acc *= inverse_pixels", "acc *= 1.0", BLOCK),
    Fault("sigmoid's derivative", "kernels/activation.py", "return g * (1.0 - g)", "return g", BLOCK),
    Fault(
        "Gram identity without the mean",
        "kernels/weight_gradients.py",
        "dw += load_vector(terms[0], e, me)[:, None] * load_vector(gram + I * I, i, mi)[None, :]",
        "dw += 0.0",
        BLOCK,
    ),
    Fault(
        "only the first step of partials",
        "kernels/weight_gradients.py",
        "for start in range(0, parts, BLOCK_P):",
        "for start in range(0, tl.minimum(parts, BLOCK_P), BLOCK_P):",
        "test_weight_gradients.py::test_all_layers_together[cpu-5-24-20-6-9-3-19-float32-False]",
    ),
    Fault(
        "images of one part alone",
        "kernels/weight_gradients.py",
        "part * images, last, BLOCK_N",
        "0, tl.minimum(N, images), BLOCK_N",
        "test_weight_gradients.py::test_all_layers_together[cpu-33-40-10-12-70-5-3-float32-False]",
    ),
    Fault(
        "bottleneck not activated",
        "kernels/weight_gradients.py",
        "activate(right, ACT, False)",
        "right",
        "test_weight_gradients.py::test_all_layers_together[cpu-2-130-66-33-4-9-1-float32-False]",
    ),
    Fault(
        "dx without the mean's term",
        "kernels/expand_backward.py",
        "constant = load_vector(c, i, mi)",
        "constant = 0.0 * load_vector(c, i, mi)",
        "test_expand_backward.py::test_input_far_from_zero",
    ),
    Fault(
        "G of the divided slopes",
        "kernels/expand_backward.py",
        "cast(acc * peak, dtype)",
        "cast(acc, dtype)",
        "test_expand_backward.py::test_right_operand",
    ),
    Fault(
        "the residual left out of the split form",
        "kernels/expand_backward.py",
        "inside = tl.where(before, inside, X_END + I - start)",
        "inside = tl.where(before, inside, E_ROWS + I - start)",
        "test_expand_backward.py::test_input_far_from_zero",
    ),
    Fault(
        "a split of gram takes another's tiles",
        "kernels/expand_backward.py",
        "for t in tl.range(pid, tiles, gram_splits, num_stages=STAGES):",
        "for t in tl.range(pid, tiles, splits, num_stages=STAGES):",
        "test_expand_backward.py::test_several_blocks_and_splits",
    ),
    # ---- stem, head, and the expansion inside the depthwise kernel
    Fault(
        "the stem's statistics without the pivot",
        "kernels/stem.py",
        "p.to(tl.int64) * N + c, pivot + moved",
        "p.to(tl.int64) * N + c, moved",
        "test_stem.py",
    ),
    Fault(
        "the stem counts rows outside",
        "kernels/stem.py",
        "tl.minimum(rows - row0, BLOCK_M).to(tl.float32)",
        "BLOCK_M * 1.0",
        "test_stem.py",
    ),
    Fault(
        "the head's gamma gradient without rstd",
        "kernels/pooled_norm.py",
        "tl.sum(s4, 0) * rstd",
        "tl.sum(s4, 0)",
        "test_head.py",
    ),
    Fault(
        "the head pools a row too many",
        "kernels/pooled_norm.py",
        "tl.sum(total, 0) / rows",
        "tl.sum(total, 0) / (rows + 1)",
        "test_head.py",
    ),
    Fault(
        "expanded padding not zero",
        "kernels/expand_depthwise.py",
        "a = tl.where(inside[:, None], a, 0.0)",
        "a = a * 1.0",
        "test_expand_depthwise.py",
    ),
    # ---- activations and what is shared
    Fault("SiLU's derivative", "kernels/activation.py", "s + phi * (1.0 - s)", "s + x * (1.0 - s)", HARD_SWISH),
    Fault("hard-swish's slope", "kernels/activation.py", "x * (1.0 / 3.0) + 0.5", "x * (1.0 / 6.0) + 0.5", HARD_SWISH),
    Fault(
        "a counter is not set back",
        "kernels/common.py",
        "tl.store(counter, 0)",
        "tl.store(counter, 1)",
        "test_squeeze_excite.py::test_gate_backward",
    ),
    Fault("bf16 truncated", "kernels/common.py", "(bits + 0x7FFF + ((bits >> 16) & 1))", "bits", PRODUCT),
    # ---- around the kernels
    Fault(
        "sm_80 refused",
        "dispatch.py",
        "capability < MIN_CAPABILITY",
        "capability <= MIN_CAPABILITY",
        "test_dispatch.py::test_platforms",
    ),
    Fault("a hook skipped", "dispatch.py", "if has_hooks(layer):", "if False:", "test_dispatch.py::test_hooks"),
]


def pytest(tree: Path, *tests: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        *(TESTS + test for test in tests),
    ]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)


def copy_tree(to: Path) -> Path:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)
    return to


def judged(fault: Fault) -> str:
    source = (ROOT / "effkernels" / fault.file).read_text(encoding="utf-8")
    if fault.old not in source:
        return "stale"
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder))
        (tree / "effkernels" / fault.file).write_text(source.replace(fault.old, fault.new, 1), encoding="utf-8")
        done = pytest(tree, fault.test)
    if done.returncode not in (0, 1):  # not a failed test: nothing collected, say
        return f"no answer (pytest's exit code {done.returncode})"
    return "caught" if done.returncode else "missed"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="faults whose name or file has this word")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default: 2)")
    args = parser.parse_args(argv)
    faults = [fault for fault in FAULTS if args.only in fault.what or args.only in fault.file]
    with tempfile.TemporaryDirectory() as folder:
        whole = pytest(copy_tree(Path(folder)), *dict.fromkeys(fault.test for fault in faults))
    if whole.returncode:
        print(whole.stdout[-3000:] + "\nwithout any fault a test fails already", file=sys.stderr)
        return 1
    answers = []
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for fault, answer in zip(faults, pool.map(judged, faults), strict=True):
            answers.append(answer)
            print(f"{answer:8} {fault.file:28} {fault.what}", flush=True)
    print(f"{answers.count('caught')} of {len(faults)} faults caught")
    return int(any(answer != "caught" for answer in answers))


if __name__ == "__main__":
    sys.exit(main())
