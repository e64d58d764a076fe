"""The configuration: what a recipe, a rule and the user each decide, and what is refused."""

import itertools
from dataclasses import replace

import pytest
import yaml

from feedbackward.errors import ConfigError
from feedbackward.experiment.config import recipes
from feedbackward.experiment.config.arguments import parse
from feedbackward.experiment.config.files import (
    differences,
    from_dict,
    read_yaml,
    to_dict,
    write_yaml,
)
from feedbackward.experiment.config.options import SHIPPED
from feedbackward.experiment.config.recipes import Optimizer, Rates, Recipe
from feedbackward.experiment.config.schema import (
    Changes,
    CompareConfig,
    RuleEntry,
    Search,
    TrainConfig,
)
from feedbackward.experiment.data.dataset import DataConfig
from feedbackward.experiment.grid.candidates import pick, trial_rates


def flags(*arguments, kind=TrainConfig):
    return parse(kind, arguments, "train")


@pytest.fixture
def rated(monkeypatch):
    """A recipe with its own rates for one rule."""
    recipe = Recipe(
        "test", 100, 10, Optimizer(lr=0.02), rates={"dkp": Rates(lr=0.05, feedback_lr=0.005)}
    )
    monkeypatch.setitem(recipes.RECIPES, "rated", recipe)


def test_the_published_recipe_is_the_authors():
    config = TrainConfig(recipe="published").resolved()
    assert (config.batch_size, config.epochs) == (50, 50)
    forward, feedback = config.forward, config.feedback
    assert (forward.name, forward.lr, forward.momentum, forward.nesterov) == (
        "sgd",
        5e-4,
        0.9,
        True,
    )
    assert (forward.weight_decay, forward.schedule) == (1e-6, "constant")
    assert (feedback.name, feedback.lr, feedback.weight_decay) == ("adam", 1e-4, 1e-6)
    assert (feedback.schedule, feedback.gamma) == ("step", 0.8)


def test_by_default_feedback_is_updated_as_the_weights_are():
    config = TrainConfig(rule="kp", forward=Changes(lr=0.3, weight_decay=0.1)).resolved()
    assert config.feedback == config.forward
    assert config.feedback.lr == 0.3
    own = TrainConfig(forward=Changes(lr=0.3), feedback=Changes(lr=0.01)).resolved()
    assert (own.forward.lr, own.feedback.lr) == (0.3, 0.01)
    assert own.feedback.weight_decay == own.forward.weight_decay


@pytest.mark.usefixtures("rated")
def test_a_rules_own_rates_yield_to_the_users():
    assert TrainConfig(recipe="rated", rule="dfa").resolved().forward.lr == 0.02
    own = TrainConfig(recipe="rated", rule="dkp").resolved()
    assert (own.forward.lr, own.feedback.lr) == (0.05, 0.005)
    given = TrainConfig(recipe="rated", rule="dkp", forward=Changes(lr=0.1)).resolved()
    assert (given.forward.lr, given.feedback.lr) == (0.1, 0.005)


@pytest.mark.usefixtures("rated")
def test_a_resolved_config_stands_for_itself(tmp_path):
    for config in (
        TrainConfig(recipe="rated"),
        TrainConfig(recipe="published", rule_options={"center": True}),
    ):
        resolved = config.resolved()
        assert resolved.resolved() == resolved
        (tmp_path / "config.yaml").write_text(write_yaml(resolved))
        read = from_dict(TrainConfig, read_yaml(tmp_path / "config.yaml"))
        assert read == resolved
        assert flags("--config", str(tmp_path / "config.yaml")).resolved() == resolved
    compare = CompareConfig(
        rules=["bp", RuleEntry(rule="dkp", options={"center": True}, lr=0.1)]
    ).resolved()
    assert from_dict(CompareConfig, yaml.safe_load(write_yaml(compare))) == compare
    assert compare.resolved() == compare


def test_every_shipped_config_is_valid():
    files = list(SHIPPED.glob("*.yaml"))
    assert SHIPPED / "demo.yaml" in files
    for file in files:
        if "\nsections:" in file.read_text():  # a grid: test_grid has them
            continue
        kind = TrainConfig if "\nrule:" in file.read_text() else CompareConfig
        flags("--config", file.stem, kind=kind).resolved()


