"""``efficientnet info``."""

from efficientnet.commands.common import checking_input

SUMMARY = "Stages, parameters and multiply-accumulates of a model; without a name, the known models."


def add_arguments(parser):
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("--img-size", type=int, help="pixels (default: the model's own)")
    parser.add_argument("--num-classes", type=int, default=1000)


def run(args):
    from efficientnet.config import list_models

    if args.name is None:
        print(*list_models(), sep="\n")
        return
    from efficientnet.model import create_model
    from efficientnet.profile import count_macs, count_parameters, stage_table

    with checking_input():
        model = create_model(args.name, num_classes=args.num_classes, fused=False, device="meta")
        rows = stage_table(model, args.img_size)
    table = [("stage", "operator", "kernel", "stride", "expand", "channels", "layers", "input", "output", "parameters", "MACs")]
    for i, row in enumerate(rows):
        sizes = (f"{height}x{width}" for height, width in (row.input_size, row.output_size))
        expand = "" if row.expand_ratio is None else f"{row.expand_ratio:g}"
        table.append(
            (i, row.operator, row.kernel_size, row.stride, expand, row.channels, row.repeats, *sizes, f"{row.params:,}", f"{row.macs:,}")
        )
    widths = [max(len(str(line[column])) for line in table) for column in range(len(table[0]))]
    for line in table:
        cells = [str(cell).rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[1] = str(line[1]).ljust(widths[1])
        print(*cells, sep="  ")
    size = args.img_size or model.config.resolution
    gmacs = count_macs(model, args.img_size) / 1e9
    print(f"\n{model.config.name}: {count_parameters(model):,} parameters, {gmacs:.3f} GMACs at {size} x {size}")
