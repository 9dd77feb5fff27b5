"""Shared by the tests and by nbval's kernels."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are for people, not for comparison
