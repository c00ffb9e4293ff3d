"""Terminal output of a run: log lines, tables, one example in color, and progress."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ernie_align.data.load import SourceStats
from ernie_align.data.preview import TokenSpan
from ernie_align.models.trainable_parts import ParameterSummary

if TYPE_CHECKING:
    from rich.progress import TaskID
    from transformers import TrainerCallback

    from ernie_align.models.text_parity import TextProbe


_FILE_WIDTH = 140  # columns
_SHOWN_DROPS = 3  # rows per reason; data.json lists more


class Terminal:
    """The reporter of a run on a terminal. speaks: False on ranks other than 0."""

    def __init__(self, console: Console | None = None, *, speaks: bool = True):
        # a file or a pipe has no width, and rich's default of 80 columns would truncate the tables
        width = None if sys.stdout.isatty() else _FILE_WIDTH
        self.console = console or Console(highlight=False, soft_wrap=True, quiet=not speaks, width=width)

    def log(self, line: str) -> None:
        """Print one line."""
        self.console.print(markup(line))

    def parameter_summary(self, summary: ParameterSummary) -> None:
        """Print parameters, trainable parameters and tensors of each part."""
        table = make_table("trained parameters", "part", numbers=("parameters", "trainable", "tensors"))
        for row in summary.rows:
            style = "bold green" if row.trained_tensors else "dim"
            tensors = f"{row.trained_tensors} of {row.tensors}"
            trainable = f"{row.trainable:,}" if row.trainable else "-"
            table.add_row(row.part, f"{row.parameters:,}", trainable, tensors, style=style)
        share = 100 * summary.trainable / summary.parameters
        table.add_section()
        table.add_row("all", f"{summary.parameters:,}", f"{summary.trainable:,}", f"{share:.2f} %")
        self.console.print(table)

    def sources(self, counts: list[SourceStats]) -> None:
        """Print rows, examples and tokens of each source, and the rows that were dropped or shortened."""
        numbers = ("rows", "kept", "examples", "tokens", "trained", "vision", "images")
        table = make_table("rows", "source", "format", numbers=numbers)
        for count in counts:
            if not count.rows:  # rows of a stream are counted while they are read
                table.add_row(markup(count.name), count.format, "stream")
                continue
            values = (count.rows, count.kept, count.examples, count.tokens, count.trained)
            values += (count.vision_tokens, count.images)
            table.add_row(markup(count.name), count.format, *(f"{value:,}" for value in values))
        self.console.print(table)
        for count in counts:
            for reason, number in count.dropped.items():
                named = count.dropped_rows[reason][:_SHOWN_DROPS]
                more = ", ..." if number > len(named) else ""
                self.log(f"{count.name}: {number} rows dropped: {reason} ({', '.join(named)}{more})")
            if count.cut:
                self.log(f"{count.name}: {count.cut} examples truncated to data.max_length, at the end of a turn")
            if count.reasoning_left_out:
                what = f"the reasoning of {count.reasoning_left_out} answers is not trained"
                self.log(f"{count.name}: {what}, because thinking is off")
            if count.examples > count.kept:
                what = f"{count.kept} rows give {count.examples} examples"
                why = "the chat template renders earlier turns differently, so each assistant turn is its own example"
                self.log(f"{count.name}: {what}: {why}")

    def preview(self, parts: dict[str, list[TokenSpan]]) -> None:
        """Print the first example: trained tokens in green, tokens of the vision pool in magenta."""
        colors = (("trained", "bold green"), ", ", ("vision pool", "magenta"), ", ", ("context", "dim"))
        self.console.print(Text.assemble("one example: ", *colors))
        for name, spans in parts.items():
            text = Text(f"{name}: " if len(parts) > 1 else "")
            for span in spans:
                style = "bold green" if span.trained else "magenta" if span.vision else "dim"
                shown = visible(span.text).replace("\n", "⏎\n")
                text.append(shown + (f"x{span.repeat}" if span.repeat > 1 else ""), style=style)
            self.console.print(text)

    def progress(self) -> list[TrainerCallback]:
        """Return callbacks that show steps, loss and accuracy."""
        from ernie_align.report.progress import ProgressBar

        return [] if self.console.quiet else [ProgressBar(self.console)]

    @contextmanager
    def counting(self) -> Iterator[Callable[[str, int, int], None]]:
        """Show one progress bar per checkpoint or source; yield the function that sets (name, done, total)."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            tasks: dict[str, TaskID] = {}

            def tick(name: str, done: int, total: int) -> None:
                if name not in tasks:
                    tasks[name] = progress.add_task(markup(name), total=total, completed=done)
                progress.update(tasks[name], completed=done)

            yield tick

    def text_parity(self, probe: TextProbe, unchanged: bool) -> None:
        """Print whether text-only logits are bit-identical before and after the run."""
        what = f"{probe.rows} text sequences, {probe.tokens} tokens, {probe.vocabulary} logits each"
        verdict = "bit-identical before and after" if unchanged else "CHANGED, although no trained part processes text"
        self.console.print(f"text-only logits ({what}): {verdict}", style="bold green" if unchanged else "bold red")


def make_table(title: str, *columns: str, numbers: Iterable[str] = ()) -> Table:
    """Return a table with a title above its left edge. numbers: further columns, aligned right."""
    table = Table(*columns, title=title, title_justify="left")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def checks_table(rows: Iterable[tuple[str, str, str]]) -> Table:
    """Return a table of (check, `pass`, `fail` or another verdict, result in words)."""
    styles = {"pass": "green", "fail": "bold red"}
    table = Table("check", "verdict", "result", show_lines=True)
    for name, verdict, result in rows:
        table.add_row(name, Text(verdict, styles.get(verdict, "dim")), markup(result))
    return table


def quiet_libraries() -> None:
    """Turn off the progress bars and advice of transformers, datasets and accelerate; errors still appear."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*pin_memory.*")


# Rows may contain control characters besides tab and line feed; on a terminal or a page they would do harm.
_VISIBLE = (
    {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
    | {0x7F: 0x2421, 0xFFFE: 0xFFFD, 0xFFFF: 0xFFFD}
    | dict.fromkeys(
        (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)), 0xFFFD
    )
)


def visible(text: object) -> str:
    """Show control characters as symbols; replace lone surrogates and bidirectional controls by U+FFFD."""
    return str(text).translate(_VISIBLE)


def markup(text: object) -> str:
    """Return visible text as rich markup that prints its brackets unchanged."""
    return escape(visible(text))
