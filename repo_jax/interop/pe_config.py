"""Which layer has which positions, as the RePo authors' forks write it.

`dynamic_pe_mode` names one mode; a layer has it when its index is at least the start layer
and among the layer ids (none given: all); every other layer is RoPE. The keys of start and
ids exist in two spellings, `dynamic_` and `dynmaic_`: upstream's readers use the misspelt
ones, its converter writes both. The misspelt one counts here too. Where the other differs
from it and is not merely the default that transformers fills in, someone edited only one
of them, which is refused.

Read as well from the `model` section of OLMo's config.yaml, which has the same keys.
"""

from typing import Any

from repo_jax.config import DecoderConfig, PositionConfig
from repo_jax.errors import ConfigError
from repo_jax.interop.fields import Fields

_START = ("dynmaic_pe_start_layer", "dynamic_pe_start_layer")
_IDS = ("dynmaic_pe_layer_ids", "dynamic_pe_layer_ids")

# Mode: kind of its layers, f_phi, columns of z.
_MODES = {
    "none": ("rope", "swiglu", "kv"),
    "nope": ("nope", "swiglu", "kv"),
    "swigluex_multihead": ("repo", "swiglu", "kv"),
    "multihead_continuous": ("repo", "linear", "kv"),
    "continuous": ("repo", "linear", "shared"),
}


def read(fields: Fields, n_layers: int, n_heads: int, n_kv_heads: int) -> PositionConfig:
    """Positions of each layer; no mode at all is plain RoPE."""
    mode = fields.get("dynamic_pe_mode", "none")
    if not isinstance(mode, str) or mode not in _MODES:
        raise fields.error("dynamic_pe_mode", f"known are {', '.join(_MODES)}")
    kind, f_phi, heads = _MODES[mode]
    if kind == "repo" and heads == "kv" and n_heads != n_kv_heads:
        raise fields.error(
            "dynamic_pe_mode",
            f"it has one position per head, which is not defined for {n_heads} query heads "
            f"and {n_kv_heads} key/value heads",
        )
    start = _either(fields, _START, lambda name: fields.integer(name, 0), default=0)
    ids = _either(fields, _IDS, lambda name: _layer_ids(fields, name, n_layers), default=())
    chosen = [i >= start and (not ids or i in ids) for i in range(n_layers)]
    kinds = tuple(kind if c else "rope" for c in chosen)
    return _simplest(kinds, f_phi, heads)


def write(config: DecoderConfig) -> dict[str, Any]:
    """The `pe_config` of config.json.

    Raises:
      ConfigError: upstream has no mode for these positions; the message names the field.
    """
    mode, kind = _mode(config), _special_kind(config)
    layers = [i for i, k in enumerate(config.kinds) if k == kind]
    start, ids = 0, ""
    if layers and layers[-1] == config.n_layers - 1 and len(layers) == layers[-1] - layers[0] + 1:
        start = layers[0]
    elif layers:
        ids = ",".join(str(i) for i in layers)
    return {
        "dynamic_pe_mode": mode,
        **{name: start for name in _START[::-1]},
        **{name: ids for name in _IDS[::-1]},
        # No annealing from the index to z: upstream reads these at training only.
        "dynamic_pe_init_pdrop": 1.0,
        "dynamic_pe_dropout_anneal_step": 0,
    }


def _special_kind(config: DecoderConfig) -> str:
    """The kind that is not RoPE, of which upstream allows one."""
    special = set(config.kinds) - {"rope"}
    if len(special) > 1:
        raise ConfigError(
            "positions.layers has both nope and repo layers, which config.json cannot say "
            "upstream; save with format='repo_jax'"
        )
    return special.pop() if special else "rope"


def _mode(config: DecoderConfig) -> str:
    kind = _special_kind(config)
    if kind == "cope":
        raise ConfigError(
            "positions is CoPE, which upstream's readers cannot run; save with format='repo_jax'"
        )
    if kind != "repo":
        return {"rope": "none", "nope": "nope"}[kind]
    columns, f_phi = config.position_columns, config.positions.f_phi
    advice = "save with format='repo_jax'"
    if f_phi == "linear" and config.positions.heads == "shared":
        return "continuous"
    if config.n_kv_heads != config.n_heads:
        raise ConfigError(
            f"model.n_kv_heads is {config.n_kv_heads} with {config.n_heads} heads; upstream has "
            f"RePo per head for equal numbers only; {advice}"
        )
    if columns != config.n_heads:
        raise ConfigError(
            f"positions.heads is {config.positions.heads!r}; upstream's {f_phi} f_phi has one "
            f"column per head; {advice}"
        )
    if f_phi == "linear":
        return "multihead_continuous"
    if config.d_position != config.d_model // 8:
        raise ConfigError(
            f"positions.d_position is {config.d_position}; upstream has d_model / 8 "
            f"({config.d_model // 8}); {advice}"
        )
    return "swigluex_multihead"


def _either(fields: Fields, names: tuple[str, str], read, default):
    """The value under the misspelt name, else under the other."""
    misspelt, right = names
    if misspelt not in fields:
        return read(right)
    value = read(misspelt)
    if read(right) not in (value, default):
        raise fields.error(
            right, f"{misspelt}, which upstream reads, is {fields.get(misspelt)!r}; give one value"
        )
    return value


def _layer_ids(fields: Fields, name: str, n_layers: int) -> tuple[int, ...]:
    """Layer ids from `"2,5"`, `[2, 5]`, or nothing."""
    value = fields.get(name, "")
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if not all(part.isdigit() for part in parts):
            raise fields.error(name, "it must be layer indices separated by commas")
        ids = tuple(int(part) for part in parts)
    else:
        ids = fields.integers(name)
    if any(not 0 <= i < n_layers for i in ids):
        raise fields.error(name, f"the layers are 0 to {n_layers - 1}")
    return ids


def _simplest(kinds: tuple[str, ...], f_phi: str, heads: str) -> PositionConfig:
    """The preset that gives `kinds`, or the list."""
    n_layers, n_repo = len(kinds), kinds.count("repo")
    for preset in ("rope", "nope", "r2n1", "n2r1"):
        if PositionConfig(preset).kinds(n_layers) == kinds:
            return PositionConfig(preset)
    if n_repo and kinds == ("rope",) * (n_layers - n_repo) + ("repo",) * n_repo:
        return PositionConfig("repo", start_layer=n_layers - n_repo, f_phi=f_phi, heads=heads)
    preset = "repo" if n_repo else "rope"
    return PositionConfig(preset, layers=kinds, f_phi=f_phi, heads=heads)
