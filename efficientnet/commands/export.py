"""``efficientnet export``."""

import argparse

from efficientnet.commands.common import add_size_arguments, checking_input, load

SUMMARY = "A checkpoint as ONNX, TorchScript or torch.export program, checked against the model before it is kept."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help=".safetensors, or a state_dict saved by torch (.pt, .pth)")
    parser.add_argument("--model", help="the model's name, for a file that does not say it")
    parser.add_argument("--format", required=True, help="onnx, torchscript or torch-export")
    parser.add_argument("--output", required=True, metavar="FILE")
    add_size_arguments(parser, "as in training")
    parser.add_argument("--batch-size", type=int, help="images a run of the program (default: 1)")
    parser.add_argument(
        "--dynamic-batch", action=argparse.BooleanOptionalAction, default=False, help="any number of images a run"
    )
    parser.add_argument("--opset", type=int, help="of ONNX (default: torch's choice)")
    parser.set_defaults(device="cpu", amp="none", fused=False)  # for load: plain layers are what the formats know


def run(args: argparse.Namespace) -> None:
    from dataclasses import asdict
    from pathlib import Path

    import torch

    from efficientnet.weights.export import check_format, export_model

    with checking_input():
        if args.dynamic_batch and args.batch_size is not None:
            raise ValueError("batch_size is not for dynamic_batch, which takes any")
        check_format(args.format, args.opset)
        _, model, classes, preprocess = load(args)
        difference = export_model(
            model.to(memory_format=torch.contiguous_format),
            args.output,
            args.format,
            image_size=preprocess.img_size,
            in_chans=model.in_chans,
            batch_size=1 if args.batch_size is None else args.batch_size,
            dynamic_batch=args.dynamic_batch,
            opset=args.opset,
            metadata={"classes": classes, "preprocess": asdict(preprocess)},
        )
    batch = "any" if args.dynamic_batch else args.batch_size or 1
    height, width = preprocess.hw
    print(
        f"{args.output}: {args.format}, {batch} x {model.in_chans} x {height} x {width} images, "
        f"{Path(args.output).stat().st_size:,} bytes"
    )
    print(f"maximal difference from the model: {difference.absolute:.3g} (logits reach {difference.largest_logit:.3g})")
