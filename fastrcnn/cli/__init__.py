"""The command `fastrcnn`: parses, calls, prints. One file a verb."""

import typer

from fastrcnn.cli.demo import demo
from fastrcnn.cli.detect import detect
from fastrcnn.cli.eval import evaluate
from fastrcnn.cli.info import info
from fastrcnn.cli.models import models
from fastrcnn.cli.train import train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for verb in (detect, demo, info, models, train):
    app.command()(verb)
app.command("eval")(evaluate)


def main() -> None:
    app()
