"""The nouns, file formats and formulas that the four scripts share.

The scripts at the root hold the control flow; nothing in this package does.
"""

import logging
import os
import sys

# Both warn at import of things that do not concern us: that torchvision or a CPU kernel package is missing.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Threads that wait busily for the next operation of a CPU slow down all else, the operation itself among it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if sys.platform == "linux":
    # The allocator then grows what it has instead of taking ever more pieces: less lies unused between them.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
