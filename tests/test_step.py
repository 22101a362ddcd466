"""What a training step asks of a device: operations that it dispatches, and reads that wait for their result.

Counted on CPU tensors, where every operation is one call: views and memory without contents are not counted,
our fused operations as one launch each, as the Triton kernels are.
"""

import json
import re
from collections import Counter
from functools import partial
from unittest import mock

import pytest
import torch
from ranks import Replaced, run
from test_seams import arguments, bases, captions  # noqa: F401  (fixtures)
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.dropout

# without contents, or an object made of what is there
FREE = re.compile(r"aten::(empty|new_empty|detach|lift|_unsafe_view|alias|_reshape_alias|set_|resize)")
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


class Counted(TorchDispatchMode):
    """Names of the operations that launch something, and of those that read."""

    def __init__(self):
        super().__init__()
        self.launches, self.reads = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in READS:
            self.reads[name] += 1
        elif not function.is_view and not FREE.match(name):
            self.launches[name] += 1
        return function(*args, **(kwargs or {}))


def counted(file, original, self, step, *args):
    """Run.train_step, whose third step is written to `file`: the first two are read one by one."""
    if step != 2:
        return original(self, step, *args)
    drop, mode = kernels.dropout._drop_numpy, Counted()

    def fused(tensors, *options):
        mode.launches["dropout"] += len(tensors)
        with torch.utils._python_dispatch._disable_current_modes():
            return drop(tensors, *options)

    with mock.patch.object(kernels.dropout, "_drop_numpy", fused), mode:
        result = original(self, step, *args)
    file.write_text(json.dumps({"launches": mode.launches, "reads": mode.reads}))
    return result


def counts(bases, captions, model, out, **options):  # noqa: F811
    argv = arguments(bases, captions, model, out / "run", max_steps=4, save_strategy="no", **options)
    run(argv, 1, Replaced("train.Run.train_step", partial(counted, out / "counts")))
    return json.loads((out / "counts").read_text())


@pytest.mark.parametrize("model", ["qwen_vl", "visualglm", "opt"])
def test_launches_and_reads(bases, captions, tmp_path, model):  # noqa: F811
    found = {}
    for name, options in {"sft": {}, "lora": {"lora": True, "lora_dropout": 0.1}}.items():
        out = tmp_path / name
        out.mkdir()
        found[name] = counts(bases, captions, model, out, **options)
    sft, lora = (sum(found[name]["launches"].values()) for name in ("sft", "lora"))
    print(f"{model}: {sft} launches in a step of sft, {lora} of lora")
    assert lora < 1.5 * sft
    assert found["sft"]["reads"] == found["lora"]["reads"] == {}
