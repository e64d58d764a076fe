"""Texts as byte-pair tokens, texts of the hub with parts of their own, and options that are refused elsewhere."""

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers.decoders import ByteLevel

from feedbackward.errors import ConfigError, DataError
from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.data.dataset import load_data
from feedbackward.experiment.data.text import fingerprint_text, load_text

VERSES = "the cat sat on the mat\nthe dog ate the hat, naïve 猫 ...\n\n"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "verses.txt"
    path.write_text(VERSES * 60, encoding="utf-8")
    return path


def decoded(numbers, classes):
    return ByteLevel().decode([classes[i] for i in numbers.tolist()])


def whole(pairs):
    """What the windows of a split show: they begin where the one before ends."""
    return torch.cat([pairs.inputs[:1, :1].flatten(), pairs.targets.flatten()])


@pytest.mark.parametrize("count", [257, 300, 400])
def test_byte_pairs_are_the_text_again(text, count):
    config = DataConfig(name=str(text), tokens=count, context=4)
    data = load_text(config)
    assert len(data.classes) <= count
    assert len(set(data.classes)) == len(data.classes)
    # as a part begins, so does the text; what is left over at the end may cut a character
    read = VERSES * 60
    ends = [round(len(read) * share) for share in (0.0, 0.9, 0.95)]
    for part, start in zip((data.train, data.validation, data.test), ends, strict=True):
        found = decoded(whole(part), data.classes).rstrip("\ufffd")
        assert read[start:].startswith(found)
        assert len(found) > 50
    assert data.train.inputs.max() < len(data.classes)


def test_more_tokens_make_a_shorter_text_and_none_spans_two_lines(text):
    lengths = []
    for count in (257, 300, 400):
        data = load_text(DataConfig(name=str(text), tokens=count, context=4))
        lengths.append(data.train.targets.numel())
        newline = ByteLevel().decode(["Ċ"])
        assert newline == "\n"
        assert all("Ċ" not in token.rstrip("Ċ") for token in data.classes)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 2 * lengths[-1]


def test_tokens_are_learned_on_what_is_trained_on(tmp_path):
    read = VERSES * 60
    found = []
    for end in ("x", "zebra "):
        path = tmp_path / f"{end.strip()}.txt"
        cut = round(len(read) * 0.9)
        path.write_text(read[:cut] + (end * len(read))[: len(read) - cut], encoding="utf-8")
        found.append(load_text(DataConfig(name=str(path), tokens=320, context=4)))
    assert found[0].classes == found[1].classes
    assert torch.equal(found[0].train.inputs, found[1].train.inputs)
    assert not torch.equal(found[0].test.inputs[:5], found[1].test.inputs[:5])


def parts(folder, **texts):
    folder = folder / "Salesforce/wikitext/wikitext-2-v1"
    folder.mkdir(parents=True)
    for name, lines in texts.items():
        table = pyarrow.table({"text": lines})
        pyarrow.parquet.write_table(table, folder / f"{name}-00000-of-00001.parquet")
    return folder


def test_a_text_of_the_hub_has_parts_of_its_own(tmp_path):
    lines = {
        "train": ["", "abc\n"] * 40,
        "validation": ["bca\n"] * 20,
        "test": ["cab\n", None] * 20,
    }
    folder = parts(tmp_path, **lines)
    config = DataConfig(name="wikitext-2", root=str(tmp_path), context=4)
    data = load_text(config)
    assert (data.name, data.note) == ("wikitext-2", "")
    for part, start in ((data.train, "abc\n"), (data.validation, "bca\n"), (data.test, "cab\n")):
        assert "".join(data.classes[i] for i in part.inputs[0]) == start
    assert (len(data.train), len(data.validation), len(data.test)) == (39, 19, 19)
    before = fingerprint_text(config)
    table = pyarrow.table({"text": ["other\n"] * 9})
    pyarrow.parquet.write_table(table, folder / "train-00000-of-00001.parquet")
    assert fingerprint_text(config) != before


def test_without_a_training_part_the_one_for_validation_is_divided(tmp_path):
    parts(tmp_path, validation=["0123456789"] * 100, test=["0123456789"] * 30)
    data = load_text(DataConfig(name="wikitext-2", root=str(tmp_path), context=9))
    assert "nine tenths of the official validation text" in data.note
    assert (len(data.train), len(data.validation), len(data.test)) == (99, 11, 33)


def test_absent_parts_and_damaged_ones_are_told(tmp_path):
    folder = parts(tmp_path, test=["abc"] * 30)
    config = DataConfig(name="wikitext-2", root=str(tmp_path))
    with pytest.raises(DataError, match="has no text for validation"):
        load_text(config)
    (folder / "validation-00000-of-00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot read"):
        load_text(config)


@pytest.mark.parametrize("count", [0, 256])
def test_fewer_tokens_than_bytes_are_refused(text, count):
    with pytest.raises(ConfigError, match="there are 256 bytes"):
        load_text(DataConfig(name=str(text), tokens=count))


@pytest.mark.parametrize(
    ("option", "message"),
    [({"tokens": 300}, "data.tokens is for texts"), ({"context": 4}, "data.context is for texts")],
)
def test_images_have_neither_tokens_nor_a_context(option, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        load_data(DataConfig(name="fashion-mini", **option))
