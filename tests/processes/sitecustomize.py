"""Python runs this first in each process that a test starts: bitsandbytes is not there, as for most users.

diffusers would import it, which takes a second of each of them.
"""

import sys


sys.modules["bitsandbytes"] = None
