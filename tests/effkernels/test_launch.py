"""Launch configurations cover the whole image, with no more programs than there is work, for any shape."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effkernels.configs import rules

CPU = torch.device("cpu")
sizes = st.integers(1, 600)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def is_power_of_two(n):
    return n > 0 and n & (n - 1) == 0


@given(rows=st.integers(1, 5000), most=st.integers(1, 64))
def test_even_rows(rows, most):
    """As few chunks as ``most`` allows, and the last at most one row per chunk shorter than the others."""
    each = rules.even_rows(rows, most)
    chunks = -(-rows // each)
    assert 1 <= each <= most
    assert chunks == -(-rows // most) or each * (-(-rows // most)) >= rows
    assert (each - 1) * -(-rows // most) < rows, "one row less would do"


@given(rows=sizes, strips_w=st.integers(1, 300), S=st.sampled_from([1, 2, 4, 8]), halo=st.integers(0, 8))
def test_strip_rows(rows, strips_w, S, halo):
    """Never more steps for an image than with as few chunks as 16 rows allow; one strip at a time gains nothing from
    shorter ones."""

    def steps(each):
        return -(-strips_w * -(-rows // each) // S) * (each + halo)

    each = rules.strip_rows(rows, strips_w, S, halo)
    assert 1 <= each <= 16
    assert steps(each) <= steps(rules.even_rows(rows, 16))
    if S == 1 and halo:
        assert each == rules.even_rows(rows, 16)


def test_strips_of_small_images():
    """7 x 7: 4 strips of 7 rows would leave half of 8 lanes idle; 14 x 14: two groups of shorter strips would take
    longer than one."""
    assert rules.strip_rows(7, 4, 8, 2) == 4
    assert rules.strip_rows(14, 7, 8, 2) == 14
    assert rules.strip_rows(112, 56, 8, 2) == 16


@pytest.mark.parametrize("family", ["forward", "backward"])
@given(
    k=st.sampled_from([1, 3, 5, 7, 9]),
    stride=st.sampled_from([1, 2]),
    n=st.integers(1, 64),
    h=sizes,
    w=sizes,
    c=sizes,
    dtype=dtypes,
)
def test_depthwise_config(family, k, stride, n, h, w, c, dtype):
    make = getattr(rules, f"depthwise_{family}_config")
    config = make(k, stride, n, h, w, c, dtype, CPU)
    assert is_power_of_two(config.BLOCK_C) and is_power_of_two(config.S) and config.TW >= 1
    assert 1 <= config.TH <= 28
    assert config == make(k, stride, n, h, w, c, dtype, CPU), "the same shape, the same kernel"
    # Partials are few, and no program is without a tile.
    tiles = n * -(-h // config.TH) * -(-w // config.TW)
    assert 1 <= config.programs(tiles, -(-c // config.BLOCK_C), CPU) <= tiles


@given(k=st.sampled_from([1, 3, 5, 7, 9]), c=st.integers(1, 9000), tiles=st.integers(1, 10**6), dtype=dtypes)
def test_depthwise_counters_suffice(k, c, tiles, dtype):
    for device in (CPU, torch.device("meta")):
        for make in (rules.depthwise_forward_config, rules.depthwise_backward_config):
            config = make(k, 1, 64, 56, 56, c, dtype, device)
            blocks = -(-c // config.BLOCK_C)
            assert blocks * (1 + -(-config.programs(tiles, blocks, device) // 32)) <= rules.depthwise_counters(
                c, device
            )


@pytest.mark.parametrize("family", ["elementwise", "reduction"])
@given(c=st.integers(1, 4000), rows=st.integers(1, 10**6), others=st.integers(1, 5000), dtype=dtypes)
def test_rows_config(family, c, rows, others, dtype):
    config = getattr(rules, f"{family}_config")(c, dtype)
    assert is_power_of_two(config.BLOCK_ROWS) and is_power_of_two(config.BLOCK_C)
    # No smaller block of channels of those that still load 16 bytes a thread would waste fewer lanes.
    padded = -(-c // config.BLOCK_C) * config.BLOCK_C
    assert padded == min(-(-c // size) * size for size in (16, 32, 64))
    for divide in (config.split, config.persistent):
        for device in (CPU, torch.device("meta")):
            per_program, programs = divide(rows, others, device)
            assert programs >= 1 and (programs - 1) * per_program < rows <= programs * per_program
    assert programs * others <= 4 * 132 or programs == 1, "resident at once"


def test_processor_count():
    """The interpreter takes few programs, so that each has several tiles; compile-only launches look like an H200's."""
    assert rules.processor_count(CPU) == 1
    assert rules.processor_count(torch.device("meta")) == 132


def test_configurations_do_not_depend_on_batch_or_size():
    """Compile-time settings from k, stride and dtype alone: a new batch compiles nothing, and a new image size at most
    the backward's strips of 7 or of 8 columns."""
    for k, stride, dtype in itertools.product((3, 5, 7, 9), (1, 2), (torch.float32, torch.bfloat16)):
        for make in (rules.depthwise_forward_config, rules.depthwise_backward_config):
            configs = [
                make(k, stride, n, h, h, c, dtype, CPU) for n, h, c in ((1, 7, 1152), (64, 112, 32), (3, 33, 40))
            ]
            assert len({(c.BLOCK_C, c.S, c.num_warps, c.stages, c.split, c.maxnreg) for c in configs}) == 1
            strips = {7, 8} if (make, stride) == (rules.depthwise_backward_config, 1) and k <= 5 else {configs[0].TW}
            assert {c.TW for c in configs} == strips


def test_every_gpu_belongs_to_a_generation_that_is_compiled_for_and_predicted():
    from effkernels.configs.gpus import ARCHITECTURES, GPUS
    from effkernels.tools.simulator.machine import machine_of

    for name, gpu in GPUS.items():
        major, minor = gpu.capability
        assert 10 * major + minor in ARCHITECTURES
        assert machine_of(name).arch == 10 * major + minor
