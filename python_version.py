"""Ends the process with one line where Python is too old.

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
