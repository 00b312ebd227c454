"""OLMo's own checkpoints: config.yaml, and tensor names in base64.

Source: github.com/allenai/OLMo (olmo/config.py, olmo/safetensors_util.py) and the RePo
authors' fork of it, which adds `dynamic_pe_*` to the `model` section.
"""

import base64
import binascii
import pickletools
from typing import Any

from repo_jax.config import DecoderConfig
from repo_jax.errors import ConfigError
from repo_jax.interop import pe_config
from repo_jax.interop.fields import Fields

# What OLMo 2 must say, and OLMo's default where it says nothing.
_REQUIRED = {
    "activation_type": ("swiglu", "swiglu"),
    "alibi": (False, False),
    "attention_layer_norm": (True, False),
    "attention_layer_norm_with_affine": (True, True),
    "block_group_size": (1, 1),
    "block_type": ("sequential", "sequential"),
    "clip_qkv": (None, None),
    "embedding_layer_norm": (False, False),
    "include_bias": (False, True),
    "layer_norm_type": ("rms", "default"),
    "layer_norm_with_affine": (True, True),
    "norm_after": (True, False),
    "rope": (True, False),
    "scale_logits": (False, False),
    "weight_tying": (False, True),
}


def read_config(model: dict[str, Any], where: str) -> DecoderConfig:
    """The `model` section of OLMo's config.yaml.

    Raises:
      ConfigError: a field is missing, or has a value that is not OLMo 2.
    """
    fields = Fields(model, where)
    for name, (required, default) in _REQUIRED.items():
        fields.must_be(name, required, default)
    # Biases of norms follow those of the linear maps where nothing is said.
    fields.must_be("bias_for_layer_norm", False, False)
    d_model, n_heads = fields.integer("d_model"), fields.integer("n_heads")
    n_layers = fields.integer("n_layers")
    one_kv_head = model.get("multi_query_attention") is True
    n_kv_heads = fields.integer("n_kv_heads", 1 if one_kv_head else n_heads)
    d_ff = fields.integer("mlp_hidden_size", d_model * fields.integer("mlp_ratio", 4))
    vocab_size = fields.integer("vocab_size")
    return DecoderConfig(
        vocab_size=fields.integer("embedding_size", vocab_size),
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        # The width of up and gate together.
        d_ff=d_ff // 2,
        max_length=fields.integer("max_sequence_length"),
        rope_theta=fields.number("rope_theta", 10_000.0),
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        init_std=fields.number("init_std", 0.02),
        positions=pe_config.read(fields, n_layers, n_heads, n_kv_heads),
        eos_ids=fields.integers("eos_token_id"),
        pad_id=fields.integer("pad_token_id", None),
    )


def decode_name(key: str) -> str:
    """A tensor's name, from a key of one of OLMo's .safetensors files.

    OLMo writes the base64 of a pickle of `((name, ...), value_is_pickled)`. The pickle is
    read here as data: only the opcodes that make strings, booleans and tuples exist, so
    nothing can be called. Keys that are no such pickle are returned as they are.

    Raises:
      ConfigError: the pickle holds anything else, or says that the tensor is one.
    """
    try:
        pickled = base64.b64decode(key, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return key
    if not pickled.startswith(b"\x80"):  # the opcode that opens every pickle since protocol 2
        return key
    match _parse(pickled, key):
        case ((*names, last), False) if all(isinstance(name, str) for name in (*names, last)):
            return ".".join((*names, last))
        case (_, True):
            raise ConfigError(f"tensor {key!r} is a pickled object; only tensors are read")
    raise ConfigError(f"tensor name {key!r} is not one of OLMo's")


_MARK = object()


def _parse(pickled: bytes, key: str) -> Any:
    stack: list[Any] = []
    memo: list[Any] = []
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                    stack.append(argument)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case "MEMOIZE" | "BINPUT" | "LONG_BINPUT":  # numbered from 0 in all of them
                    memo.append(stack[-1])
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "MARK":
                    stack.append(_MARK)
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    n = int(opcode.name[-1])
                    stack[-n:] = [tuple(stack[-n:])]
                case "TUPLE":
                    start = len(stack) - 1 - stack[::-1].index(_MARK)
                    stack[start:] = [tuple(stack[start + 1 :])]
                case "STOP":
                    return stack.pop()
                case name:
                    raise ConfigError(
                        f"tensor name {key!r} is a pickle with the opcode {name}; only names "
                        "in tuples are read"
                    )
    except (IndexError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"tensor name {key!r} is a broken pickle: {error}") from None
    raise ConfigError(f"tensor name {key!r} is a pickle without an end")
