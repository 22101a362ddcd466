"""Ends the process with one line where Python is too old; imports torch in the shorter way.

Every script imports this first, before what needs a newer Python; this file is written for Python 3.6.
"""

import sys

OLDEST = (3, 11)
if sys.version_info < OLDEST:
    sys.exit(
        "error: this needs Python {}.{} or newer, and {} is {}.{}; start it with a newer python".format(
            *OLDEST + (sys.executable,) + sys.version_info[:2]
        )
    )

import gc  # noqa: E402

# torch brings hundreds of thousands of objects that stay: to look for garbage among them, at the import, in
# later collections and at the end, takes 0.4 s of CPU time.
gc.disable()
import torch  # noqa: E402, F401

gc.freeze()
gc.enable()
