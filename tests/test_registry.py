"""The choice of a backend, and what a fifth one takes."""

import pytest
import torch

from spo_kernels import backend_info, linear_logprob
from spo_kernels.backends import registry
from spo_kernels.backends.registration import BackendStatus, Registration
from spo_kernels.backends.torch_backend import TorchBackend

CPU = torch.device("cpu")
OURS = dict(registry.REGISTRATIONS)


class Counting(TorchBackend):
    """A backend that a user might add: another's passes, counted."""

    name = "counting"

    def __init__(self):
        super().__init__()
        self.passes = []

    def tile_stats(self, tile, stats, **extra):
        self.passes.append("stats")
        super().tile_stats(tile, stats, **extra)

    def tile_grad(self, tile, grads):
        self.passes.append("grad")
        super().tile_grad(tile, grads)


@pytest.fixture
def fifth(monkeypatch):
    """Registers it, as its line in the registry would."""

    def register(automatic_on=(), reason=None):
        registration = Registration(
            name="counting",
            automatic_on=automatic_on,
            status=lambda: BackendStatus(reason is None, reason or "counts"),
            why_not=lambda device, dtype: reason,
            load=Counting,
        )
        monkeypatch.setattr(registry, "REGISTRATIONS", {"counting": registration, **OURS})

    yield register
    registry.load_backend.cache_clear()


def test_a_fifth_backend_is_one_registration(fifth):
    """It is chosen by name, gives the results, and is told of by `backend_info`."""
    fifth()
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(33, 8, requires_grad=True)
    labels = torch.tensor([1, 2, -100, 32, 0])
    linear_logprob(hidden, weight, labels, backend="counting").sum().backward()
    assert set(registry.load_backend("counting").passes) == {"stats", "grad"}
    expected = torch.autograd.grad(linear_logprob(hidden, weight, labels, backend="torch").sum(), [hidden, weight])
    assert torch.equal(hidden.grad, expected[0]) and torch.equal(weight.grad, expected[1])
    assert backend_info()["counting"] == BackendStatus(True, "counts")
    assert not registry.has_pair_loss("counting")


def test_it_is_an_automatic_choice_only_where_it_says_so(fifth):
    fifth()
    assert registry.choose_backend(None, CPU, torch.float32) != "counting"
    fifth(automatic_on=("cpu",))
    assert registry.choose_backend(None, CPU, torch.float32) == "counting"
    fifth(automatic_on=("cpu",), reason="it has no licence")
    assert registry.choose_backend(None, CPU, torch.float32) != "counting"
    with pytest.raises(RuntimeError, match=r"backend = 'counting' cannot be used: it has no licence"):
        registry.choose_backend("counting", CPU, torch.float32)


def test_torch_serves_what_no_other_does():
    assert registry.choose_backend(None, CPU, torch.float64) == "torch"
    assert registry.choose_backend(None, torch.device("meta"), torch.float32) == "torch"


def test_names_are_those_of_the_backends():
    for name, status in backend_info().items():
        assert registry.REGISTRATIONS[name].name == name
        if status.available:
            assert registry.load_backend(name).name == name


def test_a_backend_without_the_pair_loss_says_so():
    with pytest.raises(NotImplementedError, match="the torch backend has no kernel for the pair loss"):
        TorchBackend().pair_loss(None, None, 1.0)
