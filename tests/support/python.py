"""A Python of its own, which has imported nothing yet."""

import os
import subprocess
import sys
import textwrap


def run_python(code, **environment):
    """What ``code`` prints, run without the variables that choose a backend but with those of ``environment``."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "EFFKERNELS_BACKEND")} | environment
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout
