"""One HTML file with everything in it: plotly's script, ours, the style and the data."""

import base64
import hashlib
import importlib.resources
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repo_jax.analysis.reading import Reading
from repo_jax.errors import ConfigError, MissingPackageError


def write_page(path: str | Path, readings: Sequence[Reading], *, max_tokens: int = 20_000) -> None:
    """Writes readings of one text as a page that opens offline and can be mailed.

    Args:
      path: a file that does not exist yet.
      readings: of the same text, by models of different names.
      max_tokens: how many tokens of each are shown; the page says where more were read.

    Raises:
      ConfigError: the file exists or cannot be written, or the readings do not go together.
    """
    path = Path(path)
    if path.exists():
        raise ConfigError(f"{path} already exists and is not overwritten")
    if not readings:
        raise ConfigError("there are no readings to show; the page needs at least one")
    check_names([reading.name for reading in readings])
    for reading in readings:
        if reading.text != readings[0].text:
            raise ConfigError(
                f"{reading.name!r} has read another text than {readings[0].name!r}; "
                "a page shows readings of one text"
            )
    shown = [payload(reading, max_tokens) for reading in readings]
    end = max(int(reading.spans[:max_tokens, 1].max()) for reading in readings)
    page = render({"text": readings[0].text[:end], "readings": shown})
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(page, encoding="utf-8")
        os.rename(part, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def check_names(names: Sequence[str]) -> None:
    """Refuses names that readers, and links, could not tell apart."""
    for name in names:
        if not name or names.count(name) > 1:
            raise ConfigError(
                f"{names.count(name)} models are named {name!r}; each needs a name of its own"
            )


def payload(reading: Reading, max_tokens: int) -> dict[str, Any]:
    """What the page's script knows of a reading, ready for JSON.

    Arrays are little-endian bytes in base64: `spans`, int32 [T, 2], counts UTF-16 units of the
    text, as JavaScript does; `positions`, float32 [R, N, T], has the R RePo layers only, since
    those of the others follow from their kind.
    """
    repo = np.array([kind == "repo" for kind in reading.kinds])
    spans = _utf16_offsets(reading.text)[reading.spans[:max_tokens]]
    return {
        "name": reading.name,
        "kinds": reading.kinds,
        "heads": reading.positions.shape[1],
        "tokens": len(spans),
        "total": len(reading.ids),
        "spans": _base64(spans.astype("<i4")),
        "positions": _base64(reading.positions[repo, :, :max_tokens].astype("<f4")),
    }


def render(data: dict[str, Any], *, connect: str = "'none'") -> str:
    """The page as text.

    Args:
      data: for the script, anything JSON can say.
      connect: what the page may request, as the policy's `connect-src`.

    Raises:
      MissingPackageError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingPackageError("plotly", "the page", "plots") from None
    files = importlib.resources.files(__package__)
    read = lambda name: files.joinpath(name).read_text(encoding="utf-8")
    scripts = {"plotly": get_plotlyjs(), "script": read("page.js")}
    parts = scripts | {
        "policy": _policy(scripts.values(), connect),
        "style": read("page.css"),
        # Inside a script element only `<` could end it or begin a comment.
        "data": json.dumps(data).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], read("page.html"))


def _policy(scripts, connect: str) -> str:
    """A Content-Security-Policy under which these scripts run and nothing else does."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    known = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return "; ".join(
        [
            "default-src 'none'",
            # plotly compiles its WebGL drawing from strings of its own.
            f"script-src {known} 'unsafe-eval'",
            "style-src 'unsafe-inline'",
            # The icon, and the image that plotly's camera button saves.
            "img-src data: blob:",
            f"connect-src {connect}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _utf16_offsets(text: str) -> np.ndarray:
    """Where each character begins in UTF-16, and where the last ends: int64 [len + 1]."""
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return np.concatenate([[0], np.cumsum(1 + (characters > 0xFFFF))])


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
