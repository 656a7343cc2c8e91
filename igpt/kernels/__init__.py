"""The kernels. In a checkout they stand in the top-level folder kernels/; an installed package holds them here."""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2] / "kernels"
if (_checkout / "reference.py").is_file():
    __path__ = [str(_checkout)]
