"""Checkpoints of other people: the only place that knows Hugging Face and OLMo names.

How data flows: `hub.locate` finds the folder; `config_json` and `olmo` read its config
(`pe_config` the positions in it); `names.table` lists the tensors such a model has;
`checkpoint.Checkpoint` gives them one at a time to `load`. `save` and `repo_jax.convert`
go the other way through `checkpoint.write`.
"""

from repo_jax.interop.load import from_pretrained
from repo_jax.interop.save import save_pretrained

__all__ = ["from_pretrained", "save_pretrained"]
