"""Recipes: presets of TrainConfig as TOML files whose keys are its fields, those in training/recipes or a user's
own.
"""

import difflib
import sys
from dataclasses import fields
from pathlib import Path

from efficientnet.errors import InputError
from efficientnet.training.settings import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent / "recipes"


def list_recipes() -> list[str]:
    """The names of the recipes that come with the package; "paper", which the paper's share, is not one by itself."""
    return sorted(path.stem for path in FOLDER.glob("*-*.toml")) + ["digits"]


def load_recipe(name: str, extending: tuple[Path, ...] = ()) -> dict:
    """The settings of a recipe, as a dictionary of TrainConfig's fields.

    Args:
        name: a recipe that comes with the package, or a .toml file. Its key ``extends`` names a recipe that it adds to.
        extending: the files that led here by ``extends``.

    Raises InputError for an unknown recipe (naming near ones), a file that is not TOML, or a key that is no setting.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        near = difflib.get_close_matches(name, list_recipes(), n=2) or list_recipes()
        raise InputError(f"unknown recipe {name!r}; accepted: a .toml file, or one of {', '.join(near)}")
    if path.resolve() in extending:
        raise InputError(f"recipe {str(path)!r} extends itself")
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {str(path)!r} is not TOML: {error}") from error
    base = settings.pop("extends", None)
    known = [field.name for field in fields(TrainConfig)]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise InputError(
                f"recipe {str(path)!r} has the unknown setting {key!r}{f'; did you mean {near[0]}?' if near else ''}"
            )
    return (load_recipe(base, (*extending, path.resolve())) if base else {}) | settings
