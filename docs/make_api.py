"""Writes docs/api.md from signatures and docstrings: python docs/make_api.py (a test compares the file with what this
gives).
"""

import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("api.md")
FUNCTIONAL = ("mbconv", "depthwise_conv_bn_act", "bn_act_add", "squeeze_excite", "stem", "head")
HEAD = """# API reference

Made from the docstrings by `python docs/make_api.py`; do not edit.
"""


def signature(name: str, thing) -> str:
    """As one line, or one argument a line where that is longer than a page."""
    arguments = inspect.signature(thing)
    line = f"{name}{arguments}"
    if len(line) <= 100:
        return line
    parts, star = [], False
    for p in arguments.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        parts.append(str(p))
    result = (
        ""
        if arguments.return_annotation is arguments.empty
        else f" -> {inspect.formatannotation(arguments.return_annotation)}"
    )
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


def entry(name: str, thing) -> str:
    documented = inspect.getdoc(thing)
    if not documented:
        raise ValueError(f"{name} has no docstring")
    text = f"### `{name}`\n\n```text\n{signature(name, thing)}\n```\n\n```text\n{documented}\n```\n"
    if inspect.isclass(thing):
        for method, function in vars(thing).items():
            if not method.startswith("_") and inspect.isfunction(function) and inspect.getdoc(function):
                text += f"\n`{method}{inspect.signature(function)}`: {inspect.getdoc(function)}\n"
    return text


def page() -> str:
    sys.path.insert(0, str(ROOT))
    import efficientnet
    import effkernels
    from effkernels import functional

    parts = [HEAD, "## effkernels\n"]
    parts += [
        entry(name, getattr(effkernels, name))
        for name in effkernels.__all__
        if not inspect.ismodule(getattr(effkernels, name))
    ]
    parts += ["## effkernels.functional\n", f"{inspect.getdoc(functional)}\n"]
    parts += [entry(name, getattr(functional, name)) for name in FUNCTIONAL]
    parts += ["## efficientnet\n"]
    parts += [entry(name, getattr(efficientnet, name)) for name in efficientnet.__all__]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
