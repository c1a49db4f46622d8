"""The plan of the house: imports go downward only, rooms of a floor do not know each other, nothing heavy leaks."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sd3pipe"
FLOORS = {
    "__main__": 6, "cli": 5, "commands": 4,
    "training": 3, "encoding": 3, "exporting": 3, "judging": 3, "previewing": 3, "project": 3, "reporting": 3,
    "demo": 3, "captioning": 3,
    "studio": 3.5,  # a view on what the rooms of floor 3 know, and a way to start what the commands do
    "diffusion": 2.5,  # stands on the rooms of floor 2, under those of floor 3: who trains, samples or judges draws
    "cache": 2, "data": 2, "models": 2, "memory": 2, "adapters": 2, "params": 1, "pages": 1, "tensors": 1,
    "caption_findings": 0,
    "child": 0, "config": 0, "console": 0, "cores": 0, "device": 0, "device_memory": 0, "documents": 0, "errors": 0,
    "file_stamps": 0, "files": 0, "fingerprint": 0, "intervals": 0, "judgement": 0, "living": 0, "metrics": 0,
    "picture_losses": 0, "problems": 0, "prompt_settings": 0, "remote": 0, "rules": 0, "safe_path": 0, "shell": 0,
    "stages": 0, "stopping": 0, "temporaries": 0, "variants": 0, "watched": 0, "words": 0,
}  # fmt: skip
TEXT_ENCODER_LIBRARIES = {"transformers", "tokenizers", "sentencepiece"}
ORACLES = {"diffusers", "peft", "skimage", "hypothesis", "pytest"}


def module_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@cache
def imports_of(file: Path, *, top_level_only: bool = False) -> frozenset[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def package_imports(file: Path, modules: frozenset[str]) -> set[str]:
    return {name for name in imports_of(file) if name in modules}


@cache
def modules() -> frozenset[str]:
    return frozenset(module_name(file) for file in module_files())


def test_every_module_has_a_floor():
    assert {room_of(name) for name in modules()} - {""} <= set(FLOORS)


def test_contributing_shows_the_floors():
    table = re.findall(r"^\| ([\d½]+) \| ([^|]+) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)
    shown = {
        name.removesuffix("/").removesuffix(".py"): float(floor.replace("½", ".5"))
        for floor, rooms in table
        for name in re.findall("`([^`]+)`", rooms)
    }
    assert shown == {name: floor for name, floor in FLOORS.items() if name != "__main__"}


def test_imports_go_downward_only():
    wrong = []
    for file in module_files():
        here = room_of(module_name(file))
        for target in package_imports(file, modules()):
            there = room_of(target)
            if there in ("", here):
                continue
            allowed = FLOORS[there] < FLOORS[here] or FLOORS[there] == FLOORS[here] == 0
            if not allowed:
                wrong.append(f"{module_name(file)} -> {target}")
    assert not wrong


def test_floor_two_takes_plain_arguments():
    wrong = [
        f"{module_name(file)} -> {target}"
        for file in module_files()
        if 2 <= FLOORS.get(room_of(module_name(file)), 0) < 3
        for target in package_imports(file, modules())
        if room_of(target) == "params"
    ]
    assert not wrong


def test_commands_do_not_import_each_other():
    wrong = [
        f"{module_name(file)} -> {target}"
        for file in (PACKAGE / "commands").glob("*.py")
        for target in package_imports(file, modules())
        if room_of(target) == "commands" and target not in ("sd3pipe.commands", module_name(file))
    ]
    assert not wrong


def test_there_are_no_import_rings():
    graph = {module_name(file): package_imports(file, modules()) - {module_name(file)} for file in module_files()}
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        path.append(name)
        for target in graph[name]:
            visit(target)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_every_init_file_is_empty():
    assert all(not file.read_text() for file in PACKAGE.rglob("__init__.py"))


def test_oracles_stay_in_tests():
    wrong = {
        module_name(file): found
        for file in module_files()
        if (found := {n.split(".")[0] for n in imports_of(file)} & ORACLES)
    }
    assert not wrong


def reachable(module: str) -> set[str]:
    files = {module_name(file): file for file in module_files()}
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += package_imports(files[name], modules())
    return seen


def test_train_cannot_reach_the_text_encoders():
    files = {module_name(file): file for file in module_files()}
    libraries = {
        f"{name} imports {library}"
        for name in reachable("sd3pipe.commands.train")
        for library in {n.split(".")[0] for n in imports_of(files[name])} & TEXT_ENCODER_LIBRARIES
    }
    assert not libraries


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_imports_no_torch():
    loaded = loaded_by("from sd3pipe.cli import run\nassert run(['--help']) == 0")
    assert not loaded & {"torch", "zarr", "transformers", "PIL", "numpy", "jinja2"}


@pytest.mark.parametrize("stage", ["encode-text", "encode-latents", "train", "export"])
def test_help_of_a_stage_imports_no_torch(stage):
    loaded = loaded_by(f"from sd3pipe.cli import run\nassert run(['{stage}', '--help']) == 0")
    assert not loaded & {"torch", "zarr", "transformers", "PIL"}


def test_names_say_what_they_hold():
    vague = re.compile(r"^(utils?|common|helpers?|misc)$")
    wrong = [name for name in modules() if vague.match(name.split(".")[-1])]
    assert not wrong


def writes_to_a_terminal(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id == "print"
    return isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("sys.stdout", "sys.stderr", "typer.echo"))


def test_only_the_console_writes_to_a_terminal():
    """Names and captions pass through its escaping; the answer to a signal holds neither, and waits for no import."""
    others = [file for file in module_files() if module_name(file) not in ("sd3pipe.console", "sd3pipe.stopping")]
    wrong = [
        f"{module_name(file)}: line {node.lineno}"
        for file in others
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if writes_to_a_terminal(node)
    ]
    wrong += [module_name(file) for file in others if any(n.split(".")[0] == "rich" for n in imports_of(file))]
    assert not wrong


OWN_READERS = {  # what they parse is no file of text, or one of the kernel's
    "sd3pipe.documents": "is the door",
    "sd3pipe.device_memory": "/proc and /sys/fs/cgroup",
    "sd3pipe.living": "/proc",
    "sd3pipe.cores": "/sys",
    "sd3pipe.cache.segment": "JSON in a header, checked by its hash",
    "sd3pipe.encoding.ray_engine": "JSON between processes of one run",
    "sd3pipe.models.fp8_scales": "JSON in a tensor of bounded size",
    "sd3pipe.tensors.header": "JSON in a header of bounded size",
    "sd3pipe.diffusion.prompts": "JSON in a checked index",
    "sd3pipe.training.state_file": "a copy of its own JSON",
}
OWN_WRITERS = {  # they write what has no name of the user's yet
    "sd3pipe.files": "is the door",
    "sd3pipe.cache.segment": "into a writer's own folder",
    "sd3pipe.cache.writers": "a writer's own heartbeat",
    "sd3pipe.cache.zarr_group": "into a writer's own folder",
    "sd3pipe.exporting.checkpoints": "into a folder that is named when it is whole",
    "sd3pipe.training.checkpoints": "into a folder that is named when it is whole",
}


def calls_of(file: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def reads_text(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    return name in ("json.load", "json.loads", "tomllib.load", "tomllib.loads") or name.endswith(
        (".read_text", "path.read_bytes", "file.read_bytes")
    )


def writes_a_file(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    if name == "open":
        modes = [value.value for value in call.args[1:2] if isinstance(value, ast.Constant)]
        return any(set(str(mode)) & set("wax+") for mode in modes)
    return name in ("save_file", "shutil.copyfile", "shutil.copytree") or name.endswith(
        (".write_text", ".write_bytes", ".touch")
    )


@pytest.mark.parametrize("act, exempt", [(reads_text, OWN_READERS), (writes_a_file, OWN_WRITERS)])
def test_files_are_read_and_written_through_one_door(act, exempt):
    """documents.py waits for no pipe and has bounds; files.py follows links, refuses devices, and is atomic."""
    doing = {module_name(file) for file in module_files() if any(map(act, calls_of(file)))}
    assert doing <= set(exempt), f"go through the door: {doing - set(exempt)}"


def test_test_files_have_names_of_their_own():
    """Test modules are imported by file name, so two of one name shadow each other."""
    names = [file.name for file in (ROOT / "tests").rglob("*.py") if file.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def test_tests_share_through_support_alone():
    """A helper that two test modules need lies in tests/support/, for tests and benchmarks alike."""
    files = [file for folder in ("tests", "benchmarks", "scripts") for file in (ROOT / folder).rglob("*.py")]
    wrong = [f"{file.name} imports {name}" for file in files for name in imports_of(file) if name.startswith("test_")]
    assert not wrong


AXES = re.compile(r"_?[a-z][a-z0-9_]*_([A-Z][A-Za-z0-9]*)")  # context_BLD, latents_BChw
LEGEND_LINE = re.compile(r"(?m)^.*(?<![\w'])[A-Za-z](?: [A-Za-z])* [a-z]{2}.*$")  # "B batch, h w latent pixels"


def axes_used(tree: ast.AST) -> set[str]:
    """Returns the letters of the axes that names of the code end in."""
    nodes = list(ast.walk(tree))
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    names += [node.arg for node in nodes if isinstance(node, ast.arg | ast.keyword) and node.arg]
    names += [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    return {letter for name in names if (found := AXES.fullmatch(name)) for letter in found[1] if letter.isalpha()}


def axes_explained(text: str, tree: ast.Module) -> set[str]:
    """Returns the letters that stand alone in the legend: a comment, or the module's docstring."""
    lines = [
        token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT
    ]
    legend = LEGEND_LINE.findall("\n".join([ast.get_docstring(tree) or "", *lines]))
    return set(re.findall(r"(?<![\w'])[A-Za-z](?![\w'])", "\n".join(legend)))


def test_every_tensor_file_has_the_legend_of_its_axes():
    wrong = {}
    for file in module_files():
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        if missing := axes_used(tree) - axes_explained(text, tree):
            wrong[module_name(file)] = sorted(missing)
    assert not wrong
