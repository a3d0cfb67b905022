"""The commands that count and time what happens before a kernel runs, without a GPU."""

import json

from support.python import run_python


def test_host_time(tmp_path):
    """Every launch of a step reaches the driver, by plans and as written; so do they with Triton's own launcher."""
    found = run_python(
        """
        import sys
        from effkernels.tools import host_time
        sys.exit(host_time.main(sys.argv[1:] or "--mode infer --batch-size 1 --repeats 2 --json FILE".split()))
        """.replace("FILE", str(tmp_path / "host.json")),
        TRITON_INTERPRET="0",
    )
    document = json.loads((tmp_path / "host.json").read_text())
    written, planned = document["rows"]
    assert not written["planned"] and planned["planned"] and written["launches"] == planned["launches"] > 60
    assert len(found.splitlines()) == 2 and "b0 infer, by its plans: " in found
    assert document["source"].startswith("measured on this CPU")


def test_kernels_are_counted():
    """As ``inspect`` tells different kernels apart."""
    found = run_python(
        """
        from effkernels.tools import compile_time
        from effkernels.tools.networks import network
        from effkernels.tools.simulator.steps import step_launches
        launches, _ = step_launches(*network("b0", False, 64), False, "h200")
        print(len({launch.digest() for launch in launches}), len(launches))
        compile_time.main("--mode infer --batch-size 64 --count".split())
        """,
        TRITON_INTERPRET="0",
    ).splitlines()
    kernels, launches = found[0].split()
    assert found[-1].split() == [kernels, "kernels,", launches, "launches:", "b0", "infer"]
