"""Which data sets are known, and where the images of a chosen one lie."""

import difflib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from feedbackward.errors import ConfigError, DataError
from feedbackward.experiment.data.folders import Listing, files_below, list_images, printable


@dataclass(frozen=True)
class DatasetSpec:
    """How a data set is laid out.

    `num_classes` is None where the source itself says; `official` holds the published numbers of training
    and test images, so that a partial copy can be named as such; `mode` is Pillow's: "L" gray, "RGB" colour.
    """

    hub_id: str | None
    image: str = "image"
    label: str = "label"
    train: str = "train"
    test: str = "test"
    num_classes: int | None = None
    official: tuple[int, int] | None = None
    mode: str = "RGB"
    note: str = ""


DATASETS: dict[str, DatasetSpec] = {
    "fashion-mini": DatasetSpec(
        None,
        num_classes=10,
        official=(4_000, 1_000),
        mode="L",
        note="the embedded selection of Fashion-MNIST: 400 training and 100 test images of each class",
    ),
    "fashion-mnist": DatasetSpec(
        "zalando-datasets/fashion_mnist", num_classes=10, official=(60_000, 10_000), mode="L"
    ),
    "cifar10": DatasetSpec(
        "uoft-cs/cifar10", image="img", num_classes=10, official=(50_000, 10_000)
    ),
    "cifar100": DatasetSpec(
        "uoft-cs/cifar100",
        image="img",
        label="fine_label",
        num_classes=100,
        official=(50_000, 10_000),
    ),
    "tiny-imagenet": DatasetSpec(
        "zh-plus/tiny-imagenet",
        test="valid",
        num_classes=200,
        official=(100_000, 10_000),
        note="test is the official validation split (the official test labels are not public)",
    ),
}
"""Every data set known by name; any other name is taken as the path of an image folder."""


@dataclass(frozen=True)
class Source:
    """Where the images of one data set come from.

    `kind` is "hub" (no local folder), "parquet" (a folder in the hub's layout) or "images" (a folder of
    image files, which `listing` names). `splits` maps our split names to the source's.
    """

    name: str
    kind: str
    spec: DatasetSpec
    splits: dict[str, str]
    folder: Path | None = None
    listing: Listing | None = None

    def __str__(self) -> str:
        return (
            f"'{self.name}' in {self.folder}"
            if self.folder
            else f"'{self.name}' ({self.spec.hub_id})"
        )

    @cached_property
    def files(self) -> list[Path]:
        """The local files whose change may change what is read, sorted; empty for the hub."""
        if self.folder is None:
            return []
        if self.listing is not None:
            return sorted(path for rows in self.listing.images.values() for path, _ in rows)
        # `datasets` reads the card beside the parquet files too, and follows links
        return sorted(path for path in map(Path, files_below(self.folder)) if path.is_file())

    @property
    def parquet(self) -> list[Path]:
        """Those of `files` that hold images in the hub's form."""
        return [path for path in self.files if path.suffix == ".parquet"]


def find_source(name: str, root: str | None) -> Source:
    """Find a data set of `DATASETS` (in `root`, or on the hub without it) or an image folder.

    Raises ConfigError for an unknown name, DataError for a folder that is missing or laid out otherwise.
    """
    if name in DATASETS:
        return _known(name, root)
    folder = Path(name).expanduser().resolve()
    if folder.is_dir():
        return _image_folder(folder)
    if len(Path(name).parts) > 1:
        raise DataError(
            f"There is no image folder {folder}: check the path, or choose one of {_names()}."
        )
    near = difflib.get_close_matches(name.lower(), DATASETS, n=2, cutoff=0.5)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise ConfigError(
        f"Unknown data set '{name}'{hint}: choose one of {_names()}, or give the path of an image folder "
        "with train/<class>/*.png."
    )


def _names() -> str:
    return ", ".join(DATASETS)


def _known(name: str, root: str | None) -> Source:
    spec = DATASETS[name]
    splits = {"train": spec.train, "test": spec.test}
    if spec.hub_id is None or root is None:
        return Source(name, "hub", spec, splits)
    folder = Path(root).expanduser().absolute() / spec.hub_id
    source = Source(name, "parquet", spec, splits, folder)
    if not source.parquet:
        state = "has no parquet files" if folder.is_dir() else "does not exist"
        raise DataError(
            f"Data set '{name}': {folder} {state}; fetch it with `hf download --repo-type dataset "
            f"{spec.hub_id} --local-dir {folder}`, or correct the data root {root}."
        )
    return source


def _image_folder(folder: Path) -> Source:
    try:
        splits, note = _split_folders(folder), ""
        if "train" not in splits:
            raise DataError(f"Image folder {folder} has no train/: {_instead_of_train(folder)}.")
    except OSError as error:
        raise DataError(f"Image folder {folder} cannot be listed ({error.strerror}).") from error
    if splits.keys() == {"train", "validation"}:
        splits = {"train": splits["train"], "test": splits["validation"]}
        note = f"there is no test folder: test is {splits['test']}/, and held-out images are taken out of train"
    spec = DatasetSpec(None, note=note)
    return Source(folder.name, "images", spec, splits, folder, list_images(folder, splits))


def _instead_of_train(folder: Path) -> str:
    """What to do about a folder without a train split, by what it holds."""
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    wrapped = [
        path for path in inner if any(_split_called(p.name) == "train" for p in path.iterdir())
    ]
    if len(wrapped) == 1:
        return f"did you mean {wrapped[0]}"
    if any(name.endswith(".parquet") for name in files_below(folder)):
        return "it holds parquet files, which are read for known data sets only: give the name of one, and --data-root"
    held = (
        f", where now there are {', '.join(printable(p.name) for p in inner[:3])}" if inner else ""
    )
    return f"put the images in train/<class>/{held}"


# what people call the folders of a split, in any case, alone or before "set", "images" and the like
_SPLIT_NAMES = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "val", "valid", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
_ENDINGS = re.compile(r"[\s_.-]*(sets?|images|imgs|data|split|s)?\s*$")


def _split_folders(folder: Path) -> dict[str, str]:
    """Our name of each split and its folder's. Raises DataError where two folders are the same split."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (split := _split_called(path.name)):
            found.setdefault(split, []).append(path.name)
    chosen = {}
    for split, names in sorted(found.items()):
        # train/ is meant where train_images/ stands beside it
        plain = [name for name in names if name.lower() in _SPLIT_NAMES[split]] or names
        if len(plain) > 1:
            raise DataError(
                f"Image folder {folder} has two folders for the {split} split, {plain[0]}/ and {plain[1]}/: keep one of them."
            )
        chosen[split] = plain[0]
    return chosen


def _split_called(name: str) -> str | None:
    stems = (name.lower(), _ENDINGS.sub("", name.lower()))
    return next((s for s, names in _SPLIT_NAMES.items() if {*stems} & {*names}), None)
