"""What all test files share."""

import os

# Before anything reads them: no progress bars, nothing from the network.
os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}

import torch
from hypothesis import settings

# The same examples on every run: a failure in CI is a failure on every desk.
settings.register_profile("book", derandomize=True, deadline=None)
settings.load_profile("book")
# Small tensors: a second thread costs more than it brings.
torch.set_num_threads(1)
