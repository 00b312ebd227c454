"""Decoding on the GPU or TPU at hand: tokens a second, and the share of memory bandwidth.

    python -m benchmarks.decode_device
    python -m benchmarks.decode_device --rounds 2 --size tiny --batch_sizes 1 2    # a trial

OLMo-2 1B's shape with random weights, bfloat16, greedy, presets rope and repo. A step's time is
that of a call with `--new_tokens` more tokens less that of a call with one, over the number, so
neither reading the prompt nor what a call costs anyway is in it. Rounds alternate; see
harness.py for that and for the intervals.

Bytes are the least that a step must read: every weight but the embedding's once, and the keys and
values of the tokens so far, half of the new ones on average. The share is of what the maker
publishes (repo_jax/hardware.py), which no program reaches.

Limits: one device, no other library to compare with.
"""

import argparse
import statistics

import jax
import numpy as np

from benchmarks import device, harness
from repo_jax import hardware
from repo_jax.config import PRESETS, DecoderConfig, PositionConfig, decoder_config
from repo_jax.inference import Generator
from repo_jax.modeling import RePoLM, init_params

POSITIONS = ("rope", "repo")
_TINY = dict(vocab_size=512, d_model=64, n_layers=4, n_heads=4, d_ff=128)


def options() -> argparse.ArgumentParser:
    p = harness.parser(__doc__.splitlines()[0])
    p.add_argument("--size", default="olmo2_1b", choices=[*PRESETS, "tiny"])
    p.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 64])
    p.add_argument("--length", type=int, default=256, help="tokens of a prompt")
    p.add_argument("--new_tokens", type=int, default=256, help="tokens that are timed")
    p.add_argument("--no_write", action="store_true", help="print only")
    p.set_defaults(no_torch=True)
    return p


def model_config(size: str, preset: str) -> DecoderConfig:
    """A model's shape in bfloat16."""
    changes = dict(positions=PositionConfig(preset=preset))
    changes |= dict(dtype="bfloat16", param_dtype="bfloat16")
    if size == "tiny":
        return DecoderConfig(**_TINY, **changes)
    return decoder_config(size, **changes)


def bytes_per_step(c: DecoderConfig, params, batch: int, length: float) -> float:
    """The least that one step reads."""
    weights = sum(
        x.nbytes
        for path, x in jax.tree.leaves_with_path(params)
        if "embedding" not in jax.tree_util.keystr(path)
    )
    # Positions for each query head need a key for each, too.
    heads = c.n_heads if c.positions.heads == "query" else c.n_kv_heads
    return weights + 2 * 2 * c.n_layers * batch * length * heads * c.head_dim


def main():
    args = options().parse_args()
    args.no_write |= args.rounds < harness.LEAST_ROUNDS
    about = device.describe()
    path = device.result_path(args, "decode", about["device"])
    chip = hardware.chip(about["device"])
    rng, contenders, least = np.random.default_rng(args.seed), {}, {}
    for preset in POSITIONS:
        c = model_config(args.size, preset)
        params = init_params(RePoLM(c), jax.random.key(args.seed))
        generator = Generator(RePoLM(c), params)
        for batch in args.batch_sizes:
            prompts = rng.integers(c.vocab_size, size=(batch, args.length)).tolist()
            middle = args.length + args.new_tokens / 2
            least[preset, batch] = bytes_per_step(c, params, batch, middle)
            for new in (1, 1 + args.new_tokens):

                def run(generator=generator, prompts=prompts, new=new):
                    found = generator.complete(prompts, max_new_tokens=new, eos_ids=())
                    return [row.ids for row in found]

                contenders[f"{preset}, B {batch}, {new} tokens"] = harness.jax_contender(run)
        del params
    times, _ = harness.measure(contenders, args)
    steps = {}
    for preset, batch in least:
        name = f"{preset}, B {batch}"
        one, whole = (times[f"{name}, {new} tokens"] for new in (1, 1 + args.new_tokens))
        steps[name] = (np.array(whole) - np.array(one)) / args.new_tokens
    rows = {}
    for (preset, batch), read in least.items():
        name = f"{preset}, B {batch}"
        step = float(np.median(steps[name]))
        rows[name] = {
            "new_tokens_per_second": batch / step,
            "step_ms": 1e3 * step,
            "gigabytes_per_second": read / step / 1e9,
            "share_of_bandwidth": read / step / chip.bandwidth if chip else None,
            "time_over_rope": harness.compare(steps[name], steps[f"rope, B {batch}"], args.seed),
            "prompt_ms": 1e3 * statistics.median(times[f"{name}, 1 tokens"]),
        }
    percent = lambda share: "-" if share is None else f"{100 * share:.0f} %"
    lines = [
        f"{args.size}, bfloat16, prompts of {args.length} tokens, {args.new_tokens} more; medians "
        f"over {args.rounds} rounds. Bytes: the least that must be read.",
        "",
        *harness.table(
            (
                *("", "new tokens/s", "ms a step", "GB/s", "of bandwidth"),
                *("time over rope", "95 % interval", "prompt and one token, ms"),
            ),
            (
                f"{name} | {r['new_tokens_per_second']:,.0f} | {r['step_ms']:.3f} | "
                f"{r['gigabytes_per_second']:.0f} | {percent(r['share_of_bandwidth'])} | "
                f"{harness.show(r['time_over_rope'])} | {r['prompt_ms']:.1f}"
                for name, r in rows.items()
            ),
        ),
    ]
    device.report(path, "Decoding", lines, {"rows": rows, "seconds": times}, args, about)


if __name__ == "__main__":
    main()
