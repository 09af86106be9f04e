"""The `mmfoundry` command. Each verb's help teaches what it does, with an example; those that run load torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import Abort, Exit, TyperException

import mmfoundry
from mmfoundry.launch.catalog import OUR_STAGES
from mmfoundry.launch.data_commands import data_app, index_shards
from mmfoundry.launch.failures import USER_ERROR, exit_code_of, leave, tell

app = typer.Typer(
    name="mmfoundry",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    help="""From raw image-text shards to a released vision-language model.

A **recipe** is a YAML file of stages: filter, pretrain, instruct, adapt, eval, release. `mmfoundry run` runs it: it
skips what is done, goes on with what was cut off, and ends with a report. Each stage is a verb of its own, too.

    mmfoundry run configs/demo.yaml
    mmfoundry run configs/demo.yaml pretrain.trainer.max_steps=50 --output runs/try
    mmfoundry pretrain configs/demo.yaml trainer.optimizer.lr=1e-3 output=runs/try/pretrain
    mmfoundry list objective

Errors that you can mend are one line that begins with `error:`, with exit code 2.""",
)
config_app = typer.Typer(no_args_is_help=True, help="Know what a config may say.")

StageSource = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A config of this stage, or a recipe that has an entry of it.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys to set over the file's, dotted; values are YAML."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and why; do nothing.")]

# Keys that make each verb's example a short run.
EXAMPLES = {
    "filter": "",
    "scenes": "sets.clip.count=100 ",
    "pretrain": "trainer.max_steps=50 ",
    "instruct": "",
    "adapt": "",
    "eval": "",
    "release": "",
}


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mmfoundry {mmfoundry.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel="Run")
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[STAGE.KEY=VALUE]...", help="Keys to set over the recipe's; also seed=1."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Run folder; runs/NAME of the recipe when left out.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")] = None,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Ranks of each training stage.")] = 1,
    dry_run: DryRun = False,
) -> None:
    """Run a recipe from its first stage to its report; do only what is not done yet.

    The whole recipe is checked before the first stage starts. A stage whose artifact matches its config and inputs is
    skipped; one that was cut off goes on from its last checkpoint.

    Example: `mmfoundry run configs/demo.yaml pretrain.trainer.max_steps=50 --until pretrain --output runs/try`
    """
    from rich.console import Console

    from mmfoundry.launch.catalog import RANK_MODULES, Stages
    from mmfoundry.pipeline.recipe import load_recipe, run_recipe

    console = Console(highlight=False, soft_wrap=True)
    recipe = load_recipe(config, Stages(), overrides or [], output)
    run_recipe(
        recipe,
        until=until,
        processes=processes,
        rank_modules=RANK_MODULES,
        dry_run=dry_run,
        report=_build_report,
        say=lambda line: console.print(line, markup=False),
    )


def _build_report(run_folder: Path) -> None:
    from mmfoundry.launch.report import build_report

    build_report(run_folder)


def _verb(stage: str) -> Callable[..., None]:
    """The command of one stage."""

    def plain(
        config: StageSource,
        overrides: Overrides = None,
        dry_run: DryRun = False,
    ) -> None:
        _run_verb(stage, config, overrides or [], dry_run)

    def pushing(
        config: StageSource,
        overrides: Overrides = None,
        push: Annotated[
            str | None,
            typer.Option(metavar="ORG", help="Upload the folders to this organisation or user of the hub."),
        ] = None,
        dry_run: DryRun = False,
    ) -> None:
        target = [] if push is None else [f"push={json.dumps(push)}"]
        _run_verb(stage, config, [*(overrides or []), *target], dry_run)

    command: Callable[..., None] = pushing if stage == "release" else plain
    command.__doc__ = f"""{OUR_STAGES[stage]}

    CONFIG is this stage's own config, or a recipe: then the recipe's entry is used and `${{entry}}` means the artifact
    in its run folder. `output=FOLDER` says where the artifact goes; `entry=NAME` chooses among several entries.
    `mmfoundry config schema {stage}` lists the keys.

    Example: `mmfoundry {stage} configs/demo.yaml {EXAMPLES[stage]}output=runs/try/{stage}`
    """
    return command


def _run_verb(stage: str, config: Path, overrides: list[str], dry_run: bool) -> None:
    from mmfoundry.launch import verbs
    from mmfoundry.launch.catalog import Stages

    job = verbs.prepare(Stages(), stage, config, overrides)
    if dry_run:
        print(verbs.describe(job))
        return
    from mmfoundry.pipeline.distributed import init_runtime

    print(verbs.outcome(verbs.execute(job, init_runtime())))


for _stage in OUR_STAGES:
    app.command(_stage, rich_help_panel="Stages")(_verb(_stage))

app.command("index", rich_help_panel="Data")(index_shards)
app.add_typer(data_app, name="data", rich_help_panel="Data")
app.add_typer(config_app, name="config", rich_help_panel="Look")


@app.command("list", rich_help_panel="Look")
def list_(
    kind: Annotated[str | None, typer.Argument(help="What to list; the kinds themselves when left out.")] = None,
) -> None:
    """List the variants of a kind, each with one line and the module it is in.

    Example: `mmfoundry list objective`
    """
    from mmfoundry.launch.catalog import REGISTRIES, Stages, open_registry

    if kind is None:
        print("\n".join(["stage", *REGISTRIES]))
        return
    rows = Stages().describe() if kind in ("stage", "stages") else open_registry(kind).describe()
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    for name, summary, source in rows:
        print(f"{name:<{widths[0]}}  {summary:<{widths[1]}}  {source}")


@config_app.command("schema")
def schema(stage: Annotated[str, typer.Argument(help="A stage's name.")]) -> None:
    """Print the JSON Schema of a stage's config: every key, its type, its default and what it means.

    Example: `mmfoundry config schema pretrain > pretrain.schema.json`, then in an editor that speaks YAML:
    `# yaml-language-server: $schema=pretrain.schema.json`
    """
    from mmfoundry.launch.catalog import Stages

    print(json.dumps(Stages()[stage].config_type.model_json_schema(), indent=2))


@app.command(rich_help_panel="Look")
def doctor() -> None:
    """Say what this machine has and what is missing, with the command that mends it.

    Example: `mmfoundry doctor`
    """
    from mmfoundry.pipeline.doctor import examine

    findings = examine()
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        print(f"{'ok' if finding.good else '!!'}  {finding.subject:<{width}}  {finding.text}")
        if finding.remedy:
            print(f"    {'':<{width}}  -> {finding.remedy}")
    if any(finding.needed and not finding.good for finding in findings):
        raise typer.Exit(1)


@app.command(rich_help_panel="Look")
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A recipe's run folder, such as runs/demo.")],
) -> None:
    """Build report.html of a run anew: one page that needs nothing beside it.

    Example: `mmfoundry report runs/demo`
    """
    from mmfoundry.pipeline.errors import MissingInput

    if not run_folder.is_dir():
        raise MissingInput(f"{run_folder}: no such run folder")
    _build_report(run_folder)
    print(run_folder / "report.html")


def main() -> None:
    """Entry point of the `mmfoundry` command."""
    leave(exit_code_of(run_command))


def run_command() -> None:
    """Do what `sys.argv` says; errors are raised, and an exit code other than 0 as `SystemExit`."""
    # Not `app()`: it answers interrupts and closed pipes itself, each in its own way.
    command = typer.main.get_command(app)
    code = 0
    try:
        with command.make_context("mmfoundry", sys.argv[1:]) as context:
            command.invoke(context)
    except Exit as exit_:
        code = exit_.exit_code
    except Abort as abort:
        raise KeyboardInterrupt from abort
    except TyperException as error:  # a wrong option or argument
        tell(" ".join(f"{error.format_message().rstrip('.')}; see mmfoundry --help".split()))
        code = USER_ERROR
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
