"""The paper's Table 4 on this machine: ``python -m benchmarks.paper`` writes results/paper.json.

Tan & Le (2019) time inference on one core of a Xeon E5-2690, one image a step: ResNet-152 0.554 s against B1's 0.098 s,
GPipe 19.0 s against B7's 3.1 s. Here: the same of the networks that timm has (GPipe's AmoebaNet is not among them),
in turns in one process, ours as it is and in plain PyTorch. ONNX Runtime and OpenVINO are not measured.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import libraries
from benchmarks.cpu import in_turns, machine, plain
from efficientnet.weights.factory import create_model

RESULTS = Path(__file__).parent / "results" / "paper.json"
# timm's network or ours, its pixels; parameters in millions, multiply-adds in billions and seconds of the paper.
GROUPS = (
    ({"resnet152": (224, 60, 11, 0.554)}, {"efficientnet_b1": (240, 7.8, 0.70, 0.098)}),
    (
        {"legacy_senet154": (224, 146, 42, None), "nasnetalarge": (331, 89, 24, None)},
        {"efficientnet_b4": (380, 19, 4.2, None)},
    ),
    ({}, {"efficientnet_b7": (600, 66, 37, 3.1)}),
)


def size_of(model: torch.nn.Module, pixels: int) -> dict:
    """Millions of parameters, and billions of multiply-adds of one image."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, pixels, pixels))
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return {"parameters_m": round(parameters, 1), "macs_b": round(counter.get_total_flops() / 2e9, 2)}


def measure(others: dict, ours: dict, seconds: float) -> list[dict]:
    """A row for each network of a group."""
    import timm

    calls, over, rows = {}, {}, {}
    for name, (pixels, parameters, macs, took) in (others | ours).items():
        model = (create_model if name in ours else timm.create_model)(name).eval()
        x = torch.randn(1, 3, pixels, pixels).to(memory_format=torch.channels_last)
        paper = {"parameters_m": parameters, "macs_b": macs, "seconds": took}
        rows[name] = {"network": name, "pixels": pixels} | size_of(model, pixels) | {"paper": paper}
        model = model.to(memory_format=torch.channels_last)
        calls[name] = lambda model=model, x=x: model(x)
        if name in ours:
            reference = plain(model)
            calls[f"{name}, plain"] = lambda model=reference, x=x: model(x)
            over[name] = next(iter(others), f"{name}, plain")
    for variant, found in in_turns(calls, over, seconds).items():
        rows[variant.removesuffix(", plain")]["plain" if variant.endswith(", plain") else "measured"] = found
    return [row | {"load_average": round(os.getloadavg()[0], 2)} for row in rows.values()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=40.0, help="of a group's rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if (problem := libraries.problem("timm")) is not None:
        print(f"python -m benchmarks.paper: {problem}, which has the networks to compare with", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    document = {"rows": []} | machine()
    for others, ours in GROUPS:
        document["rows"] += measure(others, ours, args.seconds)
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        for row in document["rows"][-len(others | ours) :]:
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
