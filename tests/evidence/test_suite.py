"""Suites are read, changed and refused; models of all methods are equally large."""

import dataclasses

import pytest

from repo_jax import cli
from repo_jax.errors import ConfigError
from repo_jax.evidence import methods
from repo_jax.evidence.methods import NAMES, matched, method, parameter_count
from repo_jax.evidence.suite import Cell, load
from tests.tiny_runs import ROOT

SUITES = sorted(path.stem for path in (ROOT / "configs" / "evidence").glob("*.yaml"))


@pytest.mark.parametrize(("heads", "n_layers", "wide"), [(2, 3, 2), (8, 6, 4)])
def test_all_methods_have_the_parameters_of_rope_within_one_percent(heads, n_layers, wide):
    d_model = 32 * heads
    cell = load("laptop", experiments=["reversal"]).cells()[0]
    model = dataclasses.replace(
        *(cell.definition.model,),
        **dict(d_model=d_model, n_heads=heads, n_layers=n_layers, d_ff=wide * d_model),
    )
    definition = dataclasses.replace(cell.definition, model=model)
    configs = {name: Cell("reversal", name, 0, definition).method_and_model()[1] for name in NAMES}
    wanted = parameter_count(configs["rope"])
    assert configs["rope"].d_ff == wide * d_model
    for name, config in configs.items():
        assert abs(parameter_count(config) - wanted) <= 0.01 * wanted, name


def test_a_model_too_small_to_be_matched_is_refused():
    _, config = load("tiny").cells()[0].method_and_model()
    tiny = dataclasses.replace(config, d_model=8, d_ff=1, n_heads=2, head_dim=4)
    with pytest.raises(ConfigError, match=r"model\.d_ff is 1; .* give a larger model"):
        matched(tiny, method("repo_all", 2).positions)


def test_embeddings_and_positions_may_begin_with_a_spread_of_their_own():
    def spreads(*changes):
        suite = load("laptop", experiments=["recall"], methods=["repo"], changes=changes)
        _, config = suite.cells()[0].method_and_model()
        return config.init_std, config.embedding_init_std, config.position_init_std

    assert spreads() == (0.125, 1.0, 0.125)
    recall = "experiments.recall"
    assert spreads(
        f"{recall}.position_init_std=0.02", f"{recall}.model.embedding_init_std=null"
    ) == (0.125, None, 0.02)


def test_methods_are_what_their_names_say():
    kinds = lambda name, n=6: method(name, n).positions.kinds(n)
    assert kinds("rope") == ("rope",) * 6
    assert kinds("repo") == ("rope",) + ("repo",) * 5
    assert kinds("repo_all") == ("repo",) * 6
    assert kinds("repo_third") == ("rope",) * 2 + ("repo",) * 4
    assert kinds("repo_half") == ("rope",) * 3 + ("repo",) * 3
    assert kinds("cope") == ("cope",) * 6
    assert kinds("rope_first") == ("rope",) + ("nope",) * 5
    assert method("repo_shared", 6).positions.heads == "shared"
    assert method("repo_linear", 6).positions.f_phi == "linear"
    weights = {name: method(name, 6).index_weight for name in NAMES}
    assert weights == dict.fromkeys(NAMES, 0.0) | {"repo_blend": 0.5}


@pytest.mark.parametrize("name", SUITES)
def test_packaged_suites_compare_with_rope_and_have_several_seeds(name):
    suite = load(name)
    assert "rope" in suite.methods
    assert len(suite.seeds) >= (2 if name == "tiny" else 3)
    for experiment in suite.experiments.values():
        names = {cell.method for cell in suite.cells() if cell.definition is experiment}
        assert names == set(experiment.methods or suite.methods)


def test_changes_are_made_where_they_say():
    suite = load(
        "tiny",
        methods=["rope"],
        experiments=["recall"],
        seeds=[7],
        changes=["experiments.*.optimizer.learning_rate=1e-3", "experiments.recall.steps=4"],
    )
    (cell,) = suite.cells()
    assert cell.name == "recall-rope-7"
    assert cell.definition.optimizer.learning_rate == 1e-3
    assert cell.definition.optimizer.warmup_steps == 2
    assert cell.definition.steps == 4


