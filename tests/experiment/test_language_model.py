"""Language models through the same loop: the text's split, the loss per character, perplexity, and comparisons by it."""

import json
import math

import pytest
import torch

import feedbackward as fb
from feedbackward.cli import main
from feedbackward.errors import ConfigError, DataError
from feedbackward.experiment import nets
from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.config.schema import Changes, TrainConfig
from feedbackward.experiment.config.tasks import ACCURACY, PERPLEXITY
from feedbackward.experiment.data.splits import PairLoader
from feedbackward.experiment.data.text import load_text
from feedbackward.experiment.grid.candidates import pick
from feedbackward.experiment.report.summary import conclusion, paired, summarise
from feedbackward.experiment.tasks import TASKS
from feedbackward.experiment.training.run import Run

CPU = torch.device("cpu")
torch.set_num_threads(1)


def small(in_shape, classes):
    """A transformer that trains in no time."""
    return nets.transformer.Transformer(in_shape, classes, width=16, depth=2, heads=2)


@pytest.fixture
def text(tmp_path):
    """A file in which every character but the first follows from the one before."""
    path = tmp_path / "cycle.txt"
    path.write_text("abcdefgh" * 150, encoding="utf-8")
    return path


def config(text, **changes):
    data = DataConfig(name=str(text), context=changes.pop("context", 8))
    given = {"task": "language_model", "model": "test_language_model:small", "data": data}
    return TrainConfig(**given | {"threads": 1} | changes).resolved()


def test_split(text):
    data = load_text(DataConfig(name=str(text), context=8))
    assert data.classes == list("abcdefgh")
    assert data.shape == (8,)
    # 1,080 of 1,200 characters make 134 windows of 8 and the character after
    assert (len(data.train), len(data.validation), len(data.test)) == (134, 7, 7)
    whole = torch.arange(1200) % 8
    assert torch.equal(data.train.inputs.flatten(), whole[: 134 * 8])
    assert torch.equal(data.train.targets.flatten(), whole[1 : 134 * 8 + 1])
    assert torch.equal(data.validation.inputs[0], whole[1080:1088])
    assert torch.equal(data.test.inputs[0], whole[1140:1148])


def test_loader_sees_every_sequence_once_and_the_same_after_a_resume(text):
    data = load_text(DataConfig(name=str(text), context=8))
    loader = PairLoader(data.train, 16, seed=3)
    batches = list(loader.epoch(0))
    assert len(batches) == len(loader) == 9
    seen = torch.cat([inputs for inputs, _ in batches])
    assert torch.equal(seen.sort(0).values, data.train.inputs.sort(0).values)
    resumed = next(loader.epoch(0, start=4))
    assert all(torch.equal(a, b) for a, b in zip(resumed, batches[4], strict=True))
    torch.manual_seed(5)
    again = list(PairLoader(data.train, 16, seed=3).epoch(0))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(again, batches, strict=True))


def test_loss_counts_every_character():
    task = TASKS["language_model"]
    output = torch.randn(3, 5, 7, dtype=torch.float64)
    target = torch.randint(7, (3, 5))
    naive = -sum(
        output[n, t].float().log_softmax(0)[target[n, t]].item() for n in range(3) for t in range(5)
    )
    assert task.loss(output, target).item() == pytest.approx(naive / 15, rel=1e-6)
    assert task.loss(output, target, "sum").item() == pytest.approx(naive, rel=1e-6)
    right = sum(output[n, t].argmax() == target[n, t] for n in range(3) for t in range(5))
    assert task.hits(output, target) == right
    assert task.count(target) == 15
    assert task.measures(math.log(5), 20.0)["perplexity"] == pytest.approx(5)


@pytest.mark.parametrize("rule", ["bp", "dfa", "dkp", "dgl", "frozen"])
def test_trains(rule, text):
    """The head alone can learn the cycle, so every rule must; a guess has perplexity 8."""
    chosen = config(text, rule=rule, epochs=2, forward=Changes(lr=0.01))
    run = Run(chosen, load_text(chosen.data), CPU)
    for epoch in range(2):
        for batch in run.loader.epoch(epoch):
            run.step(*batch)
    assert run.position.seen == 2 * 134 * 8
    found = run.evaluate(run.data.validation)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["perplexity"] < 7


def test_evaluation_is_that_of_the_whole_split_at_once(text):
    run = Run(config(text, rule="bp"), load_text(config(text).data), CPU)
    split = run.data.train
    with torch.no_grad():
        output = run.learner.model(split.inputs)
    found = run.evaluate(split)
    whole = torch.nn.functional.cross_entropy(output.flatten(0, 1), split.targets.flatten())
    assert found["loss"] == pytest.approx(whole.item(), rel=1e-5)


