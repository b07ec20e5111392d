"""The GPU kernels on CPU tensors: Triton's in its interpreter, CUDA's emulated."""

import importlib.util

import pytest


@pytest.fixture(scope="session", autouse=True)
def patched_once_a_launch():
    """Triton's interpreter patches `triton.language` at each call of a device function: a third of its time.

    The launch around the call has done so, and what has been patched is no builtin any more.
    """
    interpreter = None
    if importlib.util.find_spec("triton") is not None:
        from triton.runtime import interpreter
    # no public name, which another version may not have
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:
        yield
        return
    import triton.language as tl

    def patch_what_is_not(function):
        known = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        return patch(function) if any(tl.core.is_builtin(lang.load) for lang in known) else None

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", patch_what_is_not)
        yield


class TritonKernels:
    """The launchers of spo_kernels.backends.triton; `launch` is (unroll, lanes, num_warps)."""

    def tile_stats(self, *arguments, launch=None, **options):
        from spo_kernels.backends.triton.tile_stats import tile_stats

        tile_stats(*arguments, launch=_launch(launch), **options)

    def tile_grad(self, *arguments, launch=None):
        from spo_kernels.backends.triton.tile_grad import tile_grad

        tile_grad(*arguments, launch=_launch(launch))

    def scale_rows(self, *arguments, launch=None):
        from spo_kernels.backends.triton.scale_rows import scale_rows

        scale_rows(*arguments, launch=_launch(launch))

    def pair_loss(self, *arguments, **options):
        from spo_kernels.backends.triton.pair_loss import pair_loss

        return pair_loss(*arguments, **options)


def _launch(numbers):
    from spo_kernels.backends.triton.config import Launch

    return None if numbers is None else Launch(*numbers)


class CudaKernels:
    """The same from csrc/cuda, which choose their own launches."""

    def __init__(self, backend):
        self._backend = backend
        self.pair_loss = backend.pair_loss

    def tile_stats(self, *arguments, launch=None, **options):
        self._backend.tile_stats(*arguments, **options)

    def tile_grad(self, *arguments, launch=None):
        self._backend.tile_grad(*arguments)

    def scale_rows(self, *arguments, launch=None):
        self._backend.scale_rows(*arguments)


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """Each GPU backend by name, able to run here; torch where a test asks for it."""
    if request.param == "cuda":
        request.getfixturevalue("emulated_cuda")
    elif request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return request.param


@pytest.fixture
def kernels(request, backend):
    """Its kernels."""
    return TritonKernels() if backend == "triton" else CudaKernels(request.getfixturevalue("emulated_cuda"))
