"""The order of the house: which file may import which, read from the sources; and what the pages about it name."""

import ast
import functools
import pkgutil
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("effkernels", "efficientnet", "benchmarks")

# Rooms from the ground up, each with the reason for its place: a file imports from its own room and from those listed
# before it, never from a later one. A room is a file or a folder; a file belongs to the innermost room that it is in.
ROOMS = {
    "effkernels/geometry.py": "padding and sizes of a convolution: arithmetic alone",
    "effkernels/parameters.py": "the tensors of one layer, by reference",
    "effkernels/reference.py": "what the kernels compute, in plain PyTorch: it knows none of them",
    "effkernels/dispatch.py": "whether kernels may run, and every reason why not",
    "effkernels/configs": "how a kernel is launched, by rule and by table; without Triton",
    "effkernels/kernels": "the mathematics; nothing above it knows pointers",
    "effkernels/ops": "which launches make an operator, and its gradient",
    "effkernels/cpu": "inference on a CPU by oneDNN; it knows neither Triton nor what launches it",
    "effkernels/functional.py": "operators for NCHW tensors, checked",
    "effkernels/modules": "layers with parameters, over the functional forms",
    "effkernels/adapters": "other libraries' layers, run by the functional forms",
    "effkernels/compilation.py": "has the kernels of a step compiled before it runs",
    "effkernels/graphs.py": "a model's forward as one CUDA graph",
    "effkernels/__init__.py": "the public names: points to rooms above, and none of those points to it",
    "effkernels/tools": "looks at launches, tunes and predicts them; nothing that runs a model needs it",
    "effkernels/tools/simulator": "predicts the launches of any module of fused blocks",
    "effkernels/tune.py": "a command of the tools",
    "effkernels/inspect.py": "a command of the tools",
    "efficientnet/errors.py": "what ends a command in one line; everything may raise it",
    "efficientnet/choices.py": "values that settings and commands accept, without torch",
    "efficientnet/files.py": "files that are whole at every moment",
    "efficientnet/memory.py": "what the C library does with freed memory; without torch",
    "efficientnet/devices.py": "where a model runs, whichever it is",
    "efficientnet/model": "the network, fresh; it knows neither files nor images",
    "efficientnet/weights": "fills a network from files, and writes it to them",
    "efficientnet/data": "prepares images as a network or its weights ask",
    "efficientnet/training": "brings networks, weights and data together",
    "efficientnet/measure": "times and counts what a finished network does",
    "efficientnet/scaling_study": "trains and measures many networks to compare them",
    "efficientnet/commands": "what the user typed, to one of the rooms above",
    "efficientnet/cli.py": "picks the command",
    "efficientnet/__main__.py": "starts the command line",
    "efficientnet/__init__.py": "the public names: points to rooms above, and none of those points to it",
    "effkernels/tools/networks.py": "the networks that are predicted by name, so it stands on both packages",
    "effkernels/tools/simulate.py": "a command that predicts those networks",
    "effkernels/tools/compile_time.py": "a command that compiles their kernels",
    "effkernels/tools/host_time.py": "a command that times their launches",
    "benchmarks": "times all of it against other libraries; nothing that is installed needs it",
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, Path]:
    """module name: file."""
    return {module_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported(text: str, modules: set[str]) -> dict[str, int]:
    """{module: line} of those of ``modules`` that a source imports, within functions too, or names in a string."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their package"
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [member if member in modules else node.module for member in members]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            names = [node.value]
        found |= {name: node.lineno for name in names if name in modules}
    return found


@functools.cache
def arrows() -> dict[str, dict[str, int]]:
    files = sources()
    found = {name: imported(path.read_text(encoding="utf-8"), set(files)) for name, path in files.items()}
    return {name: {to: line for to, line in targets.items() if to != name} for name, targets in found.items()}


def circles(graph: dict) -> list[str]:
    """The files that reach themselves by way of what they import."""

    def reached(start):
        seen, left = set(), list(graph[start])
        while left:
            name = left.pop()
            if name not in seen:
                seen.add(name)
                left += graph[name]
        return seen

    return sorted(name for name in graph if name in reached(name))


def room_of(path: Path) -> int:
    """The place of a file's room in ROOMS."""
    name, rooms = str(path.relative_to(ROOT)), list(ROOMS)
    within = [room for room in rooms if name == room or name.startswith(f"{room}/")]
    assert within, f"{name} is in no room"
    return rooms.index(max(within, key=len))


def test_no_circle_of_imports():
    assert circles(arrows()) == []


def test_arrows_between_rooms_go_one_way():
    files, wrong = sources(), []
    for name, targets in arrows().items():
        for target, line in targets.items():
            if room_of(files[target]) > room_of(files[name]):
                wrong.append(f"{files[name].relative_to(ROOT)}:{line} imports {target}")
    assert wrong == []


def test_every_room_is_there():
    assert [room for room in ROOMS if not (ROOT / room).exists()] == []


def test_no_test_imports_another():
    """What several tests share is in tests/support or a conftest.py."""
    files, wrong = sorted((ROOT / "tests").rglob("*.py")), []
    tests = {path.stem for path in files if path.stem.startswith("test_")}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            if isinstance(node, ast.ImportFrom):
                of_package = node.module.partition(".")[0] in PACKAGES  # a benchmark may have the name of a test
                names = [] if of_package else [*names, node.module]
            wrong += [f"{path.name}:{node.lineno} imports {name}" for name in names if name.rpartition(".")[2] in tests]
    assert wrong == []


def test_the_readme_is_short():
    """What a user must know first; the rest is in docs/."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def names_in(page: str) -> tuple[set[str], set[str]]:
    """(paths, dotted names of this project) among the words in backticks of a page, without its code blocks."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    words = {word for span in re.findall(r"`([^`]+)`", text) for word in span.split()}
    paths = {word for word in words if "/" in word or re.fullmatch(r"[\w-]+\.(py|md|json|toml|txt)", word)}
    dotted = {word for word in words if re.fullmatch(r"(effkernels|efficientnet|benchmarks)(\.\w+)+", word)}
    return paths, dotted - paths


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or what a module has."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_what_contributing_names_is_there():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths, dotted = names_in(page)
    assert len(paths) > 20 and len(dotted) > 2
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []
    assert sorted(name for name in dotted if not exists(name)) == []


def numbered(text: str) -> list[int]:
    """Lines that pick something by a number, sizes of a tensor aside."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Subscript) and not (
            isinstance(node.value, ast.Attribute) and node.value.attr == "shape"
        ):
            index = node.slice
            bounds = (index.lower, index.upper) if isinstance(index, ast.Slice) else (index,)
            bounds = [b.operand if isinstance(b, ast.UnaryOp) else b for b in bounds]
            if any(isinstance(b, ast.Constant) and isinstance(b.value, int) for b in bounds):
                found.append(node.lineno)
    return found


def test_no_operator_argument_is_picked_by_a_number():
    """An operator has forty arguments: their names alone keep them apart. (autograd.py, which reads the names, counts
    results.)
    """
    assert numbered("a = args[24:33]\nb = rest[-6]\nc = x.shape[1]\nd = t[i]") == [1, 2]
    files = [path for path in sorted((ROOT / "effkernels/ops").glob("*.py")) if path.name != "autograd.py"]
    files.append(ROOT / "effkernels/functional.py")
    wrong = {str(path.relative_to(ROOT)): numbered(path.read_text(encoding="utf-8")) for path in files}
    assert {name: lines for name, lines in wrong.items() if lines} == {}


def variadic(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return isinstance(node, ast.FunctionDef) and node.args.vararg is not None


def jitted(node: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def crowded(text: str, callees: set[str], most: int = 4, most_in_kernels: int = 6) -> list[str]:
    """Calls of one of ``callees`` with more arguments by position than a reader tells apart: "line: name"."""
    found = []

    def walk(node, limit):
        for child in ast.iter_child_nodes(node):
            within = limit
            if isinstance(child, ast.FunctionDef):
                within = most_in_kernels if jitted(child) else most
            elif isinstance(child, ast.Call) and len(child.args) > limit:
                name = ast.unparse(child.func).rpartition(".")[2]
                if name in callees:
                    found.append(f"{child.lineno}: {name}")
            walk(child, within)

    walk(ast.parse(text), most)
    return found


def test_calls_of_many_arguments_name_them():
    """Launchers, operators, configurations and what kernels call, so that a call reads without the signature beside it.

    A kernel may leave six to their places, elsewhere four are the most. What takes any number of sizes counts nowhere.
    The simulator's own functions take what an instruction has.
    """
    call = "(1, 2, 3, 4, 5"
    example = (
        f"@triton.jit\ndef k():\n f{call})\n f{call}, 6, 7)\ndef h():\n a.f{call})\n g{call})\n f{call[:-3]}, e=5)"
    )
    assert crowded(example, {"f"}) == ["4: f", "6: f"]
    files = [path for path in sorted((ROOT / "effkernels").rglob("*.py")) if "simulator" not in path.parts]
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}
    defined = [node for text in texts.values() for node in ast.parse(text).body]
    defined = [node for node in defined if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    names = {node.name for node in defined} - {node.name for node in defined if variadic(node)}
    assert {"depthwise_forward", "store_statistics", "mbconv", "BatchNorm", "depthwise_forward_config"} <= names
    wrong = {name: crowded(text, names) for name, text in texts.items()}
    assert {name: calls for name, calls in wrong.items() if calls} == {}


def untyped(text: str) -> list[str]:
    """Functions and methods, those whose names begin with _ and jitted ones aside, with an argument or a result that
    has no type.
    """

    def within(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                yield from within(child)
            elif isinstance(child, ast.FunctionDef) and (child.name == "__init__" or not child.name.startswith("_")):
                if not any("jit" in ast.unparse(decorator) for decorator in child.decorator_list):
                    yield child

    found = []
    for function in within(ast.parse(text)):
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        if bare or (function.returns is None and function.name != "__init__"):
            found.append(function.name)
    return found


def test_public_functions_have_types():
    """Launchers, operators, modules, commands and tools."""
    assert untyped("def f(x): pass\ndef g(x: int) -> int: pass\ndef _h(x): pass\nclass A:\n def m(self): pass") == [
        "f",
        "m",
    ]
    files = [path for package in ("effkernels", "efficientnet") for path in sorted((ROOT / package).rglob("*.py"))]
    wrong = {str(path.relative_to(ROOT)): untyped(path.read_text(encoding="utf-8")) for path in files}
    assert {name: functions for name, functions in wrong.items() if functions} == {}


# What a caller outside fixes, with its meaning: PyTorch's for print, and efficientnet/cli.py's for a command's file.
SAID_ELSEWHERE = {"extra_repr", "add_arguments", "run"}


def unexplained(text: str) -> list[str]:
    """Public functions and classes, and public members of those, that have no docstring."""

    def within(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and not child.name.startswith("_"):
                yield child
                if isinstance(child, ast.ClassDef):
                    yield from within(child)

    return [node.name for node in within(ast.parse(text)) if not ast.get_docstring(node)]


def test_public_names_are_explained():
    """Kernels and what they call, launchers, operators, layers, commands, tools."""
    example = "def f():\n 'x'\n def inner(): pass\ndef g(): pass\nclass A:\n 'x'\n def m(self): pass\ndef _h(): pass"
    assert unexplained(example) == ["g", "m"]
    files = [path for package in ("effkernels", "efficientnet") for path in sorted((ROOT / package).rglob("*.py"))]
    bare = {str(path.relative_to(ROOT)): unexplained(path.read_text(encoding="utf-8")) for path in files}
    bare = {name: [function for function in found if function not in SAID_ELSEWHERE] for name, found in bare.items()}
    assert {name: functions for name, functions in bare.items() if functions} == {}
