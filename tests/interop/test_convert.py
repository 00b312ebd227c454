import json
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from repo_jax import cli, convert
from repo_jax.config import DecoderConfig, PositionConfig, RopeScaling
from repo_jax.errors import ConfigError
from repo_jax.interop import checkpoint, config_json, from_pretrained, names, save_pretrained


def test_result_is_what_loading_gives(golden_rope, tmp_path, assert_same):
    positions = PositionConfig("repo", start_layer=1)
    convert.convert(
        *(str(golden_rope), str(tmp_path / "a")),
        positions=positions,
        seed=5,
        max_shard_bytes=100_000,
    )
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 3
    model, params = from_pretrained(tmp_path / "a")
    wanted, wanted_params = from_pretrained(golden_rope, positions=positions, rng=jax.random.key(5))
    assert model.config == wanted.config
    assert_same(params, wanted_params)


def test_rows_are_read_in_parts(golden_repo, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "_CHUNK", 300)
    convert.convert(str(golden_repo), str(tmp_path / "a"))
    ours = load_file(tmp_path / "a" / "model.safetensors")
    theirs = load_file(golden_repo / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x, err_msg=name)


def test_dtype(golden_repo, tmp_path):
    convert.convert(str(golden_repo), str(tmp_path / "a"), dtype="bfloat16")
    ours = load_file(tmp_path / "a" / "model.safetensors")
    for name, x in load_file(golden_repo / "model.safetensors").items():
        np.testing.assert_array_equal(ours[name], x.astype(ml_dtypes.bfloat16), err_msg=name)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    # New weights take the dtype that the checkpoint has.
    positions = PositionConfig("repo", start_layer=0)
    convert.convert(str(tmp_path / "a"), str(tmp_path / "b"), positions=positions)
    dtypes = {x.dtype for x in load_file(tmp_path / "b" / "model.safetensors").values()}
    assert dtypes == {np.dtype(ml_dtypes.bfloat16)}


def test_numbers_beyond_float16(make_model, tmp_path):
    model, params = make_model()
    params["head"]["kernel"][0, 0] = 1e6
    save_pretrained(tmp_path / "a", model, params)
    with pytest.raises(ConfigError, match=r"lm_head.weight has numbers beyond float16"):
        convert.convert(str(tmp_path / "a"), str(tmp_path / "b"), dtype="float16")
    assert not (tmp_path / "b").exists()


def test_what_upstream_cannot_express(make_model, tmp_path):
    model, params = make_model(PositionConfig("rope"), n_kv_heads=2)
    save_pretrained(tmp_path / "a", model, params)
    arguments = (str(tmp_path / "a"), str(tmp_path / "b"))
    with pytest.raises(ConfigError, match="n_kv_heads is 2"):
        convert.convert(*arguments, positions=PositionConfig("repo"))
    assert not (tmp_path / "b").exists()
    convert.convert(*arguments, positions=PositionConfig("repo"), format="repo_jax")
    assert from_pretrained(tmp_path / "b")[0].config.kinds[-1] == "repo"


def test_yarn_is_written_for_all_readers(golden_repo, tmp_path):
    given, _ = from_pretrained(golden_repo)
    length = given.config.max_length
    arguments = ["--model", str(golden_repo), "--out", str(tmp_path / "a")]
    convert.main([*arguments, "--rope_scaling.factor", "4"])
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert written["max_position_embeddings"] == 4 * length
    assert written["rope_scaling"]["factor"] == 4
    assert written["rope_scaling"]["original_max_position_embeddings"] == length
    model, _ = from_pretrained(tmp_path / "a")
    assert model.config.rope_scaling == RopeScaling(4.0, length)
    assert model.config.max_length == length


def test_command_line(golden_rope, tmp_path, capsys):
    arguments = ["--model", str(golden_rope), "--out", str(tmp_path / "a")]
    convert.main([*arguments, "--positions.preset", "repo", "--dtype", "bfloat16"])
    assert capsys.readouterr().out.startswith("model.safetensors: 45 tensors")
    model, _ = from_pretrained(tmp_path / "a")
    assert model.config.kinds == ("repo",) * 3

    def refused(*more, message):
        with pytest.raises(SystemExit) as stopped:
            cli.run(lambda: convert.main([*arguments, *more]))
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    refused(message="config.json exists; nothing is overwritten, so name another folder")
    other = ("--out", str(tmp_path / "b"))
    refused(*other, "--model", "./none", message="there is no folder ./none")
    refused(*other, "--positions.d_position", "-1", message="d_position is -1; it must be positive")
    refused(*other, "--positions.present", "repo", message="present")
    refused(*other, "--dtype", "int8", message="int8")
    assert not (tmp_path / "b").exists()


MEASURE = """
import sys
from repo_jax import convert

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024

options = ["--dtype", "bfloat16", "--positions.preset", "repo"]
warm_up, warm_out, model, out = sys.argv[1:]
convert.main(["--model", warm_up, "--out", warm_out, *options])
before = peak()
convert.main(["--model", model, "--out", out, *options])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_checkpoint(golden_rope, tmp_path):
    config = DecoderConfig(
        vocab_size=32_000,
        d_model=1024,
        n_layers=6,
        n_heads=8,
        d_ff=4096,
        positions=PositionConfig("rope"),
    )
    tensors = [
        checkpoint.Tensor(entry.name, entry.stored, np.dtype(np.float32))
        for entry in names.table(config)
    ]
    size = sum(tensor.nbytes for tensor in tensors) / 2**20
    assert size > 600
    checkpoint.write(
        tmp_path / "in",
        config_json.write(config, "float32", "huggingface"),
        tensors,
        lambda tensor: [np.full(tensor.shape, 0.1, np.float32)],
        max_shard_bytes=10**10,
    )
    folders = [golden_rope, tmp_path / "small", tmp_path / "in", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *folders],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    # A few chunks of 32 MB, whatever the size of a tensor (131 MB here) or of the whole.
    assert float(done.stdout.splitlines()[-1]) < 130
    for folder in ("in", "out"):
        for path in (tmp_path / folder).glob("*.safetensors"):
            path.unlink()
