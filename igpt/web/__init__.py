"""A page in the browser: complete a picture while one watches, samples, the linear probe's curve."""

from igpt.web.server import Server
from igpt.web.studio import Studio, probe_of

__all__ = ["Server", "Studio", "probe_of"]
