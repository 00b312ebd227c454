"""The page to explore positions on: as a file, and live."""

from repo_jax.analysis.page.build import write_page
from repo_jax.analysis.page.server import Served, serve

__all__ = ["Served", "serve", "write_page"]
