"""``efficientnet info``."""

import argparse

from efficientnet.commands.common import add_size_arguments, check_channels, checking_input, print_stages

SUMMARY = "Stages, parameters and multiply-accumulates of a model; without a name, the known models."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME")
    add_size_arguments(parser, "the model's own")
    parser.add_argument("--num-classes", type=int, default=1000)


def run(args: argparse.Namespace) -> None:
    from efficientnet.choices import height_width
    from efficientnet.model.config import list_models

    if args.name is None:
        print(*list_models(), sep="\n")
        return
    from efficientnet.model.profile import count_macs, count_parameters, stage_table
    from efficientnet.weights.factory import create_model

    with checking_input():
        check_channels(args, 3)
        model = create_model(args.name, num_classes=args.num_classes, fused=False, device="meta")
        rows = stage_table(model, args.img_size)
    print_stages(rows)
    height, width = height_width(args.img_size or model.config.resolution)
    gmacs = count_macs(model, args.img_size) / 1e9
    print(f"\n{model.config.name}: {count_parameters(model):,} parameters, {gmacs:.3f} GMACs at {height} x {width}")
