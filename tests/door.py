"""Feed every tensor argument of every public function with tensors that no kernel can read.

    python tests/door.py [BACKEND ...]

A line before each case, so that a signal can be put down to it; a line "WRONG ..." after one that is neither right nor
refused by a message that names the argument and says what to do.
"""

import faulthandler
import re
import sys
import warnings

import torch
from door_calls import Door, all_doors
from door_kinds import Kind, Unfit, kinds
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def main(backends: list[str]) -> None:
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    checked = 0
    known = kinds()
    for backend in backends:
        for door in all_doors(backend):
            announce(f"{door.name}: plain")
            expected = door.run(door.fresh())
            announce(f"{door.name}: all FakeTensors")
            report(door, "all FakeTensors", fake_shapes(door, expected))
            for argument in door.arguments:
                for kind in known:
                    announce(f"{door.name}: {argument} as {kind.name}")
                    report(door, f"{argument} as {kind.name}", judge(door, argument, kind, expected))
                    checked += 1
    print(f"checked {checked} cases")


def announce(case: str) -> None:
    print(f"case {case}", flush=True)


def report(door: Door, case: str, wrong: str | None) -> None:
    if wrong is not None:
        print(f"WRONG {door.name}: {case}: {wrong}", flush=True)


def judge(door: Door, argument: str, kind: Kind, expected: Tensor) -> str | None:
    """What is wrong with the outcome, or None."""
    given = door.fresh()
    try:
        found = kind.apply(lambda made: door.run(given | {argument: made}), given[argument])
    except Unfit:
        return None
    except Exception as error:
        text = " ".join(str(error).split())
        named = re.search(rf"(?<![\w.]){re.escape(argument)}(?![\w\[])", text)
        if named and re.search(kind.remedy, text):
            return None
        return f"refused without {'a remedy' if named else 'its name'}: {type(error).__name__}: {text[:200]}"
    return None if same(found, expected) else f"returned {found}, expected {expected}"


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal values in a plain tensor."""
    readable = type(found) is Tensor or type(found).__torch_dispatch__ is Tensor.__torch_dispatch__
    if not readable or found.device.type == "meta":
        return False
    return torch.allclose(found.as_subclass(Tensor), expected, rtol=1e-4, atol=1e-5)


def fake_shapes(door: Door, expected: Tensor) -> str | None:
    """FakeTensors have shapes and dtypes alone: those of results and gradients must be right."""
    with FakeTensorMode() as mode:
        given = {name: mode.from_tensor(value) for name, value in door.arguments.items()}
        try:
            found = door.run(given)
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if not isinstance(found, FakeTensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
            return f"returned {found}, expected the shape and dtype of {expected}"
        for name, value in given.items():
            if value.requires_grad and (value.grad is None or value.grad.shape != value.shape):
                return f"{name}.grad is {value.grad}"
    return None


if __name__ == "__main__":
    main(sys.argv[1:] or ["torch", "cpp"])
