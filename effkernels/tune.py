"""``python -m effkernels.tune``: launch configurations measured on this GPU or predicted (effkernels/tools/tune.py)."""

import sys

from effkernels.tools.simulator.steps import predict_calls
from effkernels.tools.tune import main

if __name__ == "__main__":
    sys.exit(main(predict=predict_calls))
