"""Dataset report: tables for the terminal, and a section of the HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ernie_align.dataset_report import DatasetReport, Histogram, SourceReport
from ernie_align.report import charts
from ernie_align.report.console import visible

_SHOWN_ROWS = 3  # per reason; JSON and the page name more
_SHOWN_SCRIPTS = 4
# titles of the facts in each table
_ROWS = ("format", "rows", "kept", "dropped", "faulty", "repeated prompts", "repeated rows", "also in train")
_POOL = "vision pool tokens"
_LENGTHS = ("tokens", "trained tokens", _POOL, "median", "95 %", "max")
_IMAGES = ("images", "per row", "width", "height", "long : short", "tokens each", "bad images", "unplaced images")
_ANSWERS = ("answers with reasoning", "empty answers", "chosen = rejected", "cut", "scripts, % of letters")
# the page shows the other facts as charts
_PAGE = (*_ROWS, *_LENGTHS[:3], *_ANSWERS[:3], "images", "bad images", "unplaced images", _ANSWERS[-1])


def tables(report: DatasetReport) -> list[RenderableType]:
    """Return the tables of rows, lengths, images and answers, then every fault and a verdict."""
    measured = [source for source in report.sources if source.lengths.count]
    title = "tokens per row, and % of rows over each max_length"
    parts: list[RenderableType] = [
        _table("rows", report.sources, _ROWS),
        _table(title, measured, [name for name in _LENGTHS if report.has_vision or name != _POOL], cost_limits(report)),
    ]
    if any(source.images_in_row.most for source in report.sources):
        parts.append(_table("images: median (minimum to maximum)", report.sources, _IMAGES))
    parts.append(_table("answers", report.sources, _ANSWERS))
    faults = [Text(line) for line in _fault_lines(report)]
    return [*parts, *([Group(*faults)] if faults else []), Text(verdict(report))]


def verdict(report: DatasetReport) -> str:
    """Return one line: whether training would stop, how many rows were read, and how long it took."""
    rows, faulty = sum(one.count.rows for one in report.sources), sum(one.faulty for one in report.sources)
    read = f"{rows:,} rows of {len(report.sources)} sources in {report.seconds:.1f} s by {report.workers} workers"
    if report.sound:
        return f"NO FAULTS: {read}"
    unreadable = sum(bool(one.unreadable) for one in report.sources)
    empty = sum(not one.unreadable and not one.faulty and not one.count.kept for one in report.sources)
    counts = ((faulty, "faulty rows"), (unreadable, "unreadable sources"), (empty, "sources with no row left"))
    return f"FAULTS: {', '.join(f'{number:,} {what}' for number, what in counts if number)}; {read}"


def _facts(source: SourceReport) -> dict[str, str]:
    """Return every number of a source as text, by its title in the tables and on the page."""
    count, lengths = source.count, source.lengths
    facts = {
        "format": count.format or "unreadable",
        "rows": count.rows,
        "kept": count.kept,
        "dropped": sum(count.dropped.values()),
        "faulty": source.faulty,
        "repeated prompts": source.duplicate_prompts,
        "repeated rows": source.duplicate_rows,
        "also in train": "-" if source.also_in_train is None else source.also_in_train,
        "tokens": count.tokens,
        "trained tokens": _percent(count.trained, count.tokens),
        _POOL: _percent(count.vision_tokens, count.tokens),
        "median": lengths.quantile(0.5),
        "95 %": lengths.quantile(0.95),
        "max": lengths.most,
        "answers with reasoning": _percent(source.thinking, source.answered),
        "empty answers": source.empty_answers,
        "chosen = rejected": source.equal_sides,
        "cut": count.cut,
        "images": count.images,
        "per row": _format_range(source.images_in_row),
        "width": _format_range(source.widths),
        "height": _format_range(source.heights),
        "long : short": _format_range(source.aspects, scale=100),
        "tokens each": _format_range(source.image_tokens),
        "bad images": source.bad_images,
        "unplaced images": source.unplaced_images,
        "scripts, % of letters": scripts(source),
    }
    return {title: f"{value:,}" if isinstance(value, int) else value for title, value in facts.items()}


def _table(title: str, sources: Iterable[SourceReport], titles: Sequence[str], limits: Sequence[int] = ()) -> Table:
    """Return a table of the facts with these titles, and of the percentage of rows over each limit."""
    table = Table("source", title=title, title_justify="left")
    for name in (*titles, *(f"{limit:,}" for limit in limits)):
        table.add_column(name, justify="right")
    for source in sources:
        facts, rows = _facts(source), source.lengths.count
        over = [_percent(source.over.get(limit, [0, 0])[0], rows) for limit in limits]
        name = escape(visible(f"{source.part}: {source.count.name}"))
        table.add_row(name, *(facts[title] for title in titles), *over)
    return table


def cost_limits(report: DatasetReport) -> list[int]:
    """Return the limits worth a column: the recipe's, and from the shortest row to the first above the longest."""
    measured = [source for source in report.sources if source.lengths.count]
    most = max((source.lengths.most for source in measured), default=0)
    least = min((source.lengths.least for source in measured), default=0)
    useful = sorted({limit for source in measured for limit in source.over if limit >= least})
    last = next((place for place, limit in enumerate(useful) if limit >= most), len(useful))
    return sorted({*useful[: last + 1], report.max_length})


