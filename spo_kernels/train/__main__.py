"""`python -m spo_kernels.train`."""

import sys

from spo_kernels.train.cli import main

if __name__ == "__main__":
    sys.exit(main())
