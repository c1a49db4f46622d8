"""What the pages and the messages name is there: files, commands, options and keys."""

import ast
import re
from collections.abc import Iterator

import pytest
from support.documented import PAGES, ROOT, code_spans, links, table_rows

from sd3pipe.data.dataset_keys import DatasetKeys, Keys, SubsetKeys
from sd3pipe.errors import ExitCode
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.sd_scripts import OPTIONS
from sd3pipe.project.recipes import fitting_advice
from sd3pipe.rules.memory import size_bytes
from sd3pipe.stages import STAGES

FROZEN = [line.rsplit(maxsplit=1) for line in (ROOT / "tests/cli/options.txt").read_text(encoding="utf-8").splitlines()]
COMMANDS = {owner.split()[0] for owner, _ in FROZEN}
DVC = {"--pull", "--allow-missing"}
EVERYWHERE = {"--help", "--help-all", "--config", "--project", "--json", "--version"}
OURS = re.compile(r"(?:[\w-]+/)+[\w-]+\.py|(?:sd3pipe|tests|benchmarks)/[\w./-]*")
KEYS_BELOW_THE_TABLE = {
    "batch_size", "cache_info", "color_aug", "network_multiplier", "token_warmup_min", "token_warmup_step",
}  # fmt: skip

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
of_today = pytest.mark.parametrize(  # a decision names what was there before it
    "page", [page for page in PAGES if page.parent.name != "decisions"], ids=lambda page: str(page.relative_to(ROOT))
)


def unknown_words(span: str) -> set[str]:
    """Returns what no command has: after `sd3pipe COMMAND` of that command, alone of any or of sd-scripts."""
    program, command, *_ = [*span.split(), "", ""]
    said = {word.replace("_", "-") for word in re.findall(r"(?<!\S)--[a-z][\w-]*", span)}
    if program != "sd3pipe":
        theirs = {f"--{name.replace('_', '-')}" for name in OPTIONS}
        return said - {option for _, option in FROZEN} - theirs - EVERYWHERE - DVC
    if command.isupper() or command.startswith("-"):
        command = ""
    known = {option for owner, option in FROZEN if owner.split()[0] == command or not command}
    return said - known - EVERYWHERE | ({command} - COMMANDS - {""})


def messages() -> Iterator[str]:
    """Yields the texts of the package, with `X` for what is filled in."""
    for file in sorted((ROOT / "sd3pipe").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pages
def test_links_lead_somewhere(page):
    gone = [link for link in links(page) if "://" not in link and not (page.parent / link.partition("#")[0]).exists()]
    assert not gone


@of_today
def test_python_files_and_rooms_exist(page):
    named = [span for span in code_spans(page) if OURS.fullmatch(span)]
    gone = [name for name in named if not any((folder / name).exists() for folder in (ROOT, ROOT / "sd3pipe"))]
    assert not gone


@pages
def test_commands_options_and_keys_exist(page):
    keys = {*OPTIONS, *Keys.model_fields}.union(*(model.model_fields for model in load_stage_models().values()))
    keys |= {path.key.partition("/")[0] for stage in STAGES for path in stage.paths}
    for span in code_spans(page):
        if span.startswith(("sd3pipe ", "--")):
            assert not unknown_words(span), span
        if key := re.match(r"([a-z_0-9]+) = ", span):
            assert key[1] in keys, span


def test_each_picture_is_shown_small_and_drawn_by_the_script():
    pictures = set((ROOT / "docs" / "pictures").iterdir())
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page) if "pictures/" in link}
    assert pictures == shown
    script = (ROOT / "scripts" / "draw_documentation.py").read_text(encoding="utf-8")
    for picture in pictures:
        assert f'"{picture.stem}"' in script and picture.suffix == ".webp" and picture.stat().st_size <= 200_000


@pytest.mark.long
def test_commands_that_messages_propose_exist():
    wrong = {
        span: words
        for text in messages()
        for span in re.findall(r"`(sd3pipe [^`]+)`", text)
        if (words := unknown_words(span))
    }
    assert not wrong


def test_the_table_of_dataset_keys_is_complete():
    """With the places where each may stand: G and D for a dataset's, S for a subset's."""
    places = {
        name: where
        for names, where, *_ in table_rows(ROOT / "docs" / "datasets.md", "key")
        for name in re.findall(r"\w+", names)
    }
    assert set(places) == set(Keys.model_fields) - KEYS_BELOW_THE_TABLE
    assert {name for name, where in places.items() if "D" in where} == set(places) & set(DatasetKeys.model_fields)
    assert {name for name, where in places.items() if "S" in where} == set(places) & set(SubsetKeys.model_fields)


def test_the_table_of_exit_codes_is_complete():
    assert [int(code) for code, *_ in table_rows(ROOT / "docs" / "errors.md", "code")] == sorted(ExitCode)


@pytest.mark.parametrize("row", list(table_rows(ROOT / "README.md", "card")), ids=lambda row: row[0])
def test_the_table_of_cards_is_what_init_writes(row):
    medium = MMDiTArchitecture(depth=24, pos_embed_max=384, qk_norm=True, dual_attention_blocks=tuple(range(13)))
    large = MMDiTArchitecture(depth=38, pos_embed_max=192, qk_norm=True)
    card, *cells = row
    for model, cell in zip((medium, large), cells, strict=True):
        advice = fitting_advice(model.shapes(), vram_bytes=size_bytes(card.replace(" ", "")), resolution=1024)
        swap, optimizer = (
            advice["blocks_to_swap"],
            advice["optimizer_type"].value if "optimizer_type" in advice else "AdamW",
        )
        place, _, told = cell.rpartition(", ")
        assert (swap.value, told) == ("auto", optimizer)
        assert place in swap.source
