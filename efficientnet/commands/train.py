"""``efficientnet train``."""

import argparse
from dataclasses import fields

from efficientnet.commands.common import add_input_size, checking_input, size_argument
from efficientnet.errors import InputError
from efficientnet.training.settings import TrainConfig, option_names

SUMMARY = "Train a model; write checkpoints, metrics and curves."
KINDS = {
    "int": {"type": int},
    "float": {"type": float},
    "str": {},
    "tuple": {},
    "int | tuple": {"type": size_argument},
    "bool": {"action": argparse.BooleanOptionalAction},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--recipe, and one option for each field of TrainConfig, which owns the defaults and the checks."""
    parser.add_argument(
        "--recipe", help="settings to start from, which options override: a .toml file, or paper-b0 to paper-b7, digits"
    )
    for field in fields(TrainConfig):
        kind = str(getattr(field.type, "__name__", field.type)).removesuffix(" | None")
        help = field.metadata["help"].replace("%", "%%")
        if kind != "bool" and field.default is not None:
            help += f" (default: {field.default})"
        # Not there unless given: then a recipe's setting counts, or TrainConfig's default.
        kwargs = (
            {"dest": field.name, "default": argparse.SUPPRESS, "help": help} | KINDS[kind] | field.metadata["argparse"]
        )
        parser.add_argument(*option_names(field.name), **kwargs)
    add_input_size(parser)


def run(args: argparse.Namespace) -> None:
    from efficientnet.training.distributed import leave
    from efficientnet.training.recipes import load_recipe
    from efficientnet.training.trainer import Trainer

    given = {field.name: getattr(args, field.name) for field in fields(TrainConfig) if hasattr(args, field.name)}
    try:
        with checking_input():
            settings = load_recipe(args.recipe) if args.recipe else {}
            try:
                config = TrainConfig(**settings | given)
            except InputError as error:
                raise InputError(f"{error} (recipe {args.recipe!r})" if args.recipe else str(error)) from error
            trainer = Trainer(config)
        trainer.run()
    finally:
        leave()