def scripts(source: SourceReport) -> str:
    """Return percentages of letters, such as "Latin 93, Han 7"."""
    total = sum(source.letters.values())
    most = sorted(source.letters.items(), key=lambda pair: -pair[1])
    shown = [f"{name} {100 * number / total:.3g}" for name, number in most[:_SHOWN_SCRIPTS]]
    return ", ".join(shown) + (", ..." if len(most) > _SHOWN_SCRIPTS else "") or "-"


def _fault_lines(report: DatasetReport) -> Iterator[str]:
    for source in report.sources:
        yield from map(visible, map(str, source.unreadable))
        for kind, faults in sorted(source.faults.items(), key=lambda pair: -pair[1].rows):
            yield visible(f"{source.count.name}: {faults.rows:,} faulty rows: {kind}")
            for row, what, fix in faults.named[:_SHOWN_ROWS]:
                yield visible(f"    {row}: {what}" + (f" ({fix})" if fix else ""))
            if faults.rows > _SHOWN_ROWS:
                yield f"    and {faults.rows - _SHOWN_ROWS:,} more"
        for reason, number in source.count.dropped.items():
            named = source.count.dropped_rows[reason][:_SHOWN_ROWS]
            more = ", ..." if number > len(named) else ""
            yield visible(f"{source.count.name}: {number:,} rows dropped: {reason} ({', '.join(named)}{more})")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %" if whole else "-"


def _format_range(histogram: Histogram, *, scale: int = 1) -> str:
    if not histogram.count:
        return "-"
    middle, least, most = (
        f"{value / scale:.4g}" for value in (histogram.quantile(0.5), histogram.least, histogram.most)
    )
    return middle if least == most else f"{middle} ({least} to {most})"


# -- a page ---------------------------------------------------------------------------------------------------------


def section(report: DatasetReport) -> dict[str, Any]:
    """Return the variables of a section of page.html.jinja."""
    return {
        "kind": "data",
        "name": "",
        "verdict": verdict(report),
        "sound": report.sound,
        "sources": [_source_section(source, report, f"d{place}") for place, source in enumerate(report.sources)],
        "charts": [],
    }


def _source_section(source: SourceReport, report: DatasetReport, label: str) -> dict[str, Any]:
    count, facts = source.count, _facts(source)
    left_out = {*(() if report.has_vision else (_POOL,)), *(("also in train",) if source.also_in_train is None else ())}
    costs = [
        (f"{limit:,}", f"{rows:,}", _percent(rows, source.lengths.count), f"{tokens:,}", limit == source.max_length)
        for limit, (rows, tokens) in sorted(source.over.items())
    ]
    return {
        "name": f"{source.part}: {count.name}",
        "unreadable": list(map(str, source.unreadable)),
        "facts": {title: facts[title] for title in _PAGE if title not in left_out},
        "costs": costs,
        "faults": [(kind, f"{faults.rows:,}", faults.named) for kind, faults in source.faults.items()],
        "dropped": [(reason, f"{rows:,}", count.dropped_rows[reason]) for reason, rows in count.dropped.items()],
        "charts": [{"title": title, "svg": svg, "note": note} for title, svg, note in _charts(source, label)],
    }


def _charts(source: SourceReport, label: str) -> Iterator[tuple[str, str, str]]:
    drawn = (
        ("Tokens per row, image tokens included", source.lengths, 1, source.max_length),
        ("Images per row", source.images_in_row if source.images_in_row.most else None, 1, None),
        ("Width of images, pixels", source.widths, 1, None),
        ("Height of images, pixels", source.heights, 1, None),
        ("Long side / short side", source.aspects, 100, None),
        ("Tokens per image", source.image_tokens, 1, None),
    )
    for place, (title, histogram, scale, line) in enumerate(drawn):
        if histogram is not None and histogram.count:
            bins = {edge / scale: number for edge, number in histogram.bins.items()}
            note = f"line: max_length {line:,}" if line else ""
            yield title, charts.histogram(bins, label=f"{label}-{place}", line=line), note
    if source.written:
        yield "Rows by the script of most of their letters", charts.bars(source.written, label=f"{label}-scripts"), ""
