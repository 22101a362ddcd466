"""A device that is not there: tensors on it compute as on the CPU, and say so where a GPU would stumble.

    with Device() as device:
        model.to_device, batches ...        # tensors of torch.device("meta"), which stands for the device
    device.copies                           # (bytes, dtype) of each copy from the host

RuntimeError where an operation has tensors of both kinds, or where the host would have to wait for a value:
`item`, `tolist`, `nonzero`, a mask as an index, `repeat_interleave` of unknown length, a copy to the host.
Numbers of one element (0-dim host tensors) may stand beside a device's, as on a GPU. With reads=True copies
to the host, and single values, are counted instead.

`device.capture(run)` stands for a CUDA graph: what the device is told to do inside is written down, and
`replay` does it again to the same memory. RuntimeError for a read or a copy from the host inside.
"""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

META = torch.device("meta")
aten = torch.ops.aten
WAITS = {  # operations whose result's shape, or whose caller, needs a value
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.bincount.default,
}


class OnDevice(torch.Tensor):
    """A tensor of the device; `held` has its values."""

    is_meta = False  # it has values

    @staticmethod
    def __new__(cls, real: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=META,
        )

    def __init__(self, real: torch.Tensor):
        self.held = real

    def tolist(self):  # which torch has for no subclass
        return self.cpu().tolist()

    def __repr__(self):
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} outside of the device's with block")


def memory_of(*values) -> set[int]:
    """Where their tensors lie."""
    tensors = [x for x in tree_flatten(values)[0] if isinstance(x, torch.Tensor)]
    return {(x.held if isinstance(x, OnDevice) else x).untyped_storage().data_ptr() for x in tensors}


class Tape(list):
    """(function, arguments, new results) of each operation of the device, on the tensors that were there."""

    def __init__(self):
        super().__init__()
        self.given: set[int] = set()  # memory that was there before
        self.made: set[int] = set()
        self.replays = 0

    def add(self, function, args, kwargs, out) -> None:
        had = memory_of(args, kwargs)
        self.given |= had - self.made
        self.made |= memory_of(out) - self.given
        # A view, or what was changed in place, is there already.
        self.append(
            (function, args, kwargs, [None if memory_of(x) <= had else x for x in tree_flatten(out)[0]])
        )

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, made in self:
            again = function(*args, **kwargs)
            for old, new in zip(made, again if len(made) > 1 else [again], strict=True):
                if old is not None:
                    old.copy_(new)


class Device(TorchDispatchMode):
    """Within it the device is there. Meta tensors know no autocast, so it is off."""

    def __init__(self, reads: bool = False):
        super().__init__()
        self.copies: list[tuple[int, torch.dtype]] = []
        self.operations, self.reads_allowed, self.reads = 0, reads, 0
        self.tape: Tape | None = None
        self.tapes: list[Tape] = []

    def capture(self, run):
        """As decode_graph.cuda_capture()'s."""
        run()  # there too it is not captured the first time
        self.tape, copies = Tape(), len(self.copies)
        try:
            run()
            if len(self.copies) > copies:
                raise RuntimeError("a copy from the host inside a capture")
            self.tapes.append(self.tape)
        finally:
            self.tape = None
        return self.tapes[-1].replay

    def read(self, what: str) -> None:
        """A value that the host waits for."""
        if not self.reads_allowed or self.tape is not None:
            raise RuntimeError(what)
        self.reads += 1

    def __enter__(self):
        self.off = contextlib.ExitStack()
        self.off.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda *_: False))
        self.off.enter_context(
            mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        )
        made = torch.tensor  # which makes and copies below every mode
        there = lambda data, *, device=None, **options: made(data, **options).to(device or "cpu")  # noqa: E731
        self.off.enter_context(mock.patch.object(torch, "tensor", there))
        return super().__enter__()

    def __exit__(self, *error):
        self.off.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnDevice)]
        made_there = kwargs.get("device") is not None and torch.device(kwargs["device"]) == META
        if not ours and not made_there:
            return function(*args, **kwargs)
        self.operations += 1
        real_args, real_kwargs = tree_map_only(OnDevice, lambda x: x.held, (args, kwargs))
        if function is aten._to_copy.default:
            if ours and "device" in kwargs and not made_there:
                self.read(f"a copy of {ours[0]} to the host: it waits for the device")
                return function(*real_args, **real_kwargs)
            if not ours:
                self.copies.append((args[0].nbytes, args[0].dtype))
            if made_there:
                real_kwargs["device"] = "cpu"
            real_kwargs.pop("non_blocking", None)
            return OnDevice(self.run(function, real_args, real_kwargs))
        if function is aten.copy_.default and len(ours) == 1:
            if not isinstance(args[0], OnDevice):
                raise RuntimeError(f"a copy of {ours[0]} to the host: it waits for the device")
            self.copies.append((args[1].nbytes, args[1].dtype))
        elif strangers := [x for x in tensors if not isinstance(x, OnDevice) and (x.ndim or x.numel() != 1)]:
            raise RuntimeError(f"{function}: tensors of the device and of the host {strangers[0].shape}")
        self.refuse_waits(function, args, kwargs)
        if made_there:
            real_kwargs["device"] = "cpu"
        out = self.run(function, real_args, real_kwargs)
        if function._schema.is_mutable and not function._schema.name.startswith("aten::_fused"):
            kinds = [r.alias_info is not None and r.alias_info.is_write for r in function._schema.returns]
            if kinds and all(kinds):
                return args[0] if "out" not in kwargs else kwargs["out"]
        return tree_map_only(torch.Tensor, OnDevice, out)

    def run(self, function, args, kwargs):
        out = function(*args, **kwargs)
        if self.tape is not None:
            self.tape.add(function, args, kwargs, out)
        return out

    def refuse_waits(self, function, args, kwargs) -> None:
        masks = function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        unknown = function is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        if function in WAITS or masks or unknown:
            self.read(f"{function}: the host waits for a value of the device")


def move(module: torch.nn.Module) -> None:
    """Parameters and buffers, in place; tied ones stay tied."""
    moved = {}
    for owner in module.modules():
        for name, p in owner._parameters.items():
            if p is not None:
                if id(p) not in moved:
                    moved[id(p)] = p, torch.nn.Parameter(OnDevice(p.detach()), requires_grad=p.requires_grad)
                owner._parameters[name] = moved[id(p)][1]
        for name, b in owner._buffers.items():
            if b is not None:
                owner._buffers[name] = OnDevice(b)
