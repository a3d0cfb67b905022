"""Launch configuration in one place: a frozen dataclass per kernel family and the analytic rule that fills it.

Imports no Triton. Every threshold below comes from compiling the kernels for sm_90 (registers, spills, instructions per
element; tests/effkernels/test_compile.py holds them to it); none has been measured on a GPU yet.
"""

import functools
from dataclasses import dataclass, replace

import torch

from effkernels.configs import tables
from effkernels.configs.gpus import GPUS
from effkernels.configs.tables import tuned


def processor_count(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device, or of the GPU that ``meta`` stands for.

    1 for the interpreter, so that tests see several tiles a program.
    """
    if device.type == "meta":
        return tables.stand_in().processors
    return _properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _properties(device: torch.device):
    return torch.cuda.get_device_properties(device)


def register_limit(maxnreg: int | None) -> dict:
    """The compiler option that limits a thread's registers. It is left out where ptxas chooses by itself."""
    return {} if maxnreg is None else {"maxnreg": maxnreg}


@dataclass(frozen=True)
class DepthwiseConfig:
    """The tile of a depthwise program: S strips, each TW columns wide (of dy in the backward) and TH rows high, times
    BLOCK_C channels. A program is one warp, so a thread has S * BLOCK_C / 32 channels.

    wide: a thread has 8 or 4 neighbouring channels, and columns are loaded and stored one by one as they lie in memory.
        Without it a row of columns is loaded as one block and taken apart.
    stages: how many rows of the input are in flight or in use. Two and more are copied to shared memory asynchronously;
        with 1 a row is loaded when it is met.
    unroll: how many rows of dy the backward does in one iteration of its loop.
    products: the forward leaves its multiplications to the tensor cores. S must be 8 then, and TW a multiple of 4.
    split: dgrad and the two halves of wgrad are programs of their own in one launch, where one program that did
        everything would spill.
    warps_per_sm: how many programs an SM holds at once, by their registers (65536 / 32 / registers on sm_90).
    maxnreg: the register limit given to ptxas, which otherwise spills a few bytes to reach a rounder occupancy. With
        None it chooses.
    """

    BLOCK_C: int
    S: int
    TW: int
    TH: int
    num_warps: int = 1
    stages: int = 3
    unroll: int = 1
    split: bool = False
    wide: bool = False
    products: bool = False
    maxnreg: int | None = None
    warps_per_sm: int = 8

    @property
    def possible(self) -> bool:
        """Whether its fields go together."""
        return not self.products or (self.S == 8 and self.TW % 4 == 0)

    @property
    def options(self) -> dict:
        """What Triton is told beside the kernel's arguments."""
        return {"num_warps": self.num_warps, "num_stages": 1, **register_limit(self.maxnreg)}

    def programs(self, tiles: int, blocks_c: int, device: torch.device) -> int:
        """Persistent programs per channel block: as many as are resident at once, or fewer if the longest still does as
        many tiles.

        A second wave of programs with equal work would run with few warps an SM, waiting for memory.
        """
        resident = max(1, self.warps_per_sm * processor_count(device) // blocks_c)
        return -(-tiles // -(-tiles // resident))


# How many channels a depthwise program has, which is also its block of the counters and of the partial results: first
# most of them, then those that have the fewest.
DEPTHWISE_CHANNELS = 32
FEWEST_CHANNELS = 16
MOST_WARPS = 16  # per SM, of one-warp programs
# Activations whose value and derivative take far more registers and instructions than SiLU's: kernels that have no
# registers left do not compute them.
HEAVY_ACTIVATIONS = ("gelu",)


def depthwise_counters(C: int, device: torch.device) -> int:
    """How many int32 counters suffice for a depthwise launch that finishes statistics of C channels: one for each 32
    programs and one for each block of channels."""
    blocks_c = -(-C // FEWEST_CHANNELS)
    programs = -(-MOST_WARPS * processor_count(device) // blocks_c)
    return blocks_c * (1 + -(-programs // 32))


def even_rows(rows: int, most: int) -> int:
    """Rows per program, at most ``most``, that cover ``rows`` in chunks as equal as possible."""
    chunks = -(-rows // most)
    return -(-rows // chunks)


@functools.cache
def strip_rows(rows: int, strips_w: int, S: int, halo: int, most: int = 16) -> int:
    """Rows per strip: ``even_rows``, or fewer where the S strips that a program slides at once would otherwise idle on
    a small image.

    A group of S strips takes rows + halo steps; more, shorter strips must save a tenth of the steps of an image.
    """
    base = -(-rows // most)
    steps = {n: -(-strips_w * n // S) * (-(-rows // n) + halo) for n in range(base, min(rows, base + S) + 1)}
    best = min(steps, key=steps.get)
    return -(-rows // (best if steps[best] <= 0.9 * steps[base] else base))


def _register_limit(K: int, dtype: torch.dtype) -> int | None:
    """All 255 registers for those kernels for which ptxas, left alone, stopped at 128 or 168 and spilled 8 to 40 bytes
    (Triton 3.7.1, sm_90); else None, ptxas's own choice."""
    return 255 if K >= 5 or K == 1 or dtype.itemsize == 4 else None


@tuned
def depthwise_forward_config(
    K: int, stride: int, N: int, OH: int, OW: int, C: int, dtype: torch.dtype, device: torch.device
) -> DepthwiseConfig:
    """The tile of the depthwise forward of a K x K kernel with an output of N x OH x OW pixels and C channels.

    Where they fit the registers, products for tensor cores are taken, because they need a third fewer instructions an
    output: on sm_90 in bf16 13.7 for 3x3 and 25.8 for 5x5, and 20.9 and 31.2 with BatchNorm and SiLU on load and with
    statistics. They do not fit for k = 3 with stride 2, nor for k above 5. With few images a program gets fewer rows,
    until there are enough programs to fill the device.

    The other kernel takes, by the same count, 17.6 and 31.7 instructions for 3x3 and 34.8 and 45.8 for 5x5. Up to k = 3
    the weights of the 4 or 8 channels of a 16-byte load fit the registers beside the running sums of 2 or 4 columns, so
    that loads and stores need no change of layout (one channel a thread took 24.8 and 43.9; 3 columns would spill).
    Larger k keep one or two channels a thread, and TW is what a power of two of input columns feeds.
    """
    if (K, stride) in ((3, 1), (5, 1)) and dtype.itemsize == 2 or (K, stride, dtype) == (5, 2, torch.bfloat16):
        # fp16 has no tanh in one operation: its activations take more registers.
        limit = 255 if dtype == torch.float16 else {(3, 1): 168, (5, 1): 200, (5, 2): 224}[K, stride]
        cfg = DepthwiseConfig(
            BLOCK_C=FEWEST_CHANNELS,
            S=8,
            TW=4,
            TH=even_rows(OH, 28),
            stages=4 if stride == 1 else 2,
            products=True,
            maxnreg=limit,
            warps_per_sm=65536 // 32 // limit,
        )
        strips, blocks_c = -(-N * -(-OW // cfg.TW) // cfg.S), -(-C // cfg.BLOCK_C)
        while cfg.TH > 4 and strips * -(-OH // cfg.TH) * blocks_c < cfg.warps_per_sm * processor_count(device):
            cfg = replace(cfg, TH=even_rows(OH, cfg.TH // 2))
        return cfg
    if K <= 3:
        S, TW = (8, 2) if dtype.itemsize == 2 else (4, 4)
        TH = strip_rows(OH, -(-OW // TW), S, -(-K // stride) - 1)
        return DepthwiseConfig(BLOCK_C=DEPTHWISE_CHANNELS, S=S, TW=TW, TH=TH, wide=True)
    if K == 5:
        S, TW = 1, 8 if stride == 1 else 6
    else:
        S, TW = (2, 2) if K == 7 else (1, 4 // stride)
    warps = 12 if K == 5 else 8  # 168 registers, and up to 255
    return DepthwiseConfig(
        BLOCK_C=DEPTHWISE_CHANNELS,
        S=S,
        TW=TW,
        TH=even_rows(OH, 16),
        maxnreg=_register_limit(K, dtype),
        warps_per_sm=warps,
    )


@tuned
def depthwise_backward_config(
    K: int, stride: int, N: int, rows: int, cols: int, C: int, dtype: torch.dtype, device: torch.device
) -> DepthwiseConfig:
    """The ring of dy rows, the weights and their gradients leave room for one channel a thread; wide strips pay for the
    halo.

    sm_90, bf16, instructions an input element with both BNs, SiLU and the gate, of whole strips: 3x3 61 to 64 at up to
    168 registers, 5x5 98 at 255, more than half of them multiply-adds. Left alone, ptxas holds 3x3 to 128 and loads too
    late (predicted, H200, 3x3 of stride 2 at 112 pixels: 503 us, with up to 168 registers 449). Moving the ring down a
    row took 10 of a hundred at k = 5: two rows an iteration move it once (14 x 14 pixels, 672 channels: 158 us for
    169), and would spill 16 bytes in strips of 8. Rows are loaded one iteration ahead, which predicts 13 to 22 % less
    time at k = 3 and 5. Tiles of 28 rows evaluate fewer of dy twice than those of 16, where there are enough of them.
    """
    if K == 1:
        TW = 8  # 8 columns of dy make a 16-byte load
    elif K <= 5 and stride == 1:
        TW = min((8, 7), key=lambda TW: -(-cols // TW) * TW)  # 7 divide the widths of 224 pixels, 28, 14 and 7
    elif K <= 5:
        TW = 4
    else:
        TW = 1 if K == 9 and stride == 1 and dtype.itemsize == 4 else 2
    warps = 12 if K <= 3 else 8
    tall = N * -(-cols // TW) * -(-rows // 28) * -(-C // DEPTHWISE_CHANNELS) >= 2 * warps * processor_count(device)
    return DepthwiseConfig(
        BLOCK_C=DEPTHWISE_CHANNELS,
        S=1,
        TW=TW,
        TH=even_rows(rows, 28 if tall and stride == 1 else 16),
        stages=2 if K == 3 or K == 5 and dtype.itemsize == 2 else 1,
        unroll=2 if (K, TW) == (5, 7) and dtype == torch.bfloat16 else 1,
        split=K > 7,
        maxnreg=168 if K == 3 and dtype == torch.bfloat16 else _register_limit(K, dtype),
        warps_per_sm=warps,
    )


@dataclass(frozen=True)
class RowsConfig:
    """Elementwise and reduction kernels: blocks of BLOCK_ROWS pixels times BLOCK_C channels, ``steps`` at a time."""

    BLOCK_ROWS: int
    BLOCK_C: int
    num_warps: int = 4
    steps: int = 1

    def split(self, rows: int, others: int, device: torch.device) -> tuple[int, int]:
        """(rows per program, programs) so that ``others`` times the programs fill the device about four times over."""
        wanted = max(1, -(-16 * processor_count(device) // others))
        rows_per_program = max(self.BLOCK_ROWS, -(-rows // wanted))
        return rows_per_program, -(-rows // rows_per_program)

    def long(self, rows: int, others: int, device: torch.device) -> tuple[int, int]:
        """(rows per program, programs) as ``split``, for programs of one warp with eight steps at least: shorter ones
        spend as long on their vectors and on the last sums."""
        wanted = 64 * processor_count(device) // others
        programs = max(1, min(wanted, rows // (8 * self.BLOCK_ROWS)))
        rows_per_program = -(-rows // programs)
        return rows_per_program, -(-rows // rows_per_program)

    def persistent(self, rows: int, blocks_c: int, device: torch.device) -> tuple[int, int]:
        """(rows per program, programs per block of channels), 3 programs an SM in all: they are resident at once, and
        leave few enough partial results that the last of them sums them in a few steps."""
        wanted = max(1, 3 * processor_count(device) // blocks_c)
        rows_per_program = max(self.BLOCK_ROWS, -(-rows // wanted))
        return rows_per_program, -(-rows // rows_per_program)


def _channel_block(C: int, most: int) -> int:
    """The power of two from 16 to ``most`` that wastes the fewest lanes on C channels, the largest of equals."""
    sizes = [size for size in (16, 32, 64, 128, 256) if size <= most]
    return min(reversed(sizes), key=lambda size: -(-C // size) * size)


@tuned
def elementwise_config(C: int, dtype: torch.dtype) -> RowsConfig:
    """A program has 4096 elements and 4 warps, so that a thread has four 16-byte vectors of bf16 in flight."""
    BLOCK_C = _channel_block(C, 128)
    return RowsConfig(BLOCK_ROWS=4096 // BLOCK_C, BLOCK_C=BLOCK_C)


@tuned
def reduction_config(C: int, dtype: torch.dtype) -> RowsConfig:
    """A step takes 2048 elements with 2 warps: a thread has 32 fp32 accumulators for each of two sums, and fewer
    threads have less to add up at the end. Predicted on an H200, BatchNorm 3's sums of B0 at 256 images: 224 us, and
    230 with four warps."""
    BLOCK_C = _channel_block(C, 64)
    return RowsConfig(BLOCK_ROWS=2048 // BLOCK_C, BLOCK_C=BLOCK_C, num_warps=2)


@tuned
def gradient_sums_config(C: int, dtype: torch.dtype) -> RowsConfig:
    """A program is one warp whose lanes have a 16-byte vector of channels each, so that five sums take 40 registers."""
    BLOCK_C = _channel_block(C, 128)
    return RowsConfig(BLOCK_ROWS=512 // dtype.itemsize // BLOCK_C, BLOCK_C=BLOCK_C, num_warps=1, steps=4)


@tuned
def pool_config(C: int, dtype: torch.dtype) -> RowsConfig:
    """A program is one warp, which needs no barrier for its last sums; a thread has 64 values of a step. All of B0's
    launches at 256 images were predicted to take 379 us on an H200, and 464 us with four warps."""
    BLOCK_C = _channel_block(C, 64)
    return RowsConfig(BLOCK_ROWS=2048 // BLOCK_C, BLOCK_C=BLOCK_C, num_warps=1)


@tuned
def pooled_norm_config(C: int, dtype: torch.dtype) -> RowsConfig:
    """A program is one warp; a thread has 16 values of a step beside its three sums. B0's head at 256 images was
    predicted to take 18 us on an H200, and 56 us with four warps."""
    BLOCK_C = _channel_block(C, 64)
    return RowsConfig(BLOCK_ROWS=512 // BLOCK_C, BLOCK_C=BLOCK_C, num_warps=1)


def _power_of_two(n: int, least: int, most: int) -> int:
    return min(most, max(least, 1 << (n - 1).bit_length()))


@dataclass(frozen=True)
class PointwiseForwardConfig:
    """A program of the 1x1 forward goes over tiles of BLOCK_M rows for its BLOCK_N columns of outputs, BLOCK_K inputs a
    step.

    resident: all steps are unrolled and their weights stay in shared memory. Without it the weights come again with
        every tile, ``stages`` steps ahead.
    ahead: how many steps of x are on their way to registers while one is multiplied. With 0 x is copied to shared
        memory instead, ``stages`` tiles of it.
    one_block: the columns are padded to one power of two. Without it they are several blocks that add up to BLOCK_N.
    per_image: no tile holds rows of two images, so that a tile has one gate for each channel.
    fragments: x goes from registers into the products, in half precision, in steps of 32.
    programs_per_sm: how many programs an SM holds at once, by their registers and shared memory.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4
    resident: bool = False
    ahead: int = 1
    one_block: bool = False
    per_image: bool = False
    fragments: bool = False
    stages: int = 1
    programs_per_sm: int = 4
    maxnreg: int | None = None

    @property
    def options(self) -> dict:
        """What Triton is told beside the kernel's arguments."""
        return {"num_warps": self.num_warps, "num_stages": 1, **register_limit(self.maxnreg)}

    def programs(self, work: int, slices: int, device: torch.device) -> int:
        """Programs for each slice of columns that fill the device once, or fewer if the longest still does as many
        pieces of work.
        """
        resident = max(1, self.programs_per_sm * processor_count(device) // slices)
        return -(-work // -(-work // resident))

    @property
    def merged(self) -> int:
        """Columns whose statistics are merged at a time: all of a slice up to 128, as one after another they would wait
        for memory.
        """
        return _power_of_two(self.BLOCK_N, 16, 128)


def pointwise_weights_stay(K: int, transforms: bool) -> bool:
    """Whether all weights of a slice of columns stay in shared memory: unrolled over more steps, with BatchNorm and
    gates on load, ptxas spills.
    """
    return K <= (256 if transforms else 384)


def _fills_the_device(rows: int, dtype: torch.dtype) -> bool:
    return dtype.itemsize == 2 and rows > 1024


def product_is_apart(K: int, N: int, rows: int, transforms: bool, dtype: torch.dtype, pool: bool = False) -> bool:
    """Whether a 1x1 convolution from K to N channels is PyTorch's product, with passes before and after it; never where
    only the mean over each image is stored (``pool``).

    A program holds 128 columns. With more of them, programs of each slice would evaluate BatchNorm, activation and gate
    of the same rows: at 7 x 7 pixels and 320 outputs 74 us, where a pass, a product and passes over its result take 41.
    And where the weights do not stay in shared memory, every tile would load them again: 448 to 2688 channels, 9216
    rows, 82 us for 55 (predicted, bf16, an H200).
    """
    if pool or dtype.itemsize != 2 or rows <= 512:
        return False
    return N > 128 if transforms else not pointwise_weights_stay(K, False)


def weight_form(K: int, N: int, rows: int, transforms: bool, pool: bool, dtype: torch.dtype) -> str:
    """How the forward of a 1x1 convolution wants its weight: "live", or a copy, "plain" for PyTorch's product or
    "permuted" where tiles that fill the device all load it again.
    """
    if product_is_apart(K=K, N=N, rows=rows, transforms=transforms, dtype=dtype, pool=pool):
        return "plain"
    again = _fills_the_device(rows, dtype) and not pointwise_weights_stay(K, transforms)
    return "permuted" if again else "live"


def _even_slice(columns: int, most: int) -> int:
    """Columns of a slice: the largest multiple of 16 up to ``most`` that divides them, or ``most`` where that is not
    half as much.
    """
    padded = -(-columns // 16) * 16
    if padded <= most:
        return padded
    best = max(size for size in range(16, most + 1, 16) if padded % size == 0)
    return best if 2 * best > most else most


def _plain_rows_config(K, N, pool, dtype) -> PointwiseForwardConfig:
    """The configuration where x is multiplied as it is: copies that fill shared memory for the next tiles then need no
    registers. Beyond 128 channels registers are taken all the same, since three tiles and the weights would leave room
    for one program, or for none on GPUs with 99 KB for each; so they are for ``pool``, where a condition ends every
    image and no copy is issued across it.
    """
    if K > 128 or pool:
        BLOCK_N = _even_slice(N, 96 if K <= 128 else 128)
        return PointwiseForwardConfig(
            BLOCK_M=64, BLOCK_N=BLOCK_N, BLOCK_K=32, resident=True, fragments=True, programs_per_sm=2
        )
    BLOCK_N = _even_slice(N, 48 if 16 < K <= 32 else 96)
    return PointwiseForwardConfig(
        BLOCK_M=64,
        BLOCK_N=BLOCK_N,
        BLOCK_K=16 if K % 16 == 0 else _power_of_two(K, 16, 64),
        resident=True,
        ahead=0,
        stages=4 if 32 < K <= 96 else 3,
        programs_per_sm=4 if BLOCK_N <= 48 else 3,
        maxnreg=168 if BLOCK_N > 48 and dtype == torch.bfloat16 else None,
    )


@tuned
def pointwise_forward_config(
    K: int,
    N: int,
    rows: int,
    image_rows: int,
    dtype: torch.dtype,
    prologue: bool,
    gated: bool,
    pool: bool,
    copied: bool,
) -> PointwiseForwardConfig:
    """The forward of a 1x1 convolution of ``rows`` pixels, K inputs and N outputs.

    image_rows: pixels of an image, which a tile does not cross where a gate or a pooled sum belongs to each. prologue:
    BatchNorm and activation are evaluated on load. copied: the weight comes as a permuted copy in the compute dtype.
    """
    narrow, transforms = dtype.itemsize == 2, prologue or gated
    if copied:
        BLOCK_N = _even_slice(N, 128)
        return PointwiseForwardConfig(
            BLOCK_M=64, BLOCK_N=BLOCK_N, BLOCK_K=32, one_block=True, fragments=True, stages=3, programs_per_sm=2
        )
    if _fills_the_device(rows, dtype) and pointwise_weights_stay(K, transforms):
        if not transforms:
            return _plain_rows_config(K, N, pool, dtype)
        BLOCK_N, per_image = _even_slice(N, 64), image_rows >= 512
        cfg = PointwiseForwardConfig(
            BLOCK_M=64, BLOCK_N=BLOCK_N, BLOCK_K=32, resident=True, ahead=2, per_image=per_image, fragments=True
        )
        if K <= 32:
            return replace(cfg, programs_per_sm=8)
        # Left alone, ptxas holds some of what is on its way back to save registers. More than 32 columns with
        # statistics would spill at 168.
        if dtype == torch.bfloat16 and (BLOCK_N <= 32 or not prologue):
            return replace(cfg, programs_per_sm=3, maxnreg=168)
        return replace(cfg, programs_per_sm=2, ahead=3)
    if narrow and rows <= 1024:
        # A few images: what counts is how soon the longest program ends, so many small ones, each with long steps of k.
        BLOCK_K = _power_of_two(K, 16, 128)
        return PointwiseForwardConfig(
            BLOCK_M=16,
            BLOCK_N=16 if K > 512 else 32,
            BLOCK_K=BLOCK_K,
            resident=K <= BLOCK_K,
            stages=3,
            num_warps=2,
            programs_per_sm=8,
        )
    BLOCK_N = _power_of_two(N, 16, 64)
    BLOCK_M = _power_of_two(rows, 16, 64 if narrow else 32)
    BLOCK_K = _power_of_two(K, 16, 64 if narrow else 32)
    return PointwiseForwardConfig(
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, resident=K <= BLOCK_K, stages=3, num_warps=4 if narrow else 8
    )


@dataclass(frozen=True)
class ProjectBackwardConfig:
    """A program of the project backward goes over tiles of BLOCK_M rows for BLOCK_E of the E channels. BLOCK_O covers
    the outputs.

    stages: how many tiles are in flight or in use. programs_per_sm: how many programs an SM holds at once, by their
    registers on sm_90.
    """

    BLOCK_M: int
    BLOCK_E: int
    BLOCK_O: int
    num_warps: int = 4
    stages: int = 3
    programs_per_sm: int = 4
    maxnreg: int | None = None

    @property
    def options(self) -> dict:
        """What Triton is told beside the kernel's arguments."""
        return {"num_warps": self.num_warps, "num_stages": 1, **register_limit(self.maxnreg)}

    def programs(self, work: int, blocks: int, device: torch.device) -> int:
        """Programs for each of ``blocks``, at most one a piece of work, that together fill the device once."""
        return max(1, min(work, self.programs_per_sm * processor_count(device) // blocks))

    def parts(self, images: int, tiles: int, blocks: int, device: torch.device) -> tuple[int, int, int]:
        """(parts an image, tiles a part, programs for each of ``blocks``).

        Images are divided where they are fewer than programs.
        """
        parts = min(tiles, -(-self.programs(images * tiles, blocks, device) // images))
        tiles_per_part = -(-tiles // parts)
        parts = -(-tiles // tiles_per_part)
        return parts, tiles_per_part, self.programs(images * parts, blocks, device)


def project_backward_is_fused(O: int, dtype: torch.dtype, act: str) -> bool:
    """Whether one kernel makes both gradients of the project convolution, and not PyTorch's products with a pass
    between them.

    It does where their accumulators fit a thread's registers beside five sums. fp32 products without tensor cores do
    not, nor do heavy activations (GELU: 300 bytes spilled).
    """
    return dtype.itemsize == 2 and O <= 24 and act not in HEAVY_ACTIVATIONS


@tuned
def project_dy_config(O: int, dtype: torch.dtype) -> RowsConfig:
    """A program has 4096 elements and 4 warps: a thread has four 16-byte vectors of bf16 of each operand in flight."""
    block = _channel_block(O, 128)
    return RowsConfig(BLOCK_ROWS=4096 // block, BLOCK_C=block)


@tuned
def project_both_config(E: int, O: int, rows: int, dtype: torch.dtype) -> ProjectBackwardConfig:
    """A program is one warp. A lane has 4 channels, 32 values of dq and up to as many of dw, in 246 to 255 registers.

    An SM holds eight such programs, but twelve were predicted to be faster all the same: 135 us for 177 at O = 16,
    E = 32. With 32 columns of dw, 2 channels a lane leave room for half as many programs again: 242 us for 289 at
    O = 24, E = 144.
    """
    cfg = ProjectBackwardConfig(
        BLOCK_M=32, BLOCK_E=32, BLOCK_O=_power_of_two(O, 16, 32), num_warps=1, stages=2, programs_per_sm=12
    )
    if cfg.BLOCK_O == 32 and dtype == torch.bfloat16:
        return replace(cfg, BLOCK_E=16, stages=3, programs_per_sm=12, maxnreg=168)
    return cfg


@dataclass(frozen=True)
class ExpandBackwardConfig:
    """A program of the expand backward goes over tiles of BLOCK_M rows, in pieces or blocks of BLOCK_E expanded and
    BLOCK_I input channels; a product takes BLOCK_K of its inner dimension a step.

    stages: how many tiles or steps are in flight or in use. programs_per_sm: how many programs an SM holds at once.
    """

    BLOCK_M: int
    BLOCK_I: int
    BLOCK_E: int = 64
    BLOCK_K: int = 64
    num_warps: int = 4
    stages: int = 3
    programs_per_sm: int = 2
    maxnreg: int | None = None

    @property
    def options(self) -> dict:
        """What Triton is told beside the kernel's arguments."""
        return {"num_warps": self.num_warps, "num_stages": 1, **register_limit(self.maxnreg)}

    def programs(self, tiles: int, blocks: int, device: torch.device) -> int:
        """Persistent programs for each of ``blocks``, resident at once; fewer if the longest still does as many
        tiles.
        """
        resident = max(1, self.programs_per_sm * processor_count(device) // blocks)
        return -(-tiles // -(-tiles // resident))

    @property
    def BLOCK_R(self) -> int:
        """Rows of x that all threads together load at once, 8 channels each: as many are summed apart."""
        return min(self.BLOCK_M, 256 * self.num_warps // self.BLOCK_I)

    def splits(self, tiles: int, blocks_e: int, with_gram: bool, device: torch.device) -> tuple[int, int]:
        """Splits of the rows for (D, in ``blocks_e`` blocks; gram). A tile of gram takes BLOCK_I / BLOCK_E of the time
        of one of D.
        """
        share = min(1.0, self.BLOCK_I / self.BLOCK_E) if with_gram else 0.0
        splits = int(self.programs_per_sm * processor_count(device) / (blocks_e + share))
        splits = -(-tiles // -(-tiles // max(1, splits)))
        return splits, min(tiles, max(1, int(share * splits))) if with_gram else 0


def expand_backward_form(E: int, I: int, dtype: torch.dtype, device: torch.device) -> str:
    """The form "pass", "split" or "library" (kernels/expand_backward.py says what they are), by predicted time.

    bf16 on an H200, 200704 rows: I = 40, E = 240 takes 35 us in one pass, 65 in two. I = 48, E = 288 spills in one; so
    does I = 40 where tensor cores do not read both operands from shared memory. fp32: PyTorch's two products and the
    two with x alone move 1.4 times the bytes of eager's two, and multiply 1.2 times as often.
    """
    if dtype == torch.float32:
        return "library"
    return "pass" if E <= 256 and I <= (64 if _reads_shared_memory(device) else 32) else "split"


def expand_weight_is_apart(I: int, dtype: torch.dtype) -> bool:
    """Whether the expand convolution's weight gradient is PyTorch's product: in fp32, and where a program has to hold
    more than 128 columns, so that one fills an SM (I = 192, E = 1152, 12544 rows: 23 us for 14; I = 448, E = 2688, 9216
    rows: 88 for 47; predicted, bf16, an H200).
    """
    return dtype == torch.float32 or I > 128


def _reads_shared_memory(device: torch.device) -> bool:
    """Whether tensor cores take both operands from shared memory: those of Hopper, which is assumed where there is no
    GPU, and of data centres' Blackwell; not those of sm_120.
    """
    if device.type == "meta":
        return (9, 0) <= tables.stand_in().capability < (11, 0)
    if device.type != "cuda":
        return True
    return torch.version.hip is None and (9, 0) <= torch.cuda.get_device_capability(device) < (11, 0)


@tuned
def expand_pass_config(E: int, I: int, rows: int, dtype: torch.dtype) -> ExpandBackwardConfig:
    """With up to 32 inputs a piece has 64 channels, as many as one instruction has rows. With more, x's channels are
    the rows of the products, and a tile is only 32 rows high: then two programs of three stages fit the shared memory,
    and the 120 registers that D^T takes fit into the 255.
    """
    BLOCK_I = _power_of_two(I, 16, 64)
    if BLOCK_I == 16:
        # Left alone, ptxas spills 8 bytes on sm_100 for a fifth program an SM, which would not be faster.
        return ExpandBackwardConfig(BLOCK_M=64, BLOCK_I=BLOCK_I, BLOCK_E=64, stages=2, programs_per_sm=4, maxnreg=160)
    if BLOCK_I == 32:
        return ExpandBackwardConfig(BLOCK_M=64, BLOCK_I=BLOCK_I, BLOCK_E=64, stages=3, programs_per_sm=2)
    return ExpandBackwardConfig(BLOCK_M=32, BLOCK_I=BLOCK_I, BLOCK_E=128, stages=3, programs_per_sm=2, maxnreg=255)


@tuned
def expand_data_config(E: int, I: int, rows: int, dtype: torch.dtype) -> ExpandBackwardConfig:
    """An SM holds two programs of 8 warps, for which 128 registers are left; one alone would wait at its barriers
    (predicted at I = 112: 42 us for 33). At I = 80, where columns are masked, steps of 64 would spill 16 bytes. With
    more than 128 inputs one program holds all of them, up to 256, so that dz is loaded once.
    """
    if 128 < I <= 256:
        return ExpandBackwardConfig(BLOCK_M=128, BLOCK_I=256, num_warps=8, stages=3, programs_per_sm=1, maxnreg=255)
    BLOCK_I = _power_of_two(I, 16, 128)
    return ExpandBackwardConfig(
        BLOCK_M=128,
        BLOCK_I=BLOCK_I,
        BLOCK_K=32 if 64 < I <= 80 else 64,
        num_warps=8,
        stages=3,
        programs_per_sm=2,
        maxnreg=128,
    )


@tuned
def expand_weight_config(E: int, I: int, rows: int, dtype: torch.dtype) -> ExpandBackwardConfig:
    """A program has 128 rows of D. With 256, half as many programs would read x, but on GPUs without wgmma the sums
    would spill (248 bytes on sm_80).
    """
    BLOCK_I = _power_of_two(I, 16, 128)
    return ExpandBackwardConfig(BLOCK_M=64, BLOCK_I=BLOCK_I, BLOCK_E=128, num_warps=8, programs_per_sm=2, maxnreg=255)


@tuned
def expand_matrix_config(E: int, I: int, dtype: torch.dtype) -> ExpandBackwardConfig:
    """The blocks of G. Small blocks make many programs, of a few long steps over E. With many channels they are larger,
    as each block reads two stripes of the weight. On an H200 7.9 us were predicted for I = 192 and 51 for 640; blocks
    of 32 x 32 in steps of 64 would take 16.6 and 115.
    """
    if dtype.itemsize == 4:
        return ExpandBackwardConfig(BLOCK_M=64, BLOCK_I=_power_of_two(I, 16, 32), BLOCK_K=32)
    if I >= 512:
        return ExpandBackwardConfig(BLOCK_M=64, BLOCK_I=64, BLOCK_K=128, maxnreg=255)
    return ExpandBackwardConfig(
        BLOCK_M=64, BLOCK_I=16 if I <= 256 else 32, BLOCK_K=_power_of_two(E, 64, 256), maxnreg=255
    )


@dataclass(frozen=True)
class StemConfig:
    """A program of the stem goes over tiles of BLOCK_M output pixels for BLOCK_N channels, BLOCK_K taps a step.
    programs_per_sm: how many programs an SM holds at once."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4
    programs_per_sm: int = 4
    maxnreg: int | None = None

    @property
    def options(self) -> dict:
        """What Triton is told beside the kernel's arguments."""
        return {"num_warps": self.num_warps, "num_stages": 1, **register_limit(self.maxnreg)}

    def spread(self, tiles: int, blocks: int, device: torch.device) -> tuple[int, int]:
        """(tiles a program, programs) for each of ``blocks``: consecutive tiles, none without work, the device filled
        once."""
        programs = max(1, min(tiles, self.programs_per_sm * processor_count(device) // blocks))
        per_program = -(-tiles // programs)
        return per_program, -(-tiles // per_program)


@tuned
def stem_forward_config(K: int, S: int, rows: int, dtype: torch.dtype) -> StemConfig:
    """All taps of up to 7 input channels are one block, so that a program loads the weights once. A thread has 32 sums
    and 32 gathered taps, in fp32, whose products run without tensor cores, 16; with 64 of either ptxas spilled."""
    narrow = dtype.itemsize == 2
    BLOCK_N = _power_of_two(S, 16, 64)
    BLOCK_K = _power_of_two(K, 16, 64 if narrow else 32)
    return StemConfig(
        BLOCK_M=_power_of_two(rows, 16, (4096 if narrow else 2048) // max(BLOCK_N, BLOCK_K, 32)),
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
    )


@tuned
def stem_backward_config(K: int, S: int, rows: int, dtype: torch.dtype) -> StemConfig:
    """16 values a thread of each operand: dy is formed from two more blocks in flight. 255 registers on 64 channels:
    left alone, ptxas stopped at 168 and spilled 8 bytes of GELU. In bf16 up to 32 channels three programs an SM
    (H200, predicted, B0's at 256 images: 159 us; four with half the pixels 198)."""
    BLOCK_N = _power_of_two(S, 16, 64)
    light = dtype == torch.bfloat16 and BLOCK_N <= 32
    return StemConfig(
        BLOCK_M=_power_of_two(rows, 16, 2048 // max(BLOCK_N, 32)),
        BLOCK_N=BLOCK_N,
        BLOCK_K=_power_of_two(K, 16, 32),
        programs_per_sm=3 if light else 2,
        maxnreg=255 if BLOCK_N == 64 else 168 if light else None,
    )


@dataclass(frozen=True)
class ExpandDepthwiseConfig:
    """A program of the expand inside the depthwise convolution has S strips of TW outputs and TH rows times BLOCK_E
    expanded channels, and takes BLOCK_I inputs a step. S is the height of one tensor-core product.

    stages: how many rows of x are in flight or in use. warps_per_sm: how many warps an SM's registers have room for.
    """

    BLOCK_I: int
    BLOCK_E: int
    TW: int
    TH: int
    S: int = 16
    num_warps: int = 2
    stages: int = 2
    maxnreg: int | None = 255
    warps_per_sm: int = 8

    @property
    def options(self) -> dict:
        """What Triton is told beside the kernel's arguments."""
        return {"num_warps": self.num_warps, "num_stages": 1, **register_limit(self.maxnreg)}

    def programs(self, tiles: int, blocks_c: int, device: torch.device) -> int:
        """Persistent programs per channel block: two waves, so that the tail is short."""
        return max(1, min(tiles, -(-2 * self.warps_per_sm * processor_count(device) // (self.num_warps * blocks_c))))


@tuned
def expand_depthwise_config(
    K: int, stride: int, N: int, I: int, E: int, OH: int, OW: int, dtype: torch.dtype, device: torch.device
) -> ExpandDepthwiseConfig:
    """Two warps share 32 channels: a load of x then serves both, and the weights take 36 registers at k = 3. Where two
    warps spill (k = 5, fp32, more than 32 inputs) four share them, whose weights take 18 registers, for 8 to 30 % more
    instructions.

    Wider strips evaluate fewer columns twice, but ptxas keeps every column of a step at once: 4 outputs spill at stride
    2 and with the longer activations of fp16, and 2 outputs spill in fp32 at stride 2. fp32 takes 16 inputs a step,
    since its products spill when they are unrolled over more. With few images a program gets fewer rows, until there
    are enough programs to fill the device.
    """
    narrow = dtype.itemsize == 2
    TW = 4 if K == 3 and stride == 1 and dtype == torch.bfloat16 else 1 if stride == 2 and not narrow else 2
    cfg = ExpandDepthwiseConfig(
        BLOCK_I=_power_of_two(I, 16, 64 if narrow else 16),
        BLOCK_E=32,
        TW=TW,
        TH=even_rows(OH, 16),
        num_warps=2 if K == 3 and narrow and I <= 32 else 4,
    )
    while cfg.TH > 4:
        programs = N * -(-(-(-OW // TW) * -(-OH // cfg.TH)) // cfg.S) * -(-E // cfg.BLOCK_E)
        if programs * cfg.num_warps >= cfg.warps_per_sm * processor_count(device):
            break
        cfg = replace(cfg, TH=even_rows(OH, cfg.TH // 2))
    return cfg


# Instructions of expand_depthwise's loop for each expanded element, each evaluation of an overlap included, from the
# machine code for sm_90 with SiLU and pooling (tests/effkernels/test_expand_depthwise.py compares them with what the
# compiler makes). fp16 has no tanh in one operation; fp32 is not here: without tensor cores it takes 64 and more.
EXPAND_DEPTHWISE_INSTRUCTIONS = {
    (torch.bfloat16, 3, 2): 16.5,
    (torch.bfloat16, 3, 1): 32.1,
    (torch.bfloat16, 5, 2): 29.8,
    (torch.bfloat16, 5, 1): 72.2,
    (torch.float16, 3, 2): 30.0,
    (torch.float16, 3, 1): 64.2,
    (torch.float16, 5, 2): 47.7,
    (torch.float16, 5, 1): 107.9,
}
_GPU = GPUS["h200"]
_ISSUE_SHARE = 0.7  # of the issue slots filled with the 8 warps an SM holds at 200 to 255 registers; not measured


def expand_inside(
    kernel_size: int, stride: int, in_channels: int, expanded: int, dtype: torch.dtype, act: str = "silu"
) -> bool:
    """Whether inference expands inside the depthwise kernel, which saves writing and reading e1 for more instructions.

    Both are compared in seconds an expanded element. Two launches take at least their bytes at copy speed, I/E + 1
    and 1 + 1/s^2 elements. One launch takes its issue slots, as a program runs TH = 16 rows and ceil(k/s) - 1 more, or
    its bytes, I/E + 1/s^2 elements, whichever is longer. At k = 3, s = 2 in bf16 (B0's second stage) that is 0.85 ps
    against 1.12 ps; every other case loses. With more than 16 inputs a product takes two steps, and x, which each 32
    channels read again, takes L2 as long as e1 took DRAM: B4's block of 24 inputs (380 pixels, 64 images, an H200) was
    predicted at 526 us in one launch and 372 us in two. A heavy activation makes it 60 instructions (GELU); the others
    are near SiLU.
    """
    instructions = EXPAND_DEPTHWISE_INSTRUCTIONS.get((dtype, kernel_size, stride))
    if instructions is None or in_channels > 16 or act in HEAVY_ACTIVATIONS:
        return False
    x, e2 = in_channels / expanded, 1 / stride**2
    separate = (x + 1 + 1 + e2) * dtype.itemsize / _GPU.bandwidth
    run_in = 1 + (-(-kernel_size // stride) - 1) / 16
    issue = instructions * run_in / (_GPU.per_second(128) * _ISSUE_SHARE)
    return max(issue, (x + e2) * dtype.itemsize / _GPU.bandwidth) < separate


@dataclass(frozen=True)
class PartialsConfig:
    """A program sums BLOCK_P partials at a time, of BLOCK_COLS elements of a weight."""

    BLOCK_P: int
    BLOCK_COLS: int


@tuned
def partials_config(elements: int) -> PartialsConfig:
    """Many elements come with few partials: each gets a thread of its own, whose sum needs no exchange. Few elements,
    those of a layer of few channels, come with many partials, which few programs must not sum one by one. The number
    of partials itself does not decide, because it depends on the batch, and kernels would be compiled again.

    On an H200 7.1 us were predicted for B0's block of 1152 channels (7 to 29 partials) and 4.9 for its second (352 to
    652); with 64 x 64 for both 15.5 and 13.2.
    """
    if elements >= 100_000:
        return PartialsConfig(BLOCK_P=8, BLOCK_COLS=512)
    if elements >= 10_000:
        return PartialsConfig(BLOCK_P=16, BLOCK_COLS=256)
    return PartialsConfig(BLOCK_P=64, BLOCK_COLS=16)


@dataclass(frozen=True)
class ImageProductsConfig:
    """Products over images: BLOCK_N images a step, BLOCK_C channels times BLOCK_R units of the bottleneck; with longer
    steps their registers would leave too few programs an SM for the sums of the same launch."""

    BLOCK_N: int = 16
    BLOCK_C: int = 64
    BLOCK_R: int = 16
    num_warps: int = 4

    def images(self, N: int, C: int, R: int) -> int:
        """Images a program: N in up to 8 parts, if that makes no more than about 256 programs."""
        blocks = 2 * -(-C // self.BLOCK_C) * -(-R // self.BLOCK_R)
        parts = max(1, min(8, 256 // blocks))
        return -(-N // (parts * self.BLOCK_N)) * self.BLOCK_N


@tuned
def image_products_config() -> ImageProductsConfig:
    """The products of [N, E] with [N, R] over images that are squeeze-excite's weight gradients."""
    return ImageProductsConfig()


@dataclass(frozen=True)
class ExpandGradientConfig:
    """A program has BLOCK_E x BLOCK_I of the expand layer's gradient, and takes BLOCK_K rows of the Gram matrix a
    step."""

    BLOCK_E: int = 16
    BLOCK_I: int = 16
    BLOCK_K: int = 16  # with 32, ptxas spilled 8 bytes to stay at 56 registers
    num_warps: int = 1


@tuned
def expand_gradient_config() -> ExpandGradientConfig:
    """The expand layer's weight gradient from its sums, of which one is a product with the Gram matrix."""
    return ExpandGradientConfig()


@dataclass(frozen=True)
class SqueezeExciteConfig:
    """A program has BLOCK_N images, one or at least 16, times BLOCK_C channels and BLOCK_R units of the bottleneck. It
    adds BLOCK_P partial sums of an image at a time."""

    BLOCK_N: int
    BLOCK_C: int
    BLOCK_R: int
    BLOCK_P: int = 8
    num_warps: int = 4
    maxnreg: int | None = None

    @property
    def options(self) -> dict:
        """What Triton is told beside the kernel's arguments."""
        return {"num_warps": self.num_warps, **register_limit(self.maxnreg)}


@tuned
def squeeze_excite_config(N: int, R: int) -> SqueezeExciteConfig:
    """Up to 15 images are taken one by one, by programs of 4096 weights each: a thread has 32 of them in registers, and
    many programs share the work. More images are products of tensor cores; with up to 32 units ptxas, left alone,
    spilled 8 bytes to stay at 96 registers.

    On an H200 both launches of B0's 1152 channels were predicted to take 3.0 us for one image and 8.2 us for 256.
    """
    BLOCK_R = _power_of_two(R, 16, 64)
    if N < 16:
        return SqueezeExciteConfig(BLOCK_N=1, BLOCK_C=min(128, 4096 // BLOCK_R), BLOCK_R=BLOCK_R)
    return SqueezeExciteConfig(BLOCK_N=16, BLOCK_C=64, BLOCK_R=BLOCK_R, maxnreg=None if BLOCK_R == 64 else 168)


@dataclass(frozen=True)
class GateBackwardConfig:
    """A program is BLOCK_N images, at least the 16 rows of a product, times BLOCK_C channels, with BLOCK_R units of the
    bottleneck a step; BLOCK_P blocks of images are summed at a time."""

    BLOCK_R: int
    BLOCK_N: int = 16
    BLOCK_C: int = 64
    BLOCK_P: int = 16
    num_warps: int = 2
    maxnreg: int | None = 200

    @property
    def options(self) -> dict:
        """What Triton is told beside the kernel's arguments."""
        return {"num_warps": self.num_warps, **register_limit(self.maxnreg)}

    def counters(self, N: int, C: int) -> int:
        """How many int32 counters a launch needs for N images and C channels."""
        return 1 + 2 * -(-N // self.BLOCK_N) + -(-C // self.BLOCK_C)


@tuned
def gate_backward_config(R: int) -> GateBackwardConfig:
    """200 registers: ptxas, left alone, spilled 16 bytes to stay at 128, and on sm_100 as many at 168. H200, predicted,
    B0's 1152 channels at 256 images: 13 us, with four warps 17.
    """
    return GateBackwardConfig(BLOCK_R=_power_of_two(R, 16, 32))
