"""Tables in HTML, for notebooks: what `_repr_html_()` of walks, columns and reports returns."""

from collections.abc import Iterable, Sequence

__all__ = ["HTML_ROWS", "table_html"]

HTML_ROWS = 20                          # of long columns: the first ones


def table_html(title: str, names: Sequence[str], rows: Iterable[Sequence[object]], left_out: int = 0) -> str:
    """Return a table. All text is escaped; a line break in a cell stays one.

    names: of the columns; empty for a table of names and values. left_out: rows that are not shown.
    """
    # here: its table of entities takes a while to load
    from html import escape

    def cell(value: object) -> str:
        return f'<td style="text-align: left; font-family: monospace; white-space: pre">{escape(str(value))}</td>'

    head = f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in names)}</tr></thead>" if names else ""
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    more = f"<div>{left_out:,} more rows</div>" if left_out > 0 else ""
    return f'<table><caption style="text-align: left">{escape(title)}</caption>{head}<tbody>{body}</tbody></table>{more}'
