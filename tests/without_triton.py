"""pytest in a process that cannot import Triton: `python tests/without_triton.py -m gpu tests/test_gpu.py`."""

import sys

import pytest

# what makes `import triton` an ImportError
sys.modules["triton"] = None

if __name__ == "__main__":
    raise SystemExit(pytest.main(sys.argv[1:]))
