"""The nouns, file formats and formulas that the four scripts share.

The scripts at the root hold the control flow; nothing in this package does.
"""

import logging
import os

# Both warn at import of things that do not concern us: that torchvision or a CPU kernel package is missing.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
