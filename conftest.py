"""Shared by the tests and by nbval's kernels."""

import importlib.util
import os
import signal

os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are for people, not for comparison
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs behind it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # some tests press Ctrl-C

if importlib.util.find_spec("executorch") is None:  # no wheel for Macs with Intel's processors
    collect_ignore = ["companion/formats/executorch"]  # whose example writes a file and reads it
