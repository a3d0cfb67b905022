"""README and docs: every Python block runs, every command is one, the API reference is current, every reason is in the
table.
"""

import ast
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from efficientnet import cli, create_model
from efficientnet.weights.checkpoints import convert, save_checkpoint

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *ROOT.glob("docs/*.md")])
COMMIT = "0" * 40


def blocks(language):
    """(page:line, text) of the fenced blocks of a language."""
    for page in PAGES:
        lines, inside = page.read_text(encoding="utf-8").splitlines(), None
        for number, line in enumerate(lines, 1):
            if line.startswith("```"):
                if inside is None:
                    inside, start = line[3:], number + 1
                else:
                    if inside == language:
                        yield f"{page.relative_to(ROOT)}:{start}", "\n".join(lines[start - 1 : number - 1]) + "\n"
                    inside = None


def lines():
    """(page:line of the block, words) of every command in blocks without a language, or of bash; of a pipe the last."""
    for where, text in [*blocks(""), *blocks("bash")]:
        for line in text.splitlines():
            yield where, shlex.split(line.rpartition(" | ")[2], comments=True)


def commands():
    """(page:line, arguments) of every command of the package, started by python or torchrun."""
    for where, words in lines():
        if "efficientnet" in words and words[words.index("efficientnet") - 1] == "-m":
            yield f"{where}: {' '.join(words)}", words[words.index("efficientnet") + 1 :]


def cases(pairs):
    return [pytest.param(value, id=name) for name, value in pairs]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub cache with timm's default weights of B0, which random numbers stand for."""
    home = tmp_path_factory.mktemp("hub")
    repo = home / "models--timm--efficientnet_b0.ra_in1k"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(COMMIT)
    (repo / "snapshots" / COMMIT).mkdir(parents=True)
    save_checkpoint(create_model("efficientnet_b0", fused=False), repo / "snapshots" / COMMIT / "model.safetensors")
    return home


@pytest.mark.parametrize("source", cases(blocks("python")))
@pytest.mark.filterwarnings("ignore:classifier is re-initialised")
def test_python_block(source, hub, timm, torchvision, tmp_path, monkeypatch, capsys):
    """As it stands, alone, where training on digits has left its best checkpoint, without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(hub), raising=False)
    monkeypatch.chdir(tmp_path)
    Path("runs/digits").mkdir(parents=True)
    if "runs/digits" in source:
        save_checkpoint(create_model("efficientnet_b0", num_classes=10), "runs/digits/best.safetensors")
    torch.manual_seed(0)
    exec(compile(source, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("argv", cases(commands()))
def test_command_is_one(argv):
    """Every option exists and takes what is given."""
    args = cli._parser().parse_args(argv)
    assert args.command == argv[0] and callable(args.run)


def test_every_other_command_is_known():
    """Those that are not the package's own: virtual environments, installations of what setup.py has, and pytest on
    what is there.
    """
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for where, words in lines():
        if "efficientnet" in words:
            continue
        if "install" in words:
            constraints, extra = words[words.index("-c") + 1], re.fullmatch(r"\.\[(\w+)\]", words[-1])[1]
            assert (ROOT / constraints).exists() and f'"{extra}": ' in setup, where
        elif Path(words[0]).name == "pytest":
            assert all((ROOT / word).exists() for word in words[1:] if word.endswith("/")), where
        elif Path(words[0]).name == "ruff":
            assert words[1:] in (["check", "."], ["format", "--check", "."]), where
        else:
            own = words[:2] == ["python", "-m"] and words[2].startswith("effkernels.")
            known = importlib.util.find_spec(words[2]) if own else words == ["python3", "-m", "venv", ".venv"]
            assert known, (where, words)


@pytest.mark.parametrize("argv", cases(c for c in commands() if c[1][0] == "info" or c[1][:2] == ["scale", "--phi"]))
def test_cheap_command(argv, capsys):
    assert cli.main(argv) == 0
    assert "parameters" in capsys.readouterr().out


@pytest.mark.slow
def test_commands_of_a_checkpoint(tmp_path, monkeypatch, capsys):
    """Those that the first one's checkpoint is for, in order; it trains two epochs here."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--data", "digits", "--output", "runs/digits", "--epochs", "2"]) == 0
    ran = []
    for where, argv in commands():
        if "runs/digits/best.safetensors" in argv:
            if argv[-1] == "-":  # the names of images from find
                monkeypatch.setattr(
                    sys, "stdin", io.StringIO("\n".join(str(p) for p in Path("runs").rglob("samples/*.png")))
                )
            assert cli.main(argv) == 0, where
            ran.append(argv[0])
    assert {"validate", "predict", "export"} <= set(ran)


# What shortens a command that trains or measures: options that come later count.
SHORT = {
    "train": "--epochs 1 --img-size 32 --batch-size 4 --device cpu",
    "scale": "--step 0.2 --img-size 32 --batch-size 4 --device cpu",
}


