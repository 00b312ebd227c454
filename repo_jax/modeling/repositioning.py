"""RePo's f_phi: from hidden states to real-valued positions."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from repo_jax.modeling.layers import Linear, contract


class ContextRePositioning(nn.Module):
    """Reads each token's hidden state and gives it a position per head (paper 3.2).

    `swiglu`: r = silu(h W_g) * (h W_c), z = r W_z (eq. 4, 5). `linear`: z = h W.
    No bias, no bound, no monotonicity, and no index among the inputs: z may be any real
    number, and a new module (weights of std 0.02) gives every token nearly the same one.

    Attributes:
      columns: C, positions per token: the number of heads, or 1 to share one.
      d_position: P, width of r; not used by `linear`. The paper has D / 8.
      f_phi: `swiglu` or `linear`.
      init_std: of the truncated normal that draws the weights, cut at 3 sigma.
      logical_axes: names of D, P and C for `nn.logical_axis_rules`; None: plain parameters.
      dtype: of the maps W_g and W_c; z itself is always float32.
      param_dtype: of the parameters.
    """

    columns: int
    d_position: int | None = None
    f_phi: Literal["swiglu", "linear"] = "swiglu"
    init_std: float = 0.02
    logical_axes: tuple[str | None, str | None, str | None] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """h [..., D] of any float dtype -> z float32 [..., C]."""

        def to(features, axes, name, dtype, precision=None):
            return Linear(
                (features,),
                self.logical_axes and tuple(self.logical_axes["DPC".index(a)] for a in axes),
                init_std=self.init_std,
                dtype=dtype,
                param_dtype=self.param_dtype,
                precision=precision,
                name=name,
            )

        # A position error of 0.4 (bf16 at z = 100) is an angle error of 0.4 rad, so the map
        # to z is float32 and never rounded to bf16 passes, which costs nothing at this width.
        exact = dict(dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST)
        if self.f_phi == "linear":
            return to(self.columns, "DC", "linear_map", **exact)(h)
        D = h.shape[-1]
        width = self.d_position or max(1, D // 8)
        maps = [to(width, "DP", name, self.dtype) for name in ("gate_map", "content_map")]
        # One product of twice the width reads h once, but joining the kernels copies them: not
        # for fewer than D tokens, as in decoding, where reading weights is most of the work.
        if h.size < D * D:
            gate, content = (to_width(h) for to_width in maps)
        else:
            kernels = tuple(to_width.kernel((D,)) for to_width in maps)
            x = h.astype(self.dtype or h.dtype)
            gate, content = jnp.split(contract(x, None, kernels, 1, axes=maps[0].axes), 2, -1)
        return to(self.columns, "PC", "final_map", **exact)(content, gate)
