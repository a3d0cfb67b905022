"""How kernels are called, read from the source: every argument by its name, and an absent one as None."""

import ast
import itertools
import re
from pathlib import Path

import pytest
import torch

from support.interpreter import HAS_TRITON

PACKAGE = Path(__file__).parents[2] / "effkernels"
KERNELS = sorted((PACKAGE / "kernels").glob("*.py"))


def launches(tree):
    """The calls ``name_kernel[grid](...)``."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Subscript)
            and isinstance(node.func.value, ast.Name)
        ):
            if node.func.value.id.endswith("_kernel"):
                yield node


def stands_in(value) -> bool:
    """Whether it is ``other if x is None else x``, or ``x or other``, with another than None for what is absent."""
    if isinstance(value, ast.BoolOp):
        return isinstance(value.op, ast.Or) and all(isinstance(side, ast.Name) for side in value.values)
    if not isinstance(value, ast.IfExp) or not isinstance(value.test, ast.Compare):
        return False
    sides = [value.test.left, *value.test.comparators, value.body, value.orelse]
    tested, chosen = sides[:2], sides[2:]
    nothing = [isinstance(side, ast.Constant) and side.value is None for side in chosen]
    return any(isinstance(side, ast.Constant) and side.value is None for side in tested) and not any(nothing)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_launches_name_their_arguments_and_pass_no_stand_in(path):
    for call in launches(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path.name}:{call.lineno}"
        assert not call.args, f"{where}: arguments by position"
        assert not [k.arg for k in call.keywords if stands_in(k.value)], f"{where}: stand-ins for what is absent"


def test_the_check_sees_a_stand_in_and_a_position():
    (call,) = launches(
        ast.parse("f_kernel[(1,)](x, y=w if y is None else y, z=z or w, a=None if b is None else c, d=1 if e else 2)")
    )
    assert len(call.args) == 1 and [k.arg for k in call.keywords if stands_in(k.value)] == ["y", "z"]


def test_the_formatter_is_never_switched_off():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 30
    assert [
        str(path.relative_to(PACKAGE)) for path in files if "fmt: " + "skip" in path.read_text(encoding="utf-8")
    ] == []


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_every_activation_maps_zero_to_zero(device, scratch):
    """What the kernels rely on for padding: it is loaded as 0, and stays 0 through any activation, in every dtype."""
    from effkernels.kernels.batchnorm import apply
    from effkernels.kernels.norm import BatchNorm
    from effkernels.reference import ACTIVATIONS

    zero, one = torch.zeros(16, device=device), torch.ones(16, device=device)
    norm = BatchNorm(weight=one, bias=zero, mean=zero, rstd=one)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.zeros(1, 2, 2, 16, device=device, dtype=dtype)
        for act in ACTIVATIONS:
            assert not apply(x, norm, act=act).any(), (act, dtype)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("training", [True, False])
def test_a_call_goes_through_five_files_to_its_first_launch(training, device, monkeypatch):
    """In the order of docs/architecture.md, none of them twice. (``launcher`` in common.py only wraps.)"""
    from effkernels import FusedMBConv
    from effkernels.kernels import pointwise_forward

    class Reached(Exception):
        pass

    class Stop:
        def __getitem__(self, grid):
            raise Reached

    monkeypatch.setenv("EFFKERNELS_BACKEND", "triton")
    monkeypatch.setattr(pointwise_forward, "pointwise_forward_kernel", Stop())
    block = FusedMBConv(8, 8).to(device).train(training)
    with torch.set_grad_enabled(training), pytest.raises(Reached) as caught:
        block(torch.zeros(1, 8, 4, 4, device=device))
    frames = [Path(str(entry.path)) for entry in caught.traceback]
    names = [str(path.relative_to(PACKAGE)) for path in frames if path.is_relative_to(PACKAGE)]
    walk = [name for name, _ in itertools.groupby(name for name in names if name != "kernels/common.py")]
    page = (PACKAGE.parent / "docs/architecture.md").read_text(encoding="utf-8")
    assert walk == re.findall(r"^\d\. `effkernels/(.*?)`", page, re.MULTILINE) and len(walk) == 5