@pytest.mark.slow
def test_commands_that_train_or_measure(hub, tmp_path, monkeypatch):
    """Those on images of one's own, on digits and on a GPU, in order and shortened: on a few images, an epoch, the
    CPU.
    """
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.chdir(tmp_path)
    for i in range(24):
        path = Path(f"images/{'abc'[i % 3]}/{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 30), 60).convert("RGB").save(path)
    ran = []
    for where, argv in commands():
        if argv[0] == "train" or (argv[0] == "scale" and ("--search" in argv or "--latency" in argv)):
            argv = [word.replace("imagefolder:PATH", "imagefolder:images") for word in argv] + SHORT[argv[0]].split()
            if "digits" in " ".join(argv):
                argv += ["--batch-size", "64"]
            if "--global-batch-size" in argv:
                argv += ["--global-batch-size", "8", "--no-sync-bn"]  # one process here
            if "--latency" in argv:
                argv += ["--latency", "1000"]
            if "--data" in argv and argv[0] == "scale" or "auto" in argv:
                argv += ["--epochs", "1" if argv[0] == "scale" else "2"]
            assert cli.main(argv) == 0, (where, argv)
            ran.append(argv)
    assert len(ran) >= 10


@pytest.mark.slow
def test_other_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(create_model("tf_efficientnet_b0"), "tf_b0.safetensors")
    convert("tf_b0.safetensors", "efficientnet-b0.pth", "lukemelas")
    for where, argv in commands():
        if argv[0] == "convert" or (argv[0] == "scale" and "--data" not in argv and "cuda" not in argv):
            assert cli.main(argv) == 0, where


def test_api_reference_is_current():
    write = "import sys; sys.path.insert(0, 'docs'); import make_api; sys.stdout.write(make_api.page())"
    done = subprocess.run(
        [sys.executable, "-c", write],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "docs/api.md").read_text(encoding="utf-8"), "run python docs/make_api.py"


def reasons():
    """(file:line, longest constant part) of every string of three words or more that the gate's functions return or
    set.
    """
    for path in sorted((ROOT / "effkernels").rglob("*.py")):
        name = str(path.relative_to(ROOT / "effkernels"))
        if (
            not name.startswith(("dispatch", "adapters/", "modules/mbconv", "modules/stem_head"))
            or name == "adapters/accelerate.py"
        ):
            continue
        tree, other = ast.parse(path.read_text(encoding="utf-8")), set()
        for node in ast.walk(tree):
            assigned = ast.unparse(node).partition(" ")[0] if isinstance(node, (ast.Assign, ast.AugAssign)) else None
            names = ("_NAMES", "_METHODS,", "(_METHODS,", "NETWORKS")  # what a forward calls
            if assigned in names or isinstance(node, (ast.Raise, ast.Expr)):  # or errors, docstrings
                other |= set(ast.walk(node))
            elif isinstance(node, ast.JoinedStr):
                other |= set(node.values)
        for node in ast.walk(tree):
            if node not in other and isinstance(node, (ast.Constant, ast.JoinedStr)):
                values = [
                    v.value
                    for v in (node.values if isinstance(node, ast.JoinedStr) else [node])
                    if isinstance(v, ast.Constant)
                ]
                parts = [value.strip(" ,:()") for value in values if isinstance(value, str)]
                if any(len(part.split()) >= 3 for part in parts):
                    yield f"{name}:{node.lineno}", max(parts, key=len)


def test_every_reason_is_in_the_troubleshooting_table():
    table = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    found = list(reasons())
    assert len(found) >= 45
    assert [reason for reason in found if reason[1] not in table] == []


# Of the standard library, gone in 3.12 (distutils, asyncore, asynchat, imp, smtpd) and 3.13 (PEP 594, lib2to3).
REMOVED = set(
    "distutils asyncore asynchat imp smtpd aifc audioop cgi cgitb chunk crypt imghdr mailcap msilib nis nntplib "
    "ossaudiodev pipes sndhdr "
    "spwd sunau telnetlib uu xdrlib lib2to3".split()
)


def test_nothing_that_newer_pythons_removed_is_imported():
    for package in ("effkernels", "efficientnet", "benchmarks", "tests", "docs"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert REMOVED.isdisjoint(name.split(".")[0] for name in names), (path, names)


def test_links_between_pages():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_sources_are_python_310():
    """The oldest Python of setup.py: its grammar (ruff's target-version is the same), and nothing of a newer standard
    library.
    """
    setup = (ROOT / "setup.py").read_text()
    assert 'python_requires=">=3.10"' in setup and "Python :: 3.{minor}" in setup and "(10, 11, 12, 13)" in setup
    assert 'target-version = "py310"' in (ROOT / "pyproject.toml").read_text()
    for package in ("effkernels", "efficientnet", "benchmarks", "tests", "docs"):
        for path in (ROOT / package).rglob("*.py"):
            ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=(3, 10))
    check = [sys.executable, "-c", "import vermin; vermin.main()", "--quiet", "--no-tips", "--violations", "-t=3.10-"]
    done = subprocess.run([*check, "effkernels", "efficientnet"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
