"""Figures and rows as text, in Markdown that a terminal can show."""


def number(x: float | None, digits: int = 3) -> str:
    """Three figures that count, no exponent where a reader needs none."""
    if x is None:
        return "-"
    return f"{x:.{digits}g}" if abs(x) < 1000 else f"{x:.0f}"


def columns(rows: list[list[str]], head: list[str], padded: bool = True) -> str:
    """Nothing without rows."""
    lines = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in rows)]
    widths = [max(map(len, column)) if padded else 0 for column in zip(*lines)]
    shown = ("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)
    return "\n".join(shown) if rows else ""
