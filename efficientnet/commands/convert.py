"""``efficientnet convert``."""

import argparse

from efficientnet.commands.common import checking_input

SUMMARY = "The weights of a checkpoint under another library's names."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from efficientnet.weights.layouts import LAYOUTS
    from effkernels.geometry import PADDINGS

    parser.add_argument("source", metavar="SRC", help="a file, a URL or a Hugging Face Hub id")
    parser.add_argument("target", metavar="DST", help=".safetensors, or .pt, .pth, .bin for a plain state_dict")
    parser.add_argument("--to", required=True, choices=tuple(LAYOUTS))
    parser.add_argument(
        "--from", dest="layout", choices=tuple(LAYOUTS), help="layout of SRC (default: the one that knows its keys)"
    )
    parser.add_argument("--model", help="the model's name (default: what the file says, or the variant of that size)")
    parser.add_argument(
        "--padding", choices=PADDINGS, help="that the weights were trained with (default: usual with their layout)"
    )
    parser.add_argument(
        "--bn-eps", type=float, help="that the weights were trained with (default: usual with their layout)"
    )


def run(args: argparse.Namespace) -> None:
    import sys
    import warnings

    from efficientnet.weights.checkpoints import convert

    with checking_input(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        config = convert(
            args.source,
            args.target,
            args.to,
            layout=args.layout,
            model=args.model,
            padding=args.padding,
            bn_eps=args.bn_eps,
        )
    for warning in caught:
        print(f"efficientnet: warning: {warning.message}", file=sys.stderr)
    print(
        f"{args.target}: {args.to} layout, {config.name}, trained with padding {config.padding!r} and bn_eps "
        f"{config.bn_eps}"
    )
