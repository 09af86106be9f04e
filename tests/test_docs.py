"""What the docs say is true: links lead somewhere, configs parse, files and verbs exist, and marked commands run.

How a page marks its blocks, in an HTML comment on the line before the fence:

    <!-- config: pretrain -->    the YAML is a whole config of this stage; `recipe` for a whole recipe
    <!-- part -->                the YAML holds some keys of the page's stage, and is read over its last whole config
    <!-- tested -->              every line of the bash block is run, in order, and exits with 0; Python is run, too
"""

import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mmfoundry.launch.catalog import OUR_STAGES, REGISTRIES, Stages
from mmfoundry.launch.cli import run_command
from mmfoundry.launch.failures import exit_code_of
from mmfoundry.pipeline.config import parse
from mmfoundry.pipeline.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# `folder/file.ext` in code: where it begins with a folder of ours, it must be there.
NAMED_FILE = re.compile(
    r"(?<![\w./-])(?:pipeline|models|evals|stages|launch|tests|configs|benchmarks|docs|data)/[\w./-]*\.(?:py|yaml|md)\b"
)
VERB = re.compile(r"(?:^|`|\n *)mmfoundry ([a-z]+)(?: ([a-z_]+))?")
SUB_COMMANDS = {"data": {"keys", "inspect", "verify", "convert", "reshard", "entries"}, "config": {"schema"}}
VERBS = {"run", "index", "data", "config", "list", "doctor", "report", *OUR_STAGES}
PLACEHOLDERS = {"configs/ENTRY.yaml", "configs/filter/NAME.yaml"}


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, the mark before it, the language after its fence, and its text."""

    page: Path
    line: int
    mark: str
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    source = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(source):
        line = source.count("\n", 0, found.start()) + 1
        yield Block(page, line, found["mark"] or "", found["language"], found["text"])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
TESTED_PAGES = sorted({block.page for block in BLOCKS if block.mark == "tested"})


def prose_of(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        there = file.exists() and file.is_relative_to(ROOT)
        if not there or (anchor and file.suffix == ".md" and anchor not in anchors_of(file)):
            broken.append(target)
    assert not broken, f"{page.name}: {broken}"


def test_every_stage_has_a_page_that_is_linked() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in (ROOT / "README.md", ROOT / "docs" / "index.md")
        for target in LINK.findall(prose_of(page))
    }
    for name in OUR_STAGES:
        page = ROOT / "docs" / f"{name}.md"
        assert page.is_file(), f"docs/{name}.md: the stage {name} has no page"
        assert page in linked, f"docs/{name}.md is linked neither from README.md nor from docs/index.md"


def test_the_index_has_a_line_for_every_page() -> None:
    listed = {target for target in LINK.findall(prose_of(ROOT / "docs" / "index.md")) if "/" not in target}
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_verbs_that_are_named_exist(page: Path) -> None:
    source = page.read_text(encoding="utf-8")
    gone = [name for name in NAMED_FILE.findall(source) if not (ROOT / name).exists() and name not in PLACEHOLDERS]
    assert not gone, f"{page.name}: {gone}"
    for verb, word in VERB.findall(source):
        assert verb in VERBS, f"{page.name}: mmfoundry {verb}"
        assert not word or word in SUB_COMMANDS.get(verb, {word}), f"{page.name}: mmfoundry {verb} {word}"
        if verb == "list" and word and word != "stage":
            assert word.removesuffix("s") in REGISTRIES, f"{page.name}: mmfoundry list {word}"


def yaml_pages() -> list[Path]:
    return sorted({block.page for block in BLOCKS if block.language == "yaml"})


@pytest.mark.parametrize("page", yaml_pages(), ids=lambda page: page.name)
def test_configs_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stages = Stages()
    whole: tuple[str, dict] | None = None
    for block in blocks_of(page):
        if block.language != "yaml":
            assert not block.mark.startswith(("config:", "part")), f"{block.place}: the marked block is not yaml"
            continue
        kind = block.mark.removeprefix("config:").strip()
        tree = yaml.safe_load(block.text)
        if kind == "recipe":
            file = tmp_path / "recipe.yaml"
            file.write_text(block.text, encoding="utf-8")
            assert load_recipe(file, stages).entries, block.place
        elif block.mark == "part":
            assert whole is not None, f"{block.place}: no whole config of a stage before this part of one"
            parse(stages[whole[0]].config_type, whole[1] | tree, source=block.place)
        else:
            assert block.mark.startswith("config:"), f"{block.place}: say which stage's config this is, or `part`"
            parse(stages[kind].config_type, tree, source=block.place)
            whole = (kind, tree)


def commands_of(block: Block) -> list[list[str]]:
    """The lines of a bash block as argument lists; simple commands only, so that no shell is needed."""
    lines = block.text.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    for words in filter(None, commands):
        assert words[0] == "mmfoundry", f"{block.place}: {words[0]}: only mmfoundry's own commands are tested"
        assert not {"|", ">", "<", "&&", ";"} & {*words}, f"{block.place}: {' '.join(words)}: needs a shell"
    return [words for words in commands if words]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sample data: an index is written beside each shard that is read."""
    return shutil.copytree(
        ROOT / "data" / "samples", tmp_path_factory.mktemp("docs") / "samples", ignore=shutil.ignore_patterns("*.idx")
    )


@pytest.fixture
def clone(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder: as a clone looks to the commands, with nothing run yet."""
    folder = tmp_path / "clone"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "samples").symlink_to(samples)
    (folder / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("page", TESTED_PAGES, ids=lambda page: page.name)
def test_marked_blocks_run(
    page: Path, clone: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for block in blocks_of(page):
        if block.mark != "tested":
            continue
        if block.language == "python":
            (clone / "example.py").write_text(block.text, encoding="utf-8")
            runpy.run_path("example.py")
            continue
        assert block.language == "bash", f"{block.place}: bash and python can be tested"
        for words in commands_of(block):
            monkeypatch.setattr(sys, "argv", words)
            try:  # in this process: each new one would spend seconds on importing torch
                code = exit_code_of(run_command)
            except SystemExit as ended:
                code = int(ended.code or 0)
            out, err = capfd.readouterr()
            assert code == 0, f"{block.place}: {shlex.join(words)}: exit code {code}\n{err or out}"
