"""``python -m effkernels.inspect``: what every shipped launch costs (effkernels/tools/cost_table.py)."""

from effkernels.tools.cost_table import main
from effkernels.tools.simulator.steps import predict_launches

if __name__ == "__main__":
    main(predict=predict_launches)
