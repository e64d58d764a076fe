"""Sentences through the same loop: words and padding, splits, and signals that leave padding alone."""

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F

import feedbackward as fb
from feedbackward.cli import main
from feedbackward.errors import ConfigError, DataError
from feedbackward.experiment import nets
from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.config.schema import Changes, TrainConfig
from feedbackward.experiment.data.sentences import fingerprint_sentences, load_sentences
from feedbackward.experiment.nets.sentences import Sentences
from feedbackward.experiment.tasks import TASKS
from feedbackward.experiment.training.run import Run

torch.set_num_threads(1)
KINDS = [False, True]


def small(in_shape, classes, attention=False):
    return Sentences(in_shape, classes, attention=attention, width=8)


def attentive(in_shape, classes):
    return small(in_shape, classes, True)


def write(folder, **rows):
    folder.mkdir(parents=True, exist_ok=True)
    for name, (texts, labels) in rows.items():
        table = pyarrow.table({"text": texts, "label": labels})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet")
    return str(folder)


def praise(count, seed=0):
    """Sentences of a class that one word of each tells."""
    random = np.random.RandomState(seed)
    labels = random.randint(2, size=count)
    filler = ["a", "film", "of", "this", "year"]
    texts = []
    for label in labels:
        words = list(random.choice(filler, random.randint(1, 5)))
        words.insert(random.randint(len(words) + 1), ("bad", "good")[label])
        texts.append(" ".join(words))
    return texts, labels


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "praise", all=praise(300))


def config(name, **changes):
    data = DataConfig(name=name, context=changes.pop("context", 6))
    given = {"task": "sentences", "model": "test_sentences:small", "data": data, "threads": 1}
    given |= {"sites": ["layers.0", "layers.1"], "batch_size": 20}
    return TrainConfig(**given | changes).resolved()


def test_words_become_numbers_and_padding(tmp_path):
    name = write(
        tmp_path / "few",
        train=(["The cat , the CAT .", "dog cat the the"] * 5, [0, 2] * 5),
        validation=(["a cat"] * 2, [1, 0]),
        test=(["", "cat cat cat cat cat cat dog"], [1, 1]),
    )
    data = load_sentences(DataConfig(name=name, context=6))
    words = data.form["words"]
    assert words[:2] == ["[padding]", "[unknown]"]
    # the more frequent a word is in training, the smaller its number
    assert words[2:4] == ["the", "cat"]
    assert set(words[4:]) == {",", ".", "dog"}
    assert data.shape == (6, 7)
    assert (data.classes, data.note) == (["0", "1", "2"], "")
    shown = [[words[i] for i in row] for row in data.test.inputs.tolist()]
    assert shown == [["[unknown]", *["[padding]"] * 5], ["cat"] * 6]
    assert [words[i] for i in data.validation.inputs[0][:3]] == ["[unknown]", "cat", "[padding]"]
    assert data.test.targets.tolist() == [1, 1]
    first = {" ".join(words[i] for i in row) for row in data.train.inputs.tolist()}
    assert first == {"the cat , the cat .", "dog cat the the [padding] [padding]"}


@pytest.mark.parametrize(
    ("parts", "counts", "note"),
    [
        ({"all": 300}, (240, 30, 30), "validation and test"),
        ({"train": 300, "test": 50}, (270, 30, 50), "validation"),
        ({"train": 100, "validation": 20, "test": 50}, (100, 20, 50), ""),
    ],
)
def test_what_is_absent_is_held_out(parts, counts, note, tmp_path):
    texts = {name: [f"{name} {i}" for i in range(count)] for name, count in parts.items()}
    rows = {name: (found, [i % 2 for i in range(len(found))]) for name, found in texts.items()}
    data = load_sentences(DataConfig(name=write(tmp_path / "parts", **rows)))
    splits = (data.train, data.validation, data.test)
    assert tuple(map(len, splits)) == counts
    assert data.note.partition(":")[0] == note
    targets = torch.cat([part.targets for part in splits])
    assert sorted(targets.tolist()) == sorted(y for _, own in rows.values() for y in own)


def test_another_file_has_another_fingerprint(folder, tmp_path):
    before = fingerprint_sentences(DataConfig(name=folder))
    write(tmp_path / "praise", all=praise(300, seed=1))
    assert fingerprint_sentences(DataConfig(name=folder)) != before


