"""Data sets: found, decoded once, cached, and served in batches."""

from feedbackward.experiment.data.dataset import Data, DataConfig, Images, Loader, load_data
from feedbackward.experiment.data.sources import DATASETS

__all__ = ["DATASETS", "Data", "DataConfig", "Images", "Loader", "load_data"]
