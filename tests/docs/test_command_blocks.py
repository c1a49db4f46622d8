"""The commands of README.md and docs/ run as they stand, page by page, on the demo's base under the files' names."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from support.documented import PAGES, ROOT, Block, blocks

from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.demo.base_files import MODEL, TOKENIZERS
from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.resolve import resolve

BIN = Path(sys.executable).parent
FROM_NOTHING = ("README.md", "docs/first-lora.md")  # which make the project that the other pages are read in
KOHYA = {
    "pretrained_model_name_or_path": "models/sd3.5_medium.safetensors",
    "clip_l": "models/clip_l.safetensors", "clip_g": "models/clip_g.safetensors",
    "t5xxl": "models/t5xxl_fp16.safetensors", "train_data_dir": "img", "resolution": "64,64", "output_dir": "loras",
    "output_name": "mycat", "network_module": "networks.lora_sd3", "network_dim": 4, "max_train_steps": 1000,
}  # fmt: skip
CHECKS = {"sh", "text", "toml", "python"}

# Small: two steps and one-step pictures of 64 px, whatever the documented commands write into the project's files.
# `on NAME` goes to a machine's folder: of the first that a page names it is the project, of others one with the MMDiT's
# file alone; `on first` goes back. `rsync` copies to such a folder. `wait` fails where a job has failed.
PRELUDE = r"""
set -eo pipefail
small() {
  [ ! -f stages/train.toml ] || sed -i -E 's/^max_train_steps = .*/max_train_steps = 2/' stages/train.toml
  [ ! -f sample_prompts.txt ] || sed -i -E 's/--w [0-9]+ --h [0-9]+( --s 1)?/--w 64 --h 64 --s 1/' sample_prompts.txt
}
trap small DEBUG
declare -A place_of
machine=first named=
on() {
  [ "$1" != "$machine" ] || return 0
  place_of[$machine]=$PWD
  [ -n "$named" ] || { named=$1; place_of[$1]=$PWD; }
  machine=$1
  export HOME=$MACHINES/$1
  [ -d "$HOME/models" ] || { mkdir -p "$HOME/models" && cp "$MODEL" "$HOME/models"; }
  cd "${place_of[$1]:-$HOME}"
}
rsync() {
  local target=${!#} from=()
  case "$*" in *--files-from=-*) from=(-T -) ;; *) from=("${@:2:$#-2}") ;; esac
  mkdir -p "$MACHINES/${target/://}"
  tar -cf - "${from[@]}" | tar -xf - -C "$MACHINES/${target/://}"
}
wait() { for job in $(jobs -p); do builtin wait "$job"; done; }
"""


@pytest.fixture(scope="session")
def shelf(tmp_path_factory) -> Path:
    """A folder with a base model's files, pictures and commands of sd-scripts, under the names of the pages."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "models").mkdir()
    tensors = load_file(MODEL)
    files = {"sd3.5_medium": {key: value for key, value in tensors.items() if not key.startswith("text_encoders.")}}
    for encoder, name in (("clip_l", "clip_l"), ("clip_g", "clip_g"), ("t5xxl", "t5xxl_fp16")):
        prefix = f"text_encoders.{encoder}.transformer."
        files[name] = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    for name, part in files.items():
        save_file(part, folder / "models" / f"{name}.safetensors")
    shutil.copyfile(folder / "models" / "sd3.5_medium.safetensors", folder / "models" / "sd3.5_large.safetensors")
    shutil.copytree(TOKENIZERS, folder / "tokenizers")
    for pictures in ("photos/mycat", "img/2_mycat"):
        (folder / pictures).mkdir(parents=True)
        for number in range(2):
            picture = folder / pictures / f"cat{number}.jpg"
            Image.new("RGB", (64, 64), (200, 90 * number, 30)).save(picture)
            picture.with_suffix(".txt").write_text("a cat\n")
    words = [f"--{name} {value}" for name, value in KOHYA.items()]
    (folder / "train.bat").write_text(" ^\n  ".join(["accelerate launch sd3_train_network.py", *words]) + "\n")
    (folder / "config.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in KOHYA.items()))
    (folder / "settings.json").write_text(json.dumps({**KOHYA, "sd3_checkbox": True, "LoRA_type": "Standard"}))
    return folder


@pytest.fixture(scope="session")
def project(shelf) -> Path:
    """The shelf's folder with a project in it as README's commands make it: encoded, trained and exported."""
    folder = shelf.with_name(f"{shelf.name}-project")
    shutil.copytree(shelf, folder)
    done = run_script(
        "sd3pipe init . --model models/sd3.5_medium.safetensors --images photos/mycat --tokenizers tokenizers \\\n"
        "  --trigger mycat\nsd3pipe run\n",
        folder,
    )
    assert done.returncode == 0, done.stdout
    return folder


def run_script(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script in a folder, with this environment's programs."""
    return subprocess.run(
        ["bash", "-c", PRELUDE + script],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "MACHINES": str(folder.with_name(f"{folder.name}-machines")),
            "SHARE": str(folder.with_name(f"{folder.name}-share")),
            "MODEL": str(folder / "models" / "sd3.5_medium.safetensors"),
            "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org",
            "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.org",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
        check=False,
    )  # fmt: skip


def as_script(block: Block) -> Iterator[str]:
    """Yields a block's lines; `NAME$ command` becomes the command on that machine."""
    yield f"on first\necho '## {block.place}'"
    for line in block.text.splitlines():
        yield re.sub(r"^(\w+)\$ ", r"on \1\n", line)
    yield "wait"


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("sh", "python") and not block.not_run]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_says_what_it_is(page):
    for block in blocks(page):
        assert block.language in CHECKS, f"{block.place}: nothing checks ```{block.language}: use one of {CHECKS}"
        typed = re.search(r"^(\w*\$ |sd3pipe |dvc |pip |make |torchrun )", block.text, re.MULTILINE)
        assert block.language != "text" or not typed, f"{block.place}: a command: indent it, so that it is run"


@pytest.mark.parametrize(
    "block",
    [block for page in PAGES for block in blocks(page) if block.language == "toml"],
    ids=lambda block: block.place,
)
def test_toml_is_what_its_reader_takes(block, tmp_path):
    """The first line says which file it is: dataset.toml, or one of stages/."""
    file = tmp_path / block.text.splitlines()[0].removeprefix("# ")
    file.parent.mkdir(exist_ok=True)
    file.write_text(block.text, encoding="utf-8")
    if file.parent.name == "stages":
        model = load_stage_models()[file.stem]
        required = {name: "somewhere" for name, field in model.model_fields.items() if field.is_required()}
        assert resolve(model, file.stem, required, config=file, stage_models=load_stage_models)
    else:
        assert load_dataset(file).subsets


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if runnable(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_commands_run_as_they_stand(page, request, tmp_path):
    name = str(page.relative_to(ROOT))
    start = request.getfixturevalue("shelf" if name in FROM_NOTHING else "project")
    folder = tmp_path / "here"
    shutil.copytree(start, folder)
    lines = []
    for block in runnable(page):
        if block.language == "python":
            lines += [f"python - <<'END'\n{block.text}END"]
        else:
            lines += as_script(block)
    done = run_script("\n".join(lines) + "\n", folder)
    assert done.returncode == 0, done.stdout
