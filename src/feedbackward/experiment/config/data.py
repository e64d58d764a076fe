"""Which data a run or a comparison uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
        name: fashion-mini (embedded), fashion-mnist, cifar10, cifar100, tiny-imagenet, or the path of an image
            folder; for a language model tiny-shakespeare, wikitext-2, or the path of a text file; for node classification cora,
            citeseer or amazon-photo; for music jsb-chorales, nottingham, musedata or piano-midi; or the path of an .npz
            file like these; for regression picture (embedded), or the path of an image; for
            sentences sst2, trec6, mr, subj, or a folder of Parquet files; for recommendation clicks
            (embedded), or the path of an .npz file with fields and clicks.
        root: folder with data sets in the hub's layout, read offline; without it they come from the hub.
        train_limit: use at most so many training images (or sequences, nodes, pixels, impressions).
        validation: held-out images taken from train; by default 5,000, or 1/8 of a smaller training set.
        test_limit: use at most so many test images.
        classes: keep the first so many classes only.
        size: resize the images to size x size pixels when decoding; the picture of a regression has 64.
        augment: none, flip, crop or crop-flip, applied to training batches; or your own transform of an image, as
            package.module:name, for example torchvision.transforms.v2:TrivialAugmentWide.
        tokens: read a text as so many different byte-pair tokens; by default as characters.
        context: tokens in a sequence of a text, by default 64; words of a sentence, by default 64; or frames in a
            piece of music, by default all.
    """

    name: str = "fashion-mini"
    root: str | None = None
    train_limit: int | None = None
    validation: int | None = None
    test_limit: int | None = None
    classes: int | None = None
    size: int | None = None
    augment: str = "none"
    tokens: int | None = None
    context: int | None = None
