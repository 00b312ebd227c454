"""The methods that are compared, and models of equal size for them."""

import dataclasses
import functools
import math

import jax

from repo_jax.config import DecoderConfig, PositionConfig
from repo_jax.errors import ConfigError
from repo_jax.modeling import RePoLM, abstract_params

# Beyond any count of keys that a task asks for; 4096 would be most of a small model.
_COPE_POSITIONS = 64


@dataclasses.dataclass(frozen=True)
class Method:
    """What a model of some depth knows of positions.

    Attributes:
      positions: of its layers.
      index_weight: w of (1 - w) z + w index in its RePo layers.
    """

    positions: PositionConfig
    index_weight: float = 0.0


def _repo(**options) -> Method:
    return Method(PositionConfig(preset="repo", **options))


# By name, from the number of layers, in the order of tables and of colours in figures. A third is
# taken literally here, as the first layer from 0; the preset's own start is one layer before, as
# in upstream's code.
_METHODS = {
    "rope": lambda n: Method(PositionConfig(preset="rope")),
    "nope": lambda n: Method(PositionConfig(preset="nope")),
    "r2n1": lambda n: Method(PositionConfig(preset="r2n1")),
    "n2r1": lambda n: Method(PositionConfig(preset="n2r1")),
    "repo": lambda n: _repo(),
    "repo_all": lambda n: _repo(start_layer=0),
    "repo_third": lambda n: _repo(start_layer=math.ceil(n / 3)),
    "repo_half": lambda n: _repo(start_layer=n // 2),
    "repo_shared": lambda n: _repo(heads="shared"),
    "repo_linear": lambda n: _repo(f_phi="linear"),
    # Of four layers, `repo` with every z at 0: what is left of it without learned positions.
    "rope_first": lambda n: Method(PositionConfig(layers=("rope",) + ("nope",) * (n - 1))),
    "repo_blend": lambda n: dataclasses.replace(_repo(), index_weight=0.5),
    "cope": lambda n: Method(PositionConfig(preset="cope", cope_positions=_COPE_POSITIONS)),
}

NAMES = tuple(_METHODS)


def method(name: str, n_layers: int) -> Method:
    """The method of that name in a model of `n_layers`.

    Raises:
      ConfigError: there is none of that name.
    """
    if name not in _METHODS:
        raise ConfigError(f"methods has {name!r}; each must be one of {', '.join(NAMES)}")
    return _METHODS[name](n_layers)


@functools.cache
def parameter_count(config: DecoderConfig) -> int:
    """Parameters of a model, from its shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(RePoLM(config))))


def matched(config: DecoderConfig, positions: PositionConfig) -> DecoderConfig:
    """`config` with other positions, and `d_ff` such that it has as many parameters.

    The widest of the multiples of 8, 4, 2 and 1 that comes within half a percent, since even
    widths are faster.

    Args:
      config: a RoPE model.
      positions: of the new one.

    Raises:
      ConfigError: no width comes within 1 %.
    """
    wanted = parameter_count(config)
    config = dataclasses.replace(config, positions=positions)
    each = 3 * config.d_model * config.n_layers
    exact = config.d_ff + (wanted - parameter_count(config)) / each
    for multiple, most in ((8, 0.005), (4, 0.005), (2, 0.005), (1, 0.01)):
        d_ff = multiple * round(exact / multiple)
        if d_ff > 0 and abs(d_ff - exact) * each <= most * wanted:
            return dataclasses.replace(config, d_ff=d_ff)
    raise ConfigError(
        f"model.d_ff is {config.d_ff}; a model with other positions ({positions.preset}) cannot "
        f"have its {wanted} parameters within 1 % whatever its d_ff; give a larger model"
    )