def test_command(text, tmp_path, capsys):
    out = tmp_path / "runs"
    shared = ["--task", "language_model", "--data", str(text), "--data.context", "8"]
    shared += ["--model", "test_language_model:small", "--threads", "1", "--no-tensorboard"]
    assert main(["train", *shared, "--rule", "dfa", "--out", str(out / "one")]) == 0
    result = json.loads((out / "one" / "result.json").read_text())
    assert result["test_perplexity"] == pytest.approx(math.exp(result["test_loss"]))
    assert f"test perplexity {result['test_perplexity']:.2f}" in capsys.readouterr().out
    row = json.loads((out / "one" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"validation_perplexity", "train_perplexity", "tokens_per_second"} <= row.keys()
    given = [*shared, "--rules", "bp,frozen", "--seeds", "0,1", "--workers", "1"]
    given += ["--timing-steps", "0", "--probe-every", "0", "--search"]
    given += [
        "--search.lr",
        "0.0001,0.003",
        "--search.feedback-lr",
        "0.003",
        "--search.epochs",
        "1",
    ]
    assert main(["compare", *given, "--out", str(out / "two")]) == 0
    results = json.loads((out / "two" / "results.json").read_text())
    bp = results["rules"][0]
    best = min(bp["search"], key=lambda trial: trial["validation_perplexity"])
    assert bp["rates"]["lr"] == best["lr"]
    assert len(bp["search"]) == 2
    assert "Test perplexity" in (out / "two" / "report.md").read_text()
    assert "test_perplexity" in bp["runs"][0]
    assert "test_accuracy" not in bp["runs"][0]


def _rule(name, values):
    runs = [
        {"seed": s, "status": "done", "measure": "perplexity", "test_perplexity": v}
        for s, v in enumerate(values)
    ]
    return {"rule": name, "label": name.upper(), "runs": runs}


def test_less_perplexity_is_better():
    bp, dfa, frozen = _rule("bp", [5, 6, 7]), _rule("dfa", [7, 8, 9.3]), _rule("frozen", [9, 9, 11])
    results = {"version": 1, "rules": [bp, dfa, frozen], "sites": []}
    row = summarise(results)[1]
    assert row["gap"]["mean"] == pytest.approx(6.3 / 3)
    assert row["frozen"]["mean"] == pytest.approx(4.7 / 3)
    assert paired(bp, dfa)["mean"] > 0
    words = conclusion(results)
    assert words.startswith("DFA reaches perplexity 8.10 (BP perplexity 6.00, gap 2.1")
    assert "it beats the frozen control" in words
    trials = [
        {"lr": lr, "feedback_lr": None, "measure": "perplexity", "validation_perplexity": p}
        for lr, p in ((1.0, 9.0), (2.0, 4.0), (3.0, None))
    ]
    assert pick(trials, "X") == (2.0, None)


def test_measures_in_words():
    assert ACCURACY.in_words(69.44) == "69.4 %"
    assert PERPLEXITY.in_words(5.211) == "perplexity 5.21"
    assert ACCURACY.heading == "Test accuracy (%)"
    assert PERPLEXITY.heading == "Test perplexity"


def test_refused(text, tmp_path):
    with pytest.raises(ConfigError, match="for images"):
        load_text(DataConfig(name=str(text), augment="flip"))
    with pytest.raises(DataError, match="no text file"):
        load_text(DataConfig(name=str(tmp_path / "none.txt")))
    with pytest.raises(ConfigError, match="data-root"):
        load_text(DataConfig(name="tiny-shakespeare"))
    with pytest.raises(DataError, match=r"1,200 characters.*context"):
        load_text(DataConfig(name=str(text), context=64))
    with pytest.raises(ConfigError, match="transformer4"):
        Run(config(text, model="vgg6"), load_text(config(text).data), CPU)
    with pytest.raises(ConfigError, match=r"for task language_model.*vgg6"):
        nets.build("gru", (1, 8, 8), 10)


LANGUAGE = [name for name, net in nets.NETS.items() if net.task == "language_model"]


@pytest.mark.parametrize("name", LANGUAGE)
def test_nets_see_the_past_only(name):
    """Scores of [N, T, classes]; a change of token t moves the scores from t on, and none before."""
    torch.manual_seed(0)
    model = nets.build(name, (9,), 11, task="language_model").double().eval()
    tokens = torch.randint(11, (2, 9))
    other = tokens.clone()
    other[:, 4] = (other[:, 4] + 1) % 11
    with torch.no_grad():
        moved = (model(tokens) - model(other)).abs().amax((0, 2)) > 0
    assert model(tokens).shape == (2, 9, 11)
    assert not moved[:4].any()
    assert moved[4:].all()


@pytest.mark.parametrize("name", LANGUAGE)
def test_default_sites_divide_the_net_into_its_layers(name):
    """Every parameter is in one segment, and each block or recurrent layer in one of its own."""
    model = nets.build(name, (9,), 11, task="language_model")
    sites = nets.default_sites(name)
    learner = fb.attach(model, fb.DFA(), example=torch.randint(11, (2, 9)), sites=sites)
    held = [n for part in (*learner.plan.segments, learner.plan.head) for n in part.parameters]
    assert sorted(held) == sorted(n for n, _ in model.named_parameters())
    for site, segment in zip(learner.sites[1:], learner.plan.segments[1:], strict=True):
        layer = site.name.removesuffix(".steps.0")
        assert all(n.startswith(f"{layer}.") for n in segment.parameters)
        # the feedback is shared by the tokens
        assert site.tokens == 1
    assert {tuple(B.shape) for B in learner.feedback.buffers()} == {(11, model.head.in_features)}


def test_micro_sites_are_those_of_the_paper():
    sites = nets.published_sites("transformer_small")
    assert sites[:3] == ("blocks.0.attended", "blocks.0.ffn.act", "blocks.0")
    model = nets.build("transformer_small", (9,), 11, task="language_model")
    learner = fb.attach(model, fb.DFA(), example=torch.randint(11, (2, 9)), sites=list(sites))
    by_site = {s.site: s.parameters for s in learner.plan.segments}
    assert all(".ffn.into" in n or ".norm2" in n for n in by_site["blocks.2.ffn.act"])
    assert all(".ffn.out" in n for n in by_site["blocks.2"])
