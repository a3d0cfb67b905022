"""``python -m effkernels.tune``: launch configurations measured on this GPU (effkernels/tools/tune.py)."""

import sys

from effkernels.tools.tune import main

if __name__ == "__main__":
    sys.exit(main())