@pytest.mark.parametrize("name", [name for name in SUITES if name not in ("laptop", "tiny")])
def test_a_change_of_one_experiment_leaves_those_that_share_its_lines_alone(name):
    before = load(name).experiments
    first, *others = before
    changes = [f"experiments.{first}.optimizer.learning_rate=0.5"]
    changes += [f"experiments.{first}.model.rope_theta=7"]
    after = load(name, changes=changes).experiments
    assert after[first].optimizer.learning_rate == 0.5
    assert after[first].model.rope_theta == 7
    assert all(after[other] == before[other] for other in others)


def test_the_hash_tells_whatever_changes_the_numbers():
    def of(*changes, **chosen):
        chosen = {"methods": ["rope"], "seeds": [0], **chosen}
        return load("tiny", experiments=["reversal"], changes=changes, **chosen).cells()[0]

    hashes = [
        cell.config_hash()
        for cell in (
            of(),
            of(seeds=[1]),
            of(methods=["nope"]),
            of("dtype=bfloat16"),
            of("experiments.*.steps=9"),
            of("experiments.*.rope_steps=9"),
            of("experiments.*.reversal.alphabet=5"),
            of("experiments.*.model.d_ff=72"),
            of("experiments.*.loss_over=examples"),
            of("experiments.*.optimizer.rates={head/.*: 2, .*: 1}"),
            of("experiments.*.optimizer.rates={.*: 1, head/.*: 2}"),
        )
    ]
    assert len(set(hashes)) == len(hashes)
    assert of("experiments.*.headline=[]").config_hash() == hashes[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(methods=["rop"]), "methods has 'rop'; each must be one of rope, nope"),
        (dict(methods=["rope", "rope"]), "nothing may stand twice"),
        (dict(methods=["repo_third", "repo_half"]), "are the same model in reversal"),
        (dict(experiments=["text"]), "--tasks has 'text'; the suite laptop has reversal, recall"),
        (dict(seeds=[-1]), "seeds has -1"),
        (dict(changes=["experiments.reversal"]), "a change is written name.name=value"),
        (
            dict(changes=["experiments.*.stps=3"]),
            "--suite laptop with --set experiments.*.stps=3: there is no option stps; did you "
            "mean steps?\n",
        ),
        (dict(changes=["seds=3"]), "there is no option seds; did you mean seeds?\n"),
        (dict(changes=["experiments.*.steps=abc"]), "steps is abc; it must be int"),
        (dict(changes=["experiments.*.steps=0"]), "experiments.reversal.steps is 0; it must be"),
        (dict(changes=["experiments.*.steps=50"]), "warmup_steps is 100; there are only 50 steps"),
        (
            dict(changes=["experiments.*.rope_steps=99"]),
            "warmup_steps is 100; there are only 99 steps",
        ),
        (dict(changes=["experiments.*.rope_steps=0"]), "reversal.rope_steps is 0; it must be"),
        (
            dict(changes=["experiments.revresal.steps=9"]),
            "--set has 'experiments.revresal.steps=9'; the experiments are reversal, recall",
        ),
        (dict(changes=["experiments.recall.methods=[rop]"]), "methods has 'rop'; each must be one"),
        (dict(changes=["experiments.recall.reversal.end=true"]), "it must have one of reversal"),
    ],
)
def test_mistakes_are_one_sentence(capsys, options, said):
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: load("laptop", **options))
    text = capsys.readouterr().err
    assert stop.value.code == 2
    assert said in text
    assert text.strip().count("\n") == 0


def test_an_unknown_suite_is_told_which_there_are(tmp_path):
    with pytest.raises(ConfigError, match=r"--suite lapto: .*; suites: .*laptop.*tiny"):
        load("lapto")
    (tmp_path / "x.yaml").write_text("seeds: [0]\n")
    with pytest.raises(ConfigError, match="has no experiments in it"):
        load(str(tmp_path / "x.yaml"))


def test_every_method_has_a_name_of_its_own():
    assert len(set(methods.NAMES)) == len(methods.NAMES) >= 12
