"""The command line: parse options, call the planner, render, exit. No logic.

Imports of the planner stand inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

OK, NO, BAD_INPUT, CRASHED, INTERRUPTED = 0, 1, 2, 3, 130
DEBUG = "SHARDPLAN_DEBUG"  # set to 1 for tracebacks

try:
    import click
    from click_default_group import DefaultGroup
except ImportError as missing:  # an installation without its dependencies
    print(f"plan: {missing}", file=sys.stderr)
    sys.exit(CRASHED)

if TYPE_CHECKING:
    from planner.report.console import Screen
    from planner.request import Planned, Request

Command = TypeVar("Command", bound=Callable[..., Any])


class Amount(click.ParamType):
    """An amount with a unit, read by the function of `planner.units` of that name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        from planner import units

        try:
            return getattr(units, self.name)(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE, FRACTION, SECONDS = Amount("size_bytes"), Amount("fraction"), Amount("seconds")
COUNT = Amount("count")


class PlanGroup(DefaultGroup):
    """Help that begins with the default command: most people need no other."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read us has gone; Python would complain when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK
        return result

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("plan", "MODEL [OPTIONS]")
        formatter.write_usage("plan", "COMMAND [OPTIONS] …", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        default = self.commands["plan"]
        options = (p for p in default.params if isinstance(p, click.Option))
        params = [*options, *self.get_params(ctx)]
        records = [p.get_help_record(ctx) for p in params]
        with formatter.section("Options"):
            formatter.write_dl([r for r in records if r is not None])
        self.format_commands(ctx, formatter)


class DefaultContext(click.Context):
    """Of the default command: what is said about usage leaves its name out, as people do."""

    @property
    def command_path(self) -> str:
        return self.parent.command_path if self.parent else super().command_path


class DefaultCommand(click.Command):
    context_class = DefaultContext


def options(*decorators: Callable[[Any], Any]) -> Callable[[Command], Command]:
    def add(function: Command) -> Command:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return add


common = options(
    click.option("--quiet", "-q", is_flag=True, help="No progress, no remarks."),
    click.option("--color", type=click.Choice(["auto", "always", "never"]), default="auto",
                 help="Colour in text output; NO_COLOR is honoured."),
)  # fmt: skip
overriding = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Change a key of the model file, such as training.batch=512; repeatable.",
)  # fmt: skip
placing = options(
    click.option("--mesh", metavar="NAME|FILE", help="Machine: tpu-v3:32x32, dgx-a100-80gb:128."),
    click.option("--shape", metavar="x=32,y=64|auto", help="Logical mesh, in devices."),
)
limiting = options(
    click.option("--memory", type=SIZE, metavar="16GiB", help="Limit per device."),
    click.option("--headroom", type=FRACTION, metavar="5%",
                 help="How much more than predicted must fit."),
)  # fmt: skip
solving = options(
    overriding, limiting,
    click.option("--time-limit", type=SECONDS, metavar="60s", help="Longest time of planning."),
    click.option("--seed", type=int, default=0, help="Of the solver's random choices."),
)  # fmt: skip
given = options(
    click.option("--plan", "plan_file", type=click.Path(path_type=Path), metavar="PLAN",
                 help="A plan file to price: nothing is solved."),
    click.option("--annotations", type=click.Path(path_type=Path), metavar="FILE",
                 help="Annotations to complete and price."),
)  # fmt: skip


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    from planner.export.stamp import tool_version

    click.echo(f"plan, version {tool_version()}")
    context.exit()


@click.group(
    cls=PlanGroup, default="plan", context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True,
              callback=_show_version, help="Show the version and exit.")
def cli() -> None:
    """Finds how to shard a model over a machine, and predicts memory, step time, utilization.

    MODEL is a model file, `-`, or the name of a built-in model (`plan models`).
    """


@cli.command("plan", cls=DefaultCommand, hidden=True)
@click.argument("model")
@placing
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR",
              help="Write plan.json, annotations.py and annotations.json.")
@click.option("--force", is_flag=True, help="Replace files of other origin too.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text",
              help="What to print.")
@solving
@common
def plan_command(
    output: Path | None, force: bool, form: str, quiet: bool, color: str, **rest: Any
) -> int:
    """Finds the fastest plan of MODEL that fits."""
    from planner.export import bundle, files
    from planner.report.console import Screen
    from planner.request import plan

    screen, request = Screen(quiet, color), _request(**rest)
    with screen.progress() as progress:
        planned = plan(request, progress)
    if output is not None:
        written = files.write_files(output, bundle.files(planned), force)
        screen.remark(f"wrote {', '.join(map(str, written))}")
    _show(screen, request, planned, form, written=output is not None)
    return OK if planned.result.fits else NO


@cli.command()
@click.argument("model")
@given
@placing
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the step's timeline for Perfetto or chrome://tracing.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text",
              help="What to print.")
@overriding
@limiting
@common
def simulate(
    plan_file: Path | None, annotations: Path | None, trace: Path | None, form: str,
    quiet: bool, color: str, **rest: Any,
) -> int:
    """Prices a given plan or given annotations of MODEL; nothing is solved."""
    from planner.report.console import Screen

    screen, request = Screen(quiet, color), _request(**rest)
    price = _given(request, plan_file, annotations)
    if price is None:
        raise click.UsageError("give --plan or --annotations; `plan MODEL` finds a plan")
    planned = price()
    if trace is not None:
        from planner.export import files
        from planner.export.trace import dump

        files.write_file(trace, dump(planned.result))
        screen.remark(f"wrote {trace}")
    _show(screen, request, planned, form, written=True)
    return OK if planned.result.fits else NO


@cli.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@given
@placing
@click.option("--max-step-time", type=SECONDS, metavar="8s", help="Slowest step that passes.")
@click.option("--min-utilization", type=FRACTION, metavar="50%", help="Lowest MFU that passes.")
@click.option("--baseline", type=click.Path(path_type=Path), metavar="PLAN",
              help="A plan file whose peak memory and step time must not be exceeded.")
@click.option("--tolerance", type=FRACTION, default="2%", show_default=True,
              help="By how much the baseline may be exceeded.")
@click.option("--compiled", is_flag=True, help="The memory verdict is that of XLA's compiler.")
@click.option("--python", metavar="PATH", help="Interpreter of an environment that has it.")
@click.option("--format", "form", type=click.Choice(["text", "json", "github"]), default="text",
              help="What to print.")
@solving
@common
def check(
    models: tuple[str, ...], plan_file: Path | None, annotations: Path | None,
    max_step_time: float | None, min_utilization: float | None, baseline: Path | None,
    tolerance: float, compiled: bool, python: str | None, form: str, quiet: bool, color: str,
    **rest: Any,
) -> int:
    """Verdicts for CI: does every MODEL fit, is it fast enough, has it become worse?"""
    from planner.checks import Limits, check
    from planner.export import planfile
    from planner.report import findings
    from planner.report.console import Screen
    from planner.request import plan
    from planner.verify import compile_parts

    if python and not compiled:
        raise click.UsageError("--python is for --compiled")
    if len(models) > 1 and (plan_file or annotations or baseline):
        raise click.UsageError("--plan, --annotations and --baseline are for one MODEL")
    screen = Screen(quiet, color)
    before = planfile.load(baseline) if baseline else None
    limits = Limits(max_step_time, min_utilization, before, tolerance)
    compiler = partial(compile_parts, python=python) if compiled else None
    checks = []
    for model in models:
        request = _request(model=model, **rest)
        with screen.progress() as progress:
            price = _given(request, plan_file, annotations) or partial(plan, request, progress)
            checks.append(check(request.source.file, price, limits, compiler))
    findings.show(screen, checks, form)
    return OK if all(c.ok for c in checks) else NO


@cli.command()
@click.argument("plan_file", type=click.Path(path_type=Path), metavar="PLAN")
@click.option("--format", "form", required=True, metavar="FORMAT",
              help="jax, jax-program, json, flax, maxtext, shardy.")
@click.option("--minimal", is_flag=True,
              help="Only the fewest annotations that propagate to the plan (json, jax-program).")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE",
              help="Write there instead of to stdout.")
@click.option("--force", is_flag=True, help="Replace a file of other origin too.")
@common
def export(
    plan_file: Path, form: str, minimal: bool, output: Path | None, force: bool, quiet: bool,
    color: str,
) -> int:
    """Turns PLAN, a plan file, into what another program reads."""
    from planner.export import bundle, files, planfile
    from planner.report.console import Screen
    from planner.request import read_plan

    screen = Screen(quiet, color)
    write = bundle.exporter(form)
    planned = read_plan(planfile.load(plan_file))
    if minimal:
        with screen.progress() as progress:
            text, remark = bundle.minimal(planned, form, progress)
        screen.remark(remark)
    else:
        text = write(planned)
    if output is None:
        screen.data(text)
    else:
        files.write_file(output, text, force)
        screen.remark(f"wrote {output}")
    return OK


@cli.command()
@click.argument("model", metavar="MODEL|PLAN")
@placing
@overriding
@limiting
@click.option("--backend", type=click.Choice(["cpu", "tpu", "gpu"]),
              help="Which compiler; the machine's own by default.")
@click.option("--python", metavar="PATH", help="Interpreter of an environment that has it.")
@click.option("--minimal", is_flag=True,
              help="Whether the compiler recovers the plan from the fewest annotations.")
@click.option("--time-limit", type=SECONDS, metavar="15min", help="Longest time of the compiler.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text",
              help="What to print.")
@common
def verify(
    model: str, backend: str | None, python: str | None, minimal: bool,
    time_limit: float | None, form: str, quiet: bool, color: str, **rest: Any,
) -> int:
    """Compiles the plan of MODEL with XLA and compares it with what was predicted."""
    from planner.minimal import minimal as fewest
    from planner.report.console import Screen
    from planner.report.document import as_json
    from planner.request import plan_or_read
    from planner.verify import (
        DEFAULT_TIMEOUT_S,
        document,
        recovered,
        recovered_document,
        recovered_text,
        stages_document,
        stages_text,
        text,
        verify,
        verify_stages,
    )

    screen = Screen(quiet, color)
    with screen.progress() as progress:
        planned = plan_or_read(model, lambda: _request(model, **rest), progress)
        limit = time_limit or DEFAULT_TIMEOUT_S
        few = fewest(planned.result, planned.options, progress) if minimal else None
        if progress is not None:
            progress("compiling")
        if few is not None:
            both = recovered(planned.result, few, backend, python, limit)
            shown = recovered_document(both) if form == "json" else recovered_text(both)
            ok = both.ok
        elif planned.result.stages:
            each = verify_stages(planned.result, backend, python, timeout_s=limit)
            shown, ok = stages_document(each) if form == "json" else stages_text(each), each.ok
        else:
            found = verify(planned.result, backend, python, timeout_s=limit)
            shown, ok = document(found) if form == "json" else text(found), found.ok
    screen.data(shown if isinstance(shown, str) else as_json(shown))
    return OK if ok else NO


@cli.command()
@click.argument("plan_file", type=click.Path(path_type=Path), metavar="PLAN")
@click.argument("name", required=False, metavar="[TENSOR|OP]")
@common
def explain(plan_file: Path, name: str | None, quiet: bool, color: str) -> int:
    """Why PLAN lies as it does: what a tensor or op costs, and where its collectives come from."""
    from planner.export import planfile
    from planner.report import explaining
    from planner.report.console import Screen
    from planner.request import read_plan

    planned = read_plan(planfile.load(plan_file))
    Screen(quiet, color).show(explaining.explain(planned, name))
    return OK


@cli.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@common
def diff(before: Path, after: Path, quiet: bool, color: str) -> int:
    """What changed from one plan file to another: figures and shardings."""
    from planner.export import planfile
    from planner.report import difference
    from planner.report.console import Screen
    from planner.request import read_plan

    old, new = (read_plan(planfile.load(path)) for path in (before, after))
    Screen(quiet, color).show(difference.difference(old, new))
    return OK


@cli.command()
@click.argument("model")
@click.option("--mesh", "machines", multiple=True, required=True, metavar="NAME|FILE",
              help="A machine to consider; repeatable.")
@click.option("--shape", metavar="auto", help="Of the meshes; a few natural ones if left out.")
@click.option("--tokens", type=COUNT, metavar="300e9", help="Tokens of the whole run.")
@click.option("--deadline", type=SECONDS, metavar="30d", help="Longest time of the whole run.")
@click.option("--price", "prices", multiple=True, metavar="[CHIP|MESH=]USD",
              help="Of one device for an hour; repeatable.")
@click.option("--resume", type=click.Path(path_type=Path), metavar="FILE",
              help="Keep what is found there, and take what is there already.")
@click.option("--scheduler", metavar="ADDRESS", help="Plan on a Dask cluster (extra [dask]).")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text",
              help="What to print.")
@solving
@common
def sweep(
    machines: tuple[str, ...], tokens: float | None, deadline: float | None,
    prices: tuple[str, ...], resume: Path | None, scheduler: str | None, form: str,
    quiet: bool, color: str, **rest: Any,
) -> int:
    """Plans MODEL on several machines: what fits, how long a run takes, what it costs."""
    from planner.export import sweepfile
    from planner.report import sizing
    from planner.report.console import Screen
    from planner.report.document import as_json
    from planner.sweeping import Run, price_list, sweep

    if deadline is not None and tokens is None:
        raise click.UsageError("--deadline needs --tokens")
    screen, request = Screen(quiet, color), _request(mesh=None, **rest)
    run = Run(tokens, deadline, price_list(prices))
    known = sweepfile.load(resume) if resume else {}
    keep = sweepfile.keeper(resume, known) if resume else None
    with screen.progress() as progress:
        rows = sweep(request, machines, known, keep, progress, scheduler)
    name = request.source.load().name
    if form == "json":
        screen.data(as_json(sizing.document(name, rows, run)))
    else:
        screen.show(sizing.text(name, rows, run))
    return OK if run.smallest(rows) else NO


@cli.command()
@click.argument("problem", type=click.Path(path_type=Path))
@click.option("--time-limit", type=SECONDS, metavar="60s", help="Reading the file included.")
@click.option("--backend", default="auto", metavar="auto|cbc|highs|lns", help="Which solver.")
@click.option("--seed", type=int, default=0, help="Of the solver's random choices.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the solution there instead of to stdout.")
@common
def solve(
    problem: Path, time_limit: float | None, backend: str, seed: int, output: Path | None,
    quiet: bool, color: str,
) -> int:
    """Solves PROBLEM, a contest file (.json or .json.gz) of intra-operator parallelism."""
    from planner.report import solution
    from planner.report.console import Screen

    return solution.solve(Screen(quiet, color), problem, time_limit, backend, seed, output)


@cli.command()
@click.option("--suite", "suites", multiple=True, metavar="NAME|FILE",
              help="Only these runs: a suite that ships, or a file (YAML, or CSV of vTrain).")
@click.option("--max-error", type=FRACTION, metavar="8%",
              help="Exit 1 if a suite's mean error is larger.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text",
              help="What to print.")
@common
def validate(
    suites: tuple[str, ...], max_error: float | None, form: str, quiet: bool, color: str
) -> int:
    """Simulates published runs as they were made, and compares with what was measured."""
    from planner.report import validation
    from planner.report.console import Screen
    from planner.validation.scores import validate

    screen = Screen(quiet, color)
    with screen.progress() as progress:
        results = validate(suites, progress)
    validation.show(screen, results, form)
    return OK if validation.within(screen, results, max_error) else NO


@cli.command()
@click.argument("measured", type=click.Path(path_type=Path), metavar="CSV")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="CHIP",
              help="The machine file to write, for --mesh.")
@click.option("--mesh", required=True, metavar="NAME", help="The machine that was measured.")
@click.option("--force", is_flag=True, help="Replace a file of other origin too.")
@common
def calibrate(
    measured: Path, output: Path, mesh: str, force: bool, quiet: bool, color: str
) -> int:
    """Fits efficiencies to CSV, measured kernels of one's own, and writes a machine file."""
    from planner.calibration import fit_file
    from planner.export import files
    from planner.report.console import Screen

    screen = Screen(quiet, color)
    found = fit_file(measured, mesh)
    files.write_file(output, found.machine(), force)
    screen.data(found.report())
    screen.remark(f"wrote {output}")
    return OK


@cli.command()
@click.argument("kind", default="decoder")
@common
def init(kind: str, quiet: bool, color: str) -> int:
    """Prints a commented model file to start from."""
    from planner import starters
    from planner.report.console import Screen

    Screen(quiet, color).data(starters.text(kind))
    return OK


@cli.command()
@click.argument("name", required=False)
@common
def models(name: str | None, quiet: bool, color: str) -> int:
    """Lists the built-in models, or prints the file of one."""
    from planner.report import listings
    from planner.report.console import Screen

    Screen(quiet, color).data(listings.model(name) if name else listings.models())
    return OK


@cli.command("meshes")
@click.argument("name", required=False)
@common
def meshes_command(name: str | None, quiet: bool, color: str) -> int:
    """Lists the machines, or prints what is known of one."""
    from planner.report import listings
    from planner.report.console import Screen

    Screen(quiet, color).data(listings.mesh(name) if name else listings.machines())
    return OK


@cli.command()
@common
def schema(quiet: bool, color: str) -> int:
    """Prints the JSON Schema of model files, for editors."""
    from planner.report import listings
    from planner.report.console import Screen

    Screen(quiet, color).data(listings.schema())
    return OK


def _request(
    model: str, mesh: str | None, shape: str | None, overrides: Sequence[str],
    memory: int | None, headroom: float | None, time_limit: float | None = None, seed: int = 0,
) -> Request:
    from planner.planning import DEFAULT_HEADROOM, Options
    from planner.request import Request
    from planner.source import find

    room = DEFAULT_HEADROOM if headroom is None else headroom
    options = Options(memory, room, time_limit, seed)
    return Request(find(model, overrides, tuple(cli.commands)), mesh, shape, options)


def _given(
    request: Request, plan_file: Path | None, annotations: Path | None
) -> Callable[[], Planned] | None:
    """Prices what the user gave; None if nothing was given."""
    from planner.export import annotationfile, planfile
    from planner.request import price_annotated, price_plan

    if plan_file is not None and annotations is not None:
        raise click.UsageError("give --plan or --annotations, not both")
    if plan_file is not None:
        stored = planfile.load(plan_file)
        return lambda: price_plan(request, stored)
    if annotations is not None:
        pins = annotationfile.load(annotations)
        return lambda: price_annotated(request, pins)
    return None


def _show(screen: Screen, request: Request, planned: Planned, form: str, written: bool) -> None:
    from planner.report import document, text
    from planner.request import sensitivity, write_command

    if form == "json":
        screen.data(document.as_json(document.document(planned)))
        return
    command = None if written else write_command(request, planned.result.model.name)
    screen.show(text.report(planned, command, sensitivity(request, planned)))


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code. Exceptions become messages here."""
    try:
        return int(cli.main(arguments, prog_name="plan", standalone_mode=False) or OK)
    except click.ClickException as error:
        error.show()
        return BAD_INPUT
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    try:
        from planner.failures import describe
    except ImportError:
        code, message = CRASHED, f"error: {error}"
    else:
        code, message = describe(error)
    print(message, file=sys.stderr)
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    elif code == CRASHED:
        print(f"{DEBUG}=1 shows where it happened", file=sys.stderr)
    return code


def main() -> None:
    sys.exit(run())


if __name__ == "__main__":
    main()
