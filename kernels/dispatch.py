"""Which implementation an operation runs: its Triton kernel or plain PyTorch. Chosen once, at start-up, by
`use`.

    use("auto")    Triton for tensors on a GPU it compiles for, plain PyTorch elsewhere
    use("triton")  Triton, or an error
    use("ref")     plain PyTorch

Without a GPU the kernels run in Triton's interpreter (slow: for tests) if TRITON_INTERPRET=1 is set before
the start.
"""

import contextlib
import functools
import os
import sys
import types

import torch
from torch import Tensor

try:
    # A torch without a GPU's code runs no kernel, unless the interpreter is asked for; whoever compiles for
    # another machine has imported Triton before.
    if not (
        torch.version.cuda or torch.version.hip or "TRITON_INTERPRET" in os.environ or "triton" in sys.modules
    ):
        raise ImportError
    import triton
    import triton.language as tl
    from triton import jit

    INTERPRETER = bool(triton.knobs.runtime.interpret)
except ImportError:
    # Not made for this platform: the kernels below their references are then plain functions, never called.
    triton, tl, INTERPRETER = None, types.SimpleNamespace(constexpr=None), False

    def jit(function=None, **_):
        return function or jit


# dots of fp32 tiles: three TF32 products, as exact as fp32 and on tensor cores, which AMD's compiler has not
FP32_DOTS = "tf32x3" if torch.version.hip is None else "ieee"
IMPLS = ("auto", "triton", "ref")
default = "auto"


@functools.cache  # asked in every operation
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def problem(device: torch.device) -> str | None:
    """Why Triton cannot run on tensors of this device; None where it can."""
    if INTERPRETER:
        return None
    if device.type != "cuda":
        return f"there is no GPU (the device is {device.type})"
    if triton is None:
        return "the package triton is not installed"
    if torch.version.hip is None and capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def use(impl: str, device: torch.device) -> str:
    """Sets what impl="auto" means from now on; returns what runs, in words. Raises ValueError where it
    cannot."""
    global default
    # fp32 means fp32: cuDNN's convolutions would be TF32 by default, with 10 bits of the mantissa
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}; expected one of {', '.join(IMPLS)}")
    reason = problem(device)
    if impl == "triton" and reason:
        raise ValueError(f"Triton kernels are forced, but {reason}; use auto or false")
    default = impl
    if impl == "ref" or reason:
        return f"plain PyTorch ({'as asked' if impl == 'ref' else reason})"
    where = "in the interpreter" if INTERPRETER else f"on {torch.cuda.get_device_name(device)}"
    return f"Triton {triton.__version__} {where}"


def use_flash_attention(setting: str | bool, device: torch.device | str) -> str:
    """`use` by the key of that name: "auto", True or "true" (Triton or an error), False or "false" (plain
    PyTorch)."""
    try:
        impl = {"auto": "auto", "true": "triton", "false": "ref"}[str(setting).lower()]
        return use(impl, torch.device(device))
    except ValueError as e:
        raise ValueError(f"use_flash_attention={setting}: {e}") from None


def use_triton(impl: str, x: Tensor) -> bool:
    """Whether an operation called with `impl` on tensor x runs its kernel."""
    if impl == "auto":
        impl = default
    if impl == "ref":
        return False
    if impl == "auto":
        return x.device.type == "cuda" and problem(x.device) is None
    if reason := problem(x.device):
        raise ValueError(f'impl="triton", but {reason}')
    return True


pretended: torch.dtype | None = None  # what estimate.py has tensors without memory computed in


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes products in, None outside of it."""
    if device.type == "meta":  # which torch's own knows not
        return pretended
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def without_autocast(device: torch.device):
    """A context in which operations take their operands as they are; shapes alone have no autocast to end."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def architecture(device: torch.device) -> str:
    """The family of tile sizes: "sm_90" (228 KB of shared memory), or "sm_80", which fits sm_86 and sm_89
    too."""
    hopper = device.type == "cuda" and torch.version.hip is None and capability(device)[0] >= 9
    return "sm_90" if hopper else "sm_80"
