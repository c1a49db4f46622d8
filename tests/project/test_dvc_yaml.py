"""dvc.yaml passes every path through YAML, DVC and the shell unchanged, and quotes nothing that needs no quotes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sd3pipe.project.pipeline import dvc_yaml, scalar
from sd3pipe.project.writer import project_toml
from sd3pipe.shell import no_option, shell_line

BIN = Path(sys.executable).parent
NASTY = (
    "my cat", "a #b", "a: b", "${x}", "\\${x}", "$(touch pwned)", "`touch pwned`", "it's", '"q"', "'\"$`\\", "-x",
    "--out", "é ü", "e\u0301", "{a,b}", "[a]*?", "a\nb", "a\tb", "#x", "&a!", "%a%", "@a", "1", "true", "a;b|c>d",
    "a&&b", "end ", " start", "\\", "a:b", "=x", "\u200b", "\U0001f600", "a\x7fb", "\ufeffx",
)  # fmt: skip
TOOL = """#!{python}
import json, sys
from pathlib import Path
words = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(words) + "\\n")
out = Path(words[words.index("--out") + 1])
if words[0] == "train":
    (out / "plots").mkdir(parents=True)
    (out / "metrics.json").write_text("{{}}")
    (out / "plots" / "loss.csv").write_text("step,loss,loss_mean,learning_rate\\n1,2,3,4\\n")
    (out / "plots" / "validation.csv").write_text("step,loss\\n1,2\\n")
    out = out / "final"
out.parent.mkdir(parents=True, exist_ok=True)
out.write_text("made")
"""


class Project:
    """A project of a given name for every path, whose `sd3pipe` writes down its words and makes its out."""

    def __init__(self, top: Path, names: list[str]) -> None:
        self.folder, self.tools, self.log = top / "project", top / "tools", top / "log"
        for folder in (self.folder / "stages", self.tools):
            folder.mkdir(parents=True)
        tool = self.tools / "sd3pipe"
        tool.write_text(TOOL.format(python=sys.executable, log=str(self.log)))
        tool.chmod(0o755)
        inputs = ("model", "clip_l", "clip_g", "t5xxl", "vae", "tokenizers", "dataset", "sample_prompts", "loras_dir")
        self.paths = {key: f"{name}{key}" for key, name in zip(inputs, names, strict=False)}
        run, export, caches, pictures = names[len(inputs) : len(inputs) + 4]
        self.paths |= {"run": f"runs/{run}", "export": f"exports/{export}", "caches": f"{caches}caches"}
        self.pictures = f"{pictures}pictures"
        for name in (*(self.paths[key] for key in inputs), self.pictures):
            (self.folder / name).write_text("given")
        for stage in ("encode_text", "encode_latents", "train", "export"):
            (self.folder / "stages" / f"{stage}.toml").write_text("a = 1\n")
        (self.folder / "project.toml").write_text(project_toml(self.paths), encoding="utf-8")
        (self.folder / "dvc.yaml").write_text(dvc_yaml(self.paths, [self.pictures], folder=self.folder), "utf-8")

    def call(self, *command: str) -> None:
        environment = {
            **os.environ, "PATH": os.pathsep.join([str(self.tools), str(BIN), os.environ["PATH"]]),
            "DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull,
        }  # fmt: skip
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    def word(self, key: str, below: str = "") -> str:
        return no_option(self.paths[key]) + below


def check_repro(folder: Path, names: list[str]) -> None:
    project = Project(folder, names)
    project.call("git", "init", "-q")
    project.call("dvc", "init", "-q")
    project.call("dvc", "repro")
    word = project.word
    encoders = [item for key in ("model", "clip_l", "clip_g", "t5xxl", "tokenizers")
                for item in (f"--{key.replace('_', '-')}", word(key))]  # fmt: skip
    assert [json.loads(line) for line in project.log.read_text().splitlines()] == [
        ["encode-text", *encoders, "--dataset", word("dataset"), "--out", word("caches", "/text")],
        ["encode-text", *encoders, "--sample-prompts", word("sample_prompts"), "--out", word("caches", "/prompts")],
        ["encode-latents", "--model", word("model"), "--vae", word("vae"), "--dataset", word("dataset"),
         "--out", word("caches", "/latents")],
        ["train", "--model", word("model"), "--vae", word("vae"), "--text", word("caches", "/text"),
         "--latents", word("caches", "/latents"), "--prompts", word("caches", "/prompts"), "--out", word("run"),
         "--loras-dir", word("loras_dir")],
        ["export", "--adapter", word("run", "/final"), "--model", word("model"), "--out", word("export")],
    ]  # fmt: skip
    lock = yaml.safe_load((project.folder / "dvc.lock").read_text(encoding="utf-8"))
    paths, caches = project.paths, project.paths["caches"]
    given = {paths[key] for key in ("model", "clip_l", "clip_g", "t5xxl", "vae", "dataset", "sample_prompts")}
    watched = {dep["path"] for stage in lock["stages"].values() for dep in stage["deps"]}
    assert watched == {*given, project.pictures, f"{caches}/text", f"{caches}/latents", f"{paths['run']}/final"}
    assert not (project.folder / "pwned").exists()
    project.call("dvc", "metrics", "show")
    project.call("dvc", "plots", "show")


@pytest.mark.long
@pytest.mark.parametrize("start", [0, *(pytest.param(start, marks=pytest.mark.slow) for start in (13, 26))])
def test_nasty_names_pass_unchanged(tmp_path, start):
    names = [NASTY[(start + number) % len(NASTY)] for number in range(13)]
    check_repro(tmp_path, names)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(15))
def test_random_names_pass_unchanged(tmp_path, seed):
    draw = random.Random(seed)
    letters = [chr(code) for code in range(1, 0x180) if chr(code) != "/"] + list("$\\'\"`{} #:") * 20 + ["\U0001f600"]
    names = ["".join(draw.choices(letters, k=draw.randint(1, 6))) for _ in range(13)]
    check_repro(tmp_path, [name.replace(":", ": ").strip(".") for name in names])  # 's3:' would be a remote


def test_what_needs_no_quotes_gets_none(tmp_path):
    paths = {
        "model": "/models/größe/sd3.5_large@fp8+a,b=c%.safetensors", "dataset": "dataset.toml", "caches": "caches",
        "run": "runs/x", "export": "exports/x.safetensors",
    }  # fmt: skip
    text = dvc_yaml(paths, ["/home/jörg/my pictures", "photos#1"], folder=tmp_path)
    assert not {'"', "'", "\\"} & set(text)
    assert (
        "sd3pipe encode-latents --model ${paths.model} --dataset ${paths.dataset} --out ${paths.caches}/latents" in text
    )


@pytest.mark.parametrize(
    "text", [*NASTY, "", "-", "- a", "a:", "1e3", "0x1F", "2026-01-01", "12:30", "~", "Null", "[a", "%a"]
)
def test_a_scalar_is_read_back(text):
    assert yaml.safe_load(f"- {scalar(text)}") == [text]


@pytest.mark.parametrize("words", [NASTY, ("",), ("a!b", "~", "~/a")])
def test_a_shell_reads_a_line_back(words):
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    line = shell_line([sys.executable, "-c", code, *words])
    done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == list(words)


def test_a_common_name_is_quoted_as_every_shell_reads_it():
    assert shell_line(["cd", "my cat"]) == 'cd "my cat"'
