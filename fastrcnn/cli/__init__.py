"""The command `fastrcnn`: parses, calls, prints. One file a verb."""

import os
import shlex
import signal
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastrcnn import __version__
from fastrcnn.cli.bench import bench
from fastrcnn.cli.common import warn
from fastrcnn.cli.convert import convert
from fastrcnn.cli.data import data
from fastrcnn.cli.demo import demo
from fastrcnn.cli.detect import detect
from fastrcnn.cli.eval import evaluate
from fastrcnn.cli.export import export
from fastrcnn.cli.info import info
from fastrcnn.cli.models import models
from fastrcnn.cli.serve import serve
from fastrcnn.cli.train import train
from fastrcnn.cli.words import in_options


class Verbs(TyperGroup):
    """Says the words of another tool's command line as options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if said := in_options(args):
            ctx.fail(f"options are written --name value; perhaps: fastrcnn {shlex.join(said)}")
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: it looks the same in a terminal, a pipe and a page
    context_settings=dict(help_option_names=["-h", "--help"]),
    epilog="Exit status: 0 done, 1 something failed and was named, 2 a wrong command line, 130 interrupted.",
)
for verb in (demo, detect, train):
    app.command()(verb)
app.command("eval")(evaluate)
for verb in (serve, export, convert, models, bench, info):
    app.command()(verb)
app.add_typer(data, name="data")
for name, verb in (("predict", detect), ("val", evaluate), ("test", evaluate)):  # as other tools call them
    app.command(name, hidden=True)(verb)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastrcnn {__version__}")
        raise typer.Exit


@app.callback()
def fastrcnn(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and end")
    ] = False,
) -> None:
    """Find objects in pictures with Faster R-CNN: detect, train on your own, evaluate, export.

    \b
    Begin with
      fastrcnn demo
      fastrcnn detect street.jpg
      fastrcnn COMMAND --help
    """


def main() -> None:
    """Runs the command. What it prints that a terminal's encoding lacks is escaped; a warning is one sentence; a signal to
    end lets it finish what it writes; output that cannot be written is one sentence."""
    warnings.showwarning = lambda message, *about: warn(f"fastrcnn: {message}")
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # not where nohup says otherwise
            signal.signal(number, lambda n, _: sys.exit(128 + n))
    try:
        try:
            app()
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except OSError as error:
        # Nothing more can be printed there, nor may the interpreter try again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        said = f"fastrcnn: {error.filename or 'standard output'}: {error.strerror or error}"
        sys.exit(1 if isinstance(error, BrokenPipeError) else said)
