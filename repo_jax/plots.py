"""What all plots share: colours, markers, and the files they are written to."""

import sys
from pathlib import Path

from repo_jax.errors import MissingPackageError

# Okabe and Ito's colours, which colour-blind readers tell apart, and markers besides.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "*")

_DPI = 200


def import_pyplot(feature: str):
    """matplotlib's pyplot; where nobody has imported it yet, for files only.

    Args:
      feature: what needs it, for the error.

    Raises:
      MissingPackageError: matplotlib is not installed.
    """
    try:
        import matplotlib

        if "matplotlib.pyplot" not in sys.modules:  # a notebook keeps its windows
            matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise MissingPackageError("matplotlib", feature, "plots") from None
    return pyplot


def save(figure, path: Path) -> tuple[Path, Path]:
    """Writes a figure as PNG and SVG and closes it.

    The same figure gives the same bytes each time.

    Args:
      figure: of pyplot.
      path: of both files, without suffix; its folder is there.

    Returns:
      The two files.
    """
    pyplot = import_pyplot("a plot")
    png, svg = (path.with_name(path.name + suffix) for suffix in (".png", ".svg"))
    with pyplot.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(png, dpi=_DPI)
        figure.savefig(svg, metadata={"Date": None})
    pyplot.close(figure)
    return png, svg
