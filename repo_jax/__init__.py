"""RePo (Context Re-Positioning, arXiv 2512.14391) in JAX and Flax.

The names in `__all__` are stable: they change only with a major version and a note in the
changelog. Everything else may move.
"""

import importlib

# Where each public name lives. Imported when first used, so that `import repo_jax` needs
# only what is used of it.
_HOME = {
    "ContextRePositioning": "repo_jax.modeling",
    "DecoderBlock": "repo_jax.modeling",
    "DecoderConfig": "repo_jax.config",
    "PositionConfig": "repo_jax.config",
    "RePoLM": "repo_jax.modeling",
    "RopeScaling": "repo_jax.config",
    "capture_positions": "repo_jax.modeling",
    "from_pretrained": "repo_jax.interop",
    "generate": "repo_jax.inference",
    "init_params": "repo_jax.modeling",
    "load_run": "repo_jax.training.checkpoints",
    "save_pretrained": "repo_jax.interop",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__():
    return [*globals(), *__all__]
