"""`igpt.data.crops` under its name of 0.1, for programs that import it from here."""

from igpt.data.crops import *  # noqa: F403
