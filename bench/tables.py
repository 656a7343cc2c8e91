"""Figures and rows as text, for a terminal or as Markdown."""


def number(x: float | None, digits: int = 3) -> str:
    """Three figures that count, no exponent where a reader needs none."""
    if x is None:
        return "-"
    return f"{x:.{digits}g}" if abs(x) < 1000 else f"{x:.0f}"


def columns(rows: list[list[str]], head: list[str], markdown: bool) -> str:
    """Nothing without rows."""
    if not rows:
        return ""
    if markdown:
        lines = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in [head, *rows])
