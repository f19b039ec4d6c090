"""The house keeps its shape: imports run downhill, files stay short, nothing of one machine is written down."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "fastdiff_kernels": ROOT / "kernels" / "fastdiff_kernels",
    "fastdiff": ROOT / "fastdiff",
    "fastdiff_pipelines": ROOT / "pipelines" / "fastdiff_pipelines",
    "fastdiff_app": ROOT / "app" / "fastdiff_app",
}
RANK = {name: rank for rank, name in enumerate(FLOORS)}
LONGEST_FILE = 400
PUBLIC = ["Acceleration", "Plan", "Unsupported", "Verdict", "accelerate", "audit", "load"]


def _sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def _module(path: Path) -> str:
    for name, folder in FLOORS.items():
        if path.is_relative_to(folder):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    raise ValueError(path)


MODULES = {_module(path): path for path in _sources(*FLOORS.values())}


def _imported(node: ast.stmt, module: str, is_package: bool) -> list[str]:
    """Dotted names one statement imports; of ``from a import b`` both ``a`` and ``a.b``, as ``b`` may be a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        here = module.split(".") if is_package else module.split(".")[:-1]
        above = here[: len(here) - node.level + 1]
        base = ".".join([*above, base] if base else above)
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def _imports(path: Path, module: str, *, on_import_only: bool) -> set[str]:
    """Names imported anywhere in a file, or only those that run when it is imported."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.stmt):
            names.update(_imported(node, module, path.name == "__init__.py"))
        if on_import_only:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                waiting.extend(node.orelse)
                continue
        waiting.extend(ast.iter_child_nodes(node))
    return names


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downhill(module: str) -> None:
    rank = RANK[module.split(".")[0]]
    for name in _imports(MODULES[module], module, on_import_only=False):
        top = name.split(".")[0]
        assert RANK.get(top, -1) <= rank, f"{module} imports {name}, which lies on a floor above"
        assert top not in ("tests", "benchmarks"), f"{module} imports {name}, which is not installed"


def test_no_circular_imports() -> None:
    graph = {
        module: {name for name in _imports(path, module, on_import_only=True) if name in MODULES and name != module}
        for module, path in MODULES.items()
    }
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in finished:
            for other in sorted(graph[module]):
                # importing a.b runs a/__init__ first, so a package naming its own parts is no circle
                if not module.startswith(f"{other}."):
                    visit(other, (*trail, module))
            finished.add(module)

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize("path", _sources(*FLOORS.values(), ROOT / "tests", ROOT / "benchmarks"), ids=str)
def test_files_stay_short(path: Path) -> None:
    lines = path.read_text("utf-8").count("\n")
    assert lines <= LONGEST_FILE, f"{path.name} has {lines} lines; split it where a reader would"


def _text_files() -> list[Path]:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if tracked.returncode:
        pytest.skip("needs a git checkout")
    kinds = {".py", ".md", ".toml", ".json", ".jsonl", ".txt", ".html", ".js", ".css", ""}
    paths = [ROOT / name for name in tracked.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file() and path.suffix in kinds and path.name != "LICENSE"]


def test_nothing_of_one_machine_is_written_down() -> None:
    # spelled in pieces, or this file would find itself
    folders = "|".join(["wo" + "rk", "ho" + "me", "ro" + "ot", "o" + "pt", "tm" + "p", "Us" + "ers"])
    machine_path = re.compile(rf"(?<![\w.$}}/~-])/(?:{folders})/[\w.-]+")
    index = re.compile(
        "|".join(["pypi" + r"\.org/simple", "download" + r"\.pytorch\.org", "--extra-index-" + r"url\s+http"])
    )
    key = re.compile(r"(?i)(hf_[a-z]{30,}|ghp_[a-z0-9]{30,}|BEGIN [A-Z ]*PRIVATE KEY)")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()}"
        for path in _text_files()
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1)
        for pattern in (machine_path, index, key)
        if (match := pattern.search(line))
    ]
    assert not found, "\n".join(found)


def test_public_names_are_pinned() -> None:
    import fastdiff

    assert sorted(fastdiff.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(fastdiff, name) is not None


def _without_torch(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in an interpreter in which torch cannot be found, as on a machine that has not installed it."""
    block = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, check=False, cwd=ROOT)


def test_import_needs_no_torch() -> None:
    ran = _without_torch("import fastdiff; print(fastdiff.__version__)")
    assert ran.returncode == 0, ran.stderr
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", ran.stdout.strip())


def test_importing_is_cheap() -> None:
    code = (
        "import fastdiff, fastdiff_app.cli, sys; print(sorted({'torch', 'diffusers', 'av', 'PIL'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [["doctor"], ["generate", "a red circle", "-o", "never.png"]])
def test_without_torch_the_program_says_what_to_install(command: list[str]) -> None:
    ran = _without_torch(f"from fastdiff_app.cli import main; sys.argv = ['fastdiff', *{command!r}]; main()")
    said = ran.stdout + ran.stderr
    assert "Traceback" not in said
    assert "pip install" in said
    assert "torch" in said
    assert ran.returncode == (0 if command == ["doctor"] else 4)


def _fenced(path: Path) -> list[str]:
    blocks = re.findall(r"```(?:console|sh|bash)\n(.*?)```", path.read_text("utf-8"), flags=re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [command.split("#")[0].strip() for line in lines for command in line.split("&&") if command.strip()]


def test_commands_in_the_documents_exist() -> None:
    from typer.main import get_command

    from fastdiff_app.cli import app

    programs = get_command(app)
    known = set(getattr(programs, "commands", {}))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    commands = [line for name in ("README.md", "CONTRIBUTING.md") for line in _fenced(ROOT / name)]
    assert commands
    for line in commands:
        words = line.split()
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, line
        elif words[0].endswith("fastdiff") and len(words) > 1:
            assert words[1] in known, line
            options = {word.split("=")[0] for word in words[2:] if word.startswith("-")}
            offered = {flag for parameter in programs.commands[words[1]].params for flag in parameter.opts}  # type: ignore[attr-defined]
            assert options <= offered | {"--help"}, line


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / floor / "README.md" for floor in ("kernels", "pipelines", "app"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text("utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_dependency_has_a_lower_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    listed = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    assert [name for name in listed if not re.search(r">=|==|^fastdiff\[", name)] == []
    assert not [name for name in project["dependencies"] if re.match(r"(torch|accelerate|peft)\b", name)]
