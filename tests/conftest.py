"""One thread per test process: the nets are tiny, and tests run in parallel processes."""

import torch

torch.set_num_threads(1)
