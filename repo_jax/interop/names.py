"""One table: every tensor of a checkpoint, its names outside, its place in our parameters.

Loading, saving, conversion and error reports all walk this table, so a tensor's name,
shape and orientation are written down once. Linear maps are stored as torch has them,
[out, in]; ours are [in, out] with the heads apart. Both pair rotary channel c with
c + H / 2, so no channel moves.

Names: transformers' Olmo2ForCausalLM; OLMo's trainer (olmo/model.py), which stacks query,
key and value along the rows of `att_proj`, and up and gate along those of `ff_proj`; f_phi
as the RePo authors' forks of both name it (github.com/SakanaAI/repo).
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from repo_jax.config import DecoderConfig

Layout = Literal["huggingface", "olmo"]
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor.

    Attributes:
      path: of the parameter that holds it.
      index: its row there, among stacked layers; None: the parameter is not stacked.
      layer: the layer it belongs to, 0-based; None: to none.
      name: Hugging Face's.
      olmo, olmo_row: OLMo's name, and the first of its rows in that tensor.
      stored: its shape in checkpoints with Hugging Face's names.
      ours: its shape in the parameter, without the stacked axis.
    """

    path: Path
    index: int | None
    layer: int | None
    name: str
    olmo: str
    olmo_row: int
    stored: tuple[int, ...]
    ours: tuple[int, ...]

    def source(self, layout: Layout) -> tuple[str, int]:
        """The tensor that has its numbers, and the first row of them there."""
        return (self.olmo, self.olmo_row) if layout == "olmo" else (self.name, 0)

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        """[*stored] -> [*ours], a view where it can be."""
        return (x.T if self._is_map else x).reshape(self.ours)

    def to_stored(self, x: np.ndarray) -> np.ndarray:
        """[*ours] -> [*stored], a view where it can be."""
        return x.reshape(self.stored[::-1]).T if self._is_map else x.reshape(self.stored)

    @property
    def _is_map(self) -> bool:
        return self.path[-1].endswith("kernel")


def table(config: DecoderConfig) -> list[Entry]:
    """Every tensor of a model, in Hugging Face's order: embedding, layers, norm, head."""
    c = config
    d, f = (c.d_model,), (c.d_ff,)
    heads, kv = (c.n_heads, c.head_dim), (c.n_kv_heads, c.head_dim)
    k_row = math.prod(heads)
    v_row = k_row + math.prod(kv)
    # Parameter, inputs, outputs, Hugging Face's name, OLMo's name and first row there.
    block = [
        ("attention/query/kernel", d, heads, "self_attn.q_proj", "att_proj", 0),
        ("attention/key/kernel", d, kv, "self_attn.k_proj", "att_proj", k_row),
        ("attention/value/kernel", d, kv, "self_attn.v_proj", "att_proj", v_row),
        ("attention/out/kernel", heads, d, "self_attn.o_proj", "attn_out", 0),
        ("attention/query_norm/scale", (), heads, "self_attn.q_norm", "q_norm", 0),
        ("attention/key_norm/scale", (), kv, "self_attn.k_norm", "k_norm", 0),
        ("attention_norm/scale", (), d, "post_attention_layernorm", "attn_norm", 0),
        ("mlp/up/kernel", d, f, "mlp.up_proj", "ff_proj", 0),
        ("mlp/gate/kernel", d, f, "mlp.gate_proj", "ff_proj", c.d_ff),
        ("mlp/down/kernel", f, d, "mlp.down_proj", "ff_out", 0),
        ("mlp_norm/scale", (), d, "post_feedforward_layernorm", "ff_norm", 0),
    ]
    # Upstream's fork has CoPE, but no published checkpoint with it; the name is ours.
    cope = ("attention/position_kernel", (c.head_dim,), (c.positions.cope_positions,))
    cope = (*cope, "self_attn.position_map", "position_map", 0)
    width, columns = (c.d_position,), (c.position_columns,)
    maps = {
        "swiglu": [
            ("gate_map", d, width, "gate_map"),
            ("content_map", d, width, "content_map"),
            ("final_map", width, columns, "final_map"),
        ],
        "linear": [("linear_map", d, columns, "dynamic_map")],
    }[c.positions.f_phi]
    f_phi = [
        (f"repositioning/{ours}/kernel", ins, outs, f"self_attn.{name}", name, 0)
        for ours, ins, outs, name in maps
    ]

    def entry(path, ins, outs, name, olmo, olmo_row, index=None, layer=None):
        stored = (math.prod(outs), math.prod(ins)) if ins else (math.prod(outs),)
        return Entry(
            path=tuple(path.split("/")),
            index=index,
            layer=layer,
            name=f"{name}.weight",
            olmo=f"transformer.{olmo}.weight",
            olmo_row=olmo_row,
            stored=stored,
            ours=(*ins, *outs),
        )

    vocab = (c.vocab_size,)
    embedding = entry("embedding/embedding", vocab, d, "model.embed_tokens", "wte", 0)
    # The one matrix that both sides keep as [V, D].
    entries = [dataclasses.replace(embedding, stored=embedding.ours)]
    n_repo = 0
    for i, kind in enumerate(c.kinds):
        rows = [(spec, i) for spec in block + [cope] * (kind == "cope")]
        if kind == "repo":
            rows += [(spec, n_repo) for spec in f_phi]
            n_repo += 1
        for (path, ins, outs, name, olmo, olmo_row), index in rows:
            names = (f"model.layers.{i}.{name}", f"blocks.{i}.{olmo}")
            entries.append(entry(f"layers/{path}", ins, outs, *names, olmo_row, index, i))
    entries.append(entry("final_norm/scale", (), d, "model.norm", "ln_f", 0))
    entries.append(entry("head/kernel", d, vocab, "lm_head", "ff_out", 0))
    return entries


def parameter_shapes(config: DecoderConfig) -> dict[Path, tuple[int, ...]]:
    """The shape of every parameter of the model, by path."""
    shapes = {}
    for path, entries in by_parameter(table(config)).items():
        stack = () if entries[0].index is None else (len(entries),)
        shapes[path] = (*stack, *entries[0].ours)
    return shapes


def by_parameter(entries: list[Entry]) -> dict[Path, list[Entry]]:
    """The tensors that each parameter holds, in the order of its rows."""
    groups: dict[Path, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.path, []).append(entry)
    return groups


def stored_shapes(entries: list[Entry], layout: Layout) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a checkpoint in `layout` has."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        name, _ = entry.source(layout)
        rows = shapes[name][0] if name in shapes else 0
        shapes[name] = (rows + entry.stored[0], *entry.stored[1:])
    return shapes
