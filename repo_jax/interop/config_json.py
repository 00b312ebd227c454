"""config.json, ours and Hugging Face's, both ways.

Source: transformers' Olmo2Config, and `pe_config` of the RePo authors' fork.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

from repo_jax.config import DecoderConfig, PositionConfig, RopeScaling, to_dict
from repo_jax.errors import ConfigError
from repo_jax.interop import olmo, pe_config
from repo_jax.interop.fields import Fields

Format = Literal["huggingface", "repo_jax"]


def read_folder(folder: Path, rope_scaling: RopeScaling | None = None) -> DecoderConfig:
    """The config of a checkpoint folder: its config.json, else OLMo's config.yaml.

    Args:
      folder: of the checkpoint.
      rope_scaling: counts instead of what the file says.

    Raises:
      ConfigError: there is neither file, or it says something that is not supported.
    """
    path = folder / "config.json"
    if path.is_file():
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{path} holds no object")
        return read(data, str(path), rope_scaling)
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} has no config.json (or config.yaml of OLMo's)")
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise ConfigError(f"{path} has no section 'model', so it is not OLMo's config.yaml")
    config = olmo.read_config(data["model"], f"{path}: model")
    return dataclasses.replace(config, rope_scaling=rope_scaling)


def read(
    data: dict[str, Any], where: str, rope_scaling: RopeScaling | None = None
) -> DecoderConfig:
    """A DecoderConfig from the object in config.json.

    Missing fields mean what they mean to transformers. `rope_scaling` overrides the file's.

    Raises:
      ConfigError: a field is missing, unsupported or contradicts another.
    """
    if "repo_jax" in data:
        config = _read_ours(Fields(data, where).section("repo_jax"))
        return dataclasses.replace(config, rope_scaling=rope_scaling or config.rope_scaling)
    fields = Fields(data, where)
    fields.must_be("model_type", "olmo2", None)
    fields.must_be("hidden_act", "silu", "silu")
    fields.must_be("attention_bias", False, False)
    fields.must_be("tie_word_embeddings", False, False)
    fields.must_be("quantization_config", None, None)
    n_layers, n_heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
    n_kv_heads = fields.integer("num_key_value_heads", n_heads)
    max_length = fields.integer("max_position_embeddings", 2048)
    # transformers 5 keeps rope_theta and the scaling together under a new name.
    rope = fields.section("rope_parameters" if "rope_parameters" in fields else "rope_scaling")
    theta = rope if "rope_theta" in rope else fields
    original_length = rope.integer("original_max_position_embeddings", max_length)
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        d_model=fields.integer("hidden_size"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=fields.integer("head_dim", None),
        d_ff=fields.integer("intermediate_size"),
        max_length=original_length,
        rope_theta=theta.number("rope_theta", 10_000.0),
        norm_eps=fields.number("rms_norm_eps", 1e-5),
        init_std=fields.number("initializer_range", 0.02),
        positions=pe_config.read(fields.section("pe_config"), n_layers, n_heads, n_kv_heads),
        rope_scaling=rope_scaling or _read_yarn(rope, max_length, original_length),
        eos_ids=fields.integers("eos_token_id"),
        pad_id=fields.integer("pad_token_id", None),
    )


def write(config: DecoderConfig, weights_dtype: str, format: Format) -> dict[str, Any]:
    """The object for config.json.

    Format `huggingface` loads in transformers (its Olmo2Config before version 5 refuses any
    YaRN in a file, though, and takes it as an override only) and, with RePo or NoPE layers,
    in the RePo authors' fork. Format `repo_jax` holds every field and is read back equal;
    its model_type keeps other readers from running the weights as something they are not.

    Raises:
      ConfigError: upstream cannot express a field; the message names it.
    """
    c = config
    shared = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": c.trained_length,
        "initializer_range": c.init_std,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "pad_token_id": c.pad_id,
        "bos_token_id": None,
        "eos_token_id": c.eos_ids[0] if len(c.eos_ids) == 1 else list(c.eos_ids) or None,
        "torch_dtype": weights_dtype,
    }
    if format == "repo_jax":
        return {"model_type": "repo_jax", **shared, "repo_jax": to_dict(c)}
    if format != "huggingface":
        raise ConfigError(f"format is {format!r}; it must be huggingface or repo_jax")
    if c.head_dim * c.n_heads != c.d_model:
        raise ConfigError(
            f"model.head_dim is {c.head_dim}; upstream has d_model / n_heads "
            f"({c.d_model} / {c.n_heads}); save with format='repo_jax'"
        )
    return {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        **shared,
        **_write_yarn(c),
        "pe_config": pe_config.write(c),
    }


# Other keys of YaRN, and the values at which they change nothing.
_YARN_DEFAULTS = {"mscale": None, "mscale_all_dim": None, "truncate": True}


def _read_yarn(rope: Fields, max_length: int, original_length: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", None))
    if kind is None and "factor" in rope:
        raise ConfigError(f"{rope.where}: rope_type is missing; only 'yarn' is supported")
    if kind in (None, "default"):
        return None
    if kind != "yarn":
        raise ConfigError(f"{rope.where}: the type is {kind!r}; only 'yarn' is supported")
    for name, value in _YARN_DEFAULTS.items():
        rope.must_be(name, value, value)
    if "original_max_position_embeddings" not in rope:
        factor = rope.number("factor")
    else:
        implied = max_length / original_length
        factor = rope.number("factor", implied)
        if factor != implied:
            # Newer transformers take the factor, the authors' fork the ratio.
            raise rope.error(
                "factor",
                f"max_position_embeddings / original_max_position_embeddings is {max_length} / "
                f"{original_length}, and readers differ in which they use; make them equal or "
                "pass rope_scaling",
            )
    scale = rope.number("attention_factor", None)
    if scale is not None and not math.isclose(scale, 0.1 * math.log(factor) + 1, rel_tol=1e-6):
        raise rope.error("attention_factor", "only 0.1 ln(factor) + 1 is supported")
    return RopeScaling(
        factor=factor,
        original_length=original_length,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
    )


def _write_yarn(config: DecoderConfig) -> dict[str, Any]:
    """YaRN such that the factor and the ratio of the two lengths agree."""
    yarn = config.rope_scaling
    if yarn is None:
        return {}
    if yarn.original_length != config.max_length:
        raise ConfigError(
            f"rope_scaling.original_length is {yarn.original_length} and model.max_length is "
            f"{config.max_length}; config.json has one field for both; save with format='repo_jax'"
        )
    length = yarn.factor * yarn.original_length
    if length != int(length):
        raise ConfigError(
            f"rope_scaling.factor is {yarn.factor}; times original_length it must be a whole "
            "number of tokens; save with format='repo_jax'"
        )
    return {
        "max_position_embeddings": int(length),
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": float(yarn.factor),
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": float(yarn.beta_fast),
            "beta_slow": float(yarn.beta_slow),
        },
    }


def _read_ours(fields: Fields) -> DecoderConfig:
    """The config that format `repo_jax` wrote."""
    values = dict(fields.data)
    sections = {"positions": PositionConfig, "rope_scaling": RopeScaling}
    for name, cls in sections.items():
        if name in fields:
            values[name] = _construct(cls, fields.section(name))
    return _construct(DecoderConfig, Fields(values, fields.where))


def _construct(cls, fields: Fields):
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(fields.data.keys() - known)
    if unknown:
        raise ConfigError(
            f"{fields.where}: {unknown[0]} is unknown; the checkpoint is of a newer version, or "
            "the name is misspelt"
        )
    try:
        return cls(**fields.data)
    except TypeError as error:
        raise ConfigError(f"{fields.where}: {error}") from None
