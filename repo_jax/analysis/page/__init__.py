"""The page to explore positions on: as a file, and live."""

from repo_jax.analysis.page.build import write_page
from repo_jax.analysis.page.server import Served, listen, serve

__all__ = ["Served", "listen", "serve", "write_page"]
