"""The command `fastrcnn`: parses, calls, prints. One file a verb."""

import os
import signal
import sys

import typer

from fastrcnn.cli.data import data
from fastrcnn.cli.demo import demo
from fastrcnn.cli.detect import detect
from fastrcnn.cli.eval import evaluate
from fastrcnn.cli.export import export
from fastrcnn.cli.info import info
from fastrcnn.cli.models import models
from fastrcnn.cli.train import train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for verb in (detect, demo, export, info, models, train):
    app.command()(verb)
app.command("eval")(evaluate)
app.add_typer(data, name="data")


def main() -> None:
    """Runs the command. What it prints that a terminal's encoding lacks is escaped; a signal to end lets it finish what it
    writes; output that cannot be written is one sentence."""
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