def test_flags_win_over_the_file_whatever_their_order(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("epochs: 3\nmodel: mlp\nforward: {lr: 0.1, momentum: 0.5}\n")
    for order in (["--config", str(file), "--lr", "0.2"], ["--lr", "0.2", "--config", str(file)]):
        config = flags(*order)
        assert (config.epochs, config.model) == (3, "mlp")
        assert config.forward == Changes(lr=0.2, momentum=0.5)


def test_short_flags_switches_and_lists():
    config = flags(
        "--data", "cifar10", "--data-root", "/d", "--feedback-lr", "1e-3", "--resume", "--no-tensorboard",
        "--sites", "a,b", "--rule-options.center", "true", "--batch_size=7", "--no-norm", "--overwrite", "false",
    )  # fmt: skip
    assert config.data == DataConfig(name="cifar10", root="/d")
    assert config.feedback == Changes(lr=1e-3)
    assert (config.resume, config.tensorboard, config.norm, config.overwrite) == (
        True,
        False,
        False,
        False,
    )
    assert config.sites == ["a", "b"]
    assert config.rule_options == {"center": True}
    assert config.batch_size == 7
    assert flags("--sites", "layers").sites == "layers"
    for numbered in ("3,8", "3, 8", "[3,8]", '["3", 8]'):  # modules of a Sequential
        assert flags("--sites", numbered).sites == ["3", "8"]
    assert flags("--seeds", "0,1", "--rules", "bp,dkp", kind=CompareConfig).seeds == [0, 1]
    for rates in ("0.1,0.2", "[0.1, 0.2]"):  # also inside another option
        given = flags("--rules", "bp", "--search.lr", rates, kind=CompareConfig)
        assert given.search.lr == [0.1, 0.2]
    assert flags("--rules", "dkp", kind=CompareConfig).rules == ["dkp"]
    assert flags("--search", "--search.lr", "0.1,0.2", kind=CompareConfig).search == Search(
        run=True, lr=[0.1, 0.2]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modle", "vgg6"], "unknown option --modle: did you mean --model"),
        (["--weight-decay", "1"], "did you mean --forward.weight-decay or --feedback.weight-decay"),
        (["--zzzzzz", "1"], "unknown option --zzzzzz: see --help"),
        (["--epochs"], "--epochs needs a value"),
        (["--epochs", "--seed", "1"], "--epochs needs a value"),
        (["--epochs", "many"], "--epochs: .*many"),
        (["--precision", "fp8"], "--precision: .*fp8"),
        (["--forward.schedule", "linear"], "--forward.schedule: .*linear"),
        (["vgg6"], "unexpected argument 'vgg6'"),
        (["--overwrite=maybe"], "--overwrite: expected no value, or true or false, not maybe"),
        (["--forward.momentum", "x"], "--forward.momentum: expected a number, not x"),
        (["--config", "no.yaml"], "no config file no.yaml: .*demo"),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        flags(*arguments)
    assert "\n" not in str(caught.value)


def test_wrong_lists_and_files_of_another_command_are_refused(tmp_path):
    for text, message in (
        ("[bp,{rule: dfa, lable: x}]", r"unknown key 'rules.lable': did you mean 'label'"),
        ("[bp,{rule: dfa", "--rules .*no valid YAML"),
    ):
        with pytest.raises(ConfigError, match=message):
            flags("--rules", text, kind=CompareConfig)
    file = tmp_path / "a.yaml"
    file.write_text("rules: [bp]")
    with pytest.raises(ConfigError, match=f"feedbackward compare --config {file}"):
        flags("--config", str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown key 'epoch': did you mean 'epochs'"),
        ("lr: 0.1", "unknown key 'lr': did you mean 'forward.lr' or 'feedback.lr'"),
        ("data: {nmae: cifar10}", "unknown key 'data.nmae': did you mean 'name'"),
        ("- 1", "must hold 'key: value' lines, not a list"),
        ("a: [", "cannot read the config file"),
        ("epochs: many", "epochs"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(tmp_path, text, message):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        flags("--config", str(file))
    file.write_text("rules: [{rul: bp}]")
    with pytest.raises(ConfigError, match=r"unknown key 'rules.rul': did you mean 'rule'"):
        flags("--config", str(file), kind=CompareConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "publisched"}, "unknown recipe 'publisched': did you mean 'published'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"forward": Changes(lr=0.0)}, "forward.lr is 0"),
        ({"feedback": Changes(lr=-1.0)}, "feedback.lr is -1"),
        ({"forward": Changes(lr=float("inf"))}, "finite"),
        ({"forward": Changes(lr=float("nan"))}, "forward.lr is nan"),
        ({"forward": Changes(clip=-1.0)}, "forward.clip is -1"),
        ({"forward": Changes(momentum=0.0)}, "nesterov needs forward.momentum"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes).resolved()


def test_comparisons_that_make_no_sense_are_refused():
    for wrong in ({"rules": []}, {"seeds": []}, {"seeds": [1, 1]}, {"rules": ["bp", "bp"]}):
        with pytest.raises(ConfigError, match="at least one, and none twice"):
            CompareConfig(**wrong).resolved()
    with pytest.raises(ConfigError, match="search needs"):
        CompareConfig(search=Search(run=True, lr=[])).resolved()


def test_a_comparisons_cells_share_everything_but_rule_seed_and_rates():
    compare = CompareConfig(
        model="mlp", epochs=4, rules=["bp", RuleEntry(rule="dkp", lr=0.1, feedback_lr=0.2)]
    )
    first, second = (compare.cell(entry, seed=5).resolved() for entry in compare.entries())
    found = {d.split(":")[0] for d in differences(to_dict(first), to_dict(second))}
    assert found == {"out", "rule", "forward.lr", "feedback.lr"}
    assert (second.forward.lr, second.feedback.lr, second.seed) == (0.1, 0.2, 5)
    assert (
        replace(first, rule="dkp", seed=6, out=None).resolved().out
        == "runs/mlp-fashion-mini-dkp-s6"
    )


def test_every_rule_gets_equal_trials():
    search = Search(lr=[0.01, 0.1], feedback_lr=[0.001, 0.01, 0.1])
    learned, fixed = trial_rates(search, True), trial_rates(search, False)
    assert len(set(learned)) == len(set(fixed)) == 6
    assert {lr for lr, _ in learned} == {0.01, 0.1}
    rates = [lr for lr, feedback_lr in fixed if feedback_lr is None]
    assert rates[0] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.1)
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([10 ** (1 / 5)] * 5)


def test_a_single_rate_is_tried_once():
    assert trial_rates(Search(lr=[0.1], feedback_lr=[0.1, 0.2]), False) == [
        (pytest.approx(0.1), None)
    ]


def test_the_best_finished_trial_is_picked():
    rows = [(0.1, 80.0), (0.2, 85.0), (0.3, 85.0), (0.4, None)]
    trials = [{"lr": lr, "feedback_lr": None, "validation_accuracy": found} for lr, found in rows]
    assert pick(trials, "BP") == (0.2, None)
    with pytest.raises(Exception, match="every trial of BP diverged"):
        pick(trials[3:], "BP")