@pytest.mark.parametrize("attention", KINDS)
def test_padding_changes_no_score(attention):
    torch.manual_seed(0)
    net = Sentences((9, 12), 3, attention=attention, width=8).double()
    words = torch.randint(1, 12, (1, 5))
    alone = net(words)
    padded = torch.cat([words, torch.zeros(1, 4, dtype=torch.int64)], 1)
    torch.testing.assert_close(net(padded), alone)


@pytest.mark.parametrize("attention", KINDS)
def test_signals_train_words_and_no_padding(attention):
    """Of each sentence without its padding, layer by layer: the gradients of what `B` sends to its words."""
    torch.manual_seed(0)
    net = Sentences((6, 12), 3, attention=attention, width=8).double()
    words = torch.randint(1, 12, (4, 6))
    lengths = (6, 1, 3, 4)
    for row, length in zip(words, lengths, strict=True):
        row[length:] = 0
    labels = torch.tensor([0, 2, 1, 2])
    learner = fb.attach(net, fb.DFA(), example=words, sites=["layers.0", "layers.1"])
    F.cross_entropy(learner(words), labels).backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters() if "head" not in name}
    Bs = [learner.feedback_of(edge).view(3, 6, 8) for edge in learner.graph.edges]
    net.zero_grad()
    with torch.no_grad():
        errors = (net(words).softmax(1) - F.one_hot(labels, 3)) / 4
    for n, length in enumerate(lengths):
        row, there = words[n : n + 1, :length], torch.ones(1, length, dtype=torch.bool)
        h = net.embed(row)
        for layer, B in zip(net.layers, Bs, strict=True):
            out = layer(h, there)
            signal = torch.einsum("c,ctd->td", errors[n], B[:, :length])
            (out[0] * signal).sum().backward()
            h = out.detach()
    for name, p in net.named_parameters():
        if "head" not in name:
            torch.testing.assert_close(found[name], p.grad, msg=name)
    # nothing is learned of padding itself
    table = net.embed.token if attention else net.embed
    assert not found[next(n for n, p in net.named_parameters() if p is table.weight)][0].any()


@pytest.mark.parametrize("model", ["small", "attentive"])
@pytest.mark.parametrize("rule", ["bp", "dfa", "dkp", "dgl"])
def test_trains(rule, model, folder):
    chosen = config(
        folder, rule=rule, model=f"test_sentences:{model}", epochs=8, forward=Changes(lr=0.02)
    )
    run = Run(chosen, load_sentences(chosen.data), torch.device("cpu"))
    for epoch in range(run.epochs):
        for batch in run.loader.epoch(epoch):
            run.step(*batch)
    assert run.evaluate(run.data.test)["accuracy"] > 80


def test_bad_files_are_told(tmp_path, folder):
    with pytest.raises(DataError, match="There is no folder of Parquet files"):
        load_sentences(DataConfig(name=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="data-root"):
        load_sentences(DataConfig(name="sst2"))
    for rows in ((["a", None], [0, 1]), (["a", "b"], [0, -1]), (["a", "b"], [0.5, 1.0])):
        with pytest.raises(DataError, match="must have a text"):
            load_sentences(DataConfig(name=write(tmp_path / "bad", all=rows)))
    (tmp_path / "bad" / "all.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="cannot read"):
        load_sentences(DataConfig(name=str(tmp_path / "bad")))
    with pytest.raises(ConfigError, match="is for images"):
        load_sentences(DataConfig(name=folder, size=4))
    with pytest.raises(ConfigError, match="has no sentences"):
        load_sentences(DataConfig(name=folder, train_limit=0))


def test_command_and_nets(folder, tmp_path, capsys):
    given = ["--task", "sentences", "--data", folder, "--data.context", "6", "--threads", "1"]
    for model in ("sentence_gru", "sentence_transformer"):
        out = str(tmp_path / model)
        rest = ["--model", model, "--epochs", "1", "--no-tensorboard", "--rule", "dkp"]
        assert main(["train", *given, *rest, "--out", out]) == 0
        assert "sentences/s" in capsys.readouterr().out
    assert nets.default_sites("sentence_gru") == ("layers.0", "layers.1")
    assert TASKS["sentences"].kind.measure.key == "accuracy"
