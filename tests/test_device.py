"""What a GPU would stumble over, shown on a stand-in (standin.py): a step waits for nothing that the device
computes, mixes no tensor of the host with its own, and its batches are one copy a dtype."""

import contextlib
from dataclasses import fields
from types import SimpleNamespace
from unittest import mock

import pytest
import test_blip2_train as blip2_train
import torch
from cells import slow
from standin import META, Device, OnDevice, move
from torch.distributed.utils import _to_kwargs

import data
import parallel
import train
import vlm
from build import build, model_file
from config import parse_config

CASES = {
    "qwen sft": ["--model", "qwen_vl"],
    "qwen lora": ["--model", "qwen_vl", "--lora"],
    "qwen image": ["--model", "qwen_vl", "--freeze_exclude", "*visual*", "--freeze_include", "*"],
    "blip2 sft": ["--model", "blip2"],
    "blip2 lora": ["--model", "blip2", "--lora"],
    "blip2 pretrain1": ["configs/blip2/samples_pretrain1.json"],
    "glm sft": ["--model", "visualglm"],
    "glm lora": ["--model", "visualglm", "--lora"],
    "glm ptuning": ["--model", "visualglm", "--pre_seq_len", "4"],
}


class Started:
    """What of train.Run a forward and backward pass needs, on the stand-in."""

    def __init__(self, argv: list[str]):
        self.cfg = cfg = parse_config(argv)
        _, definition, directory = model_file(cfg)
        self.processor = definition.processor(directory, cfg.stage)
        entries = (cfg.dataset or data.DEFAULT_DATASET)["train"]
        index = data.build_index(entries, self.processor, cfg.max_length, None, progress=False)
        plan = data.Plan(index, cfg.seed, cfg.max_length, cfg.mixtoken, cfg.max_images)
        self.entries = index.entries
        self.one = one = parallel.World(0, 1, torch.device("cpu"))
        self.built = build(cfg, directory, one, train.stream_sizes(plan, cfg))
        self.model, self.world = self.built.model, parallel.World(0, 1, META)
        self.scaler, self.images_only = train.LossScaler(False), False
        self.autocast = contextlib.nullcontext()
        deal = data.Deal(per_device_batch=3, grad_accum=2)
        loader = data.TrainLoader(plan, self.processor, range(1), deal)
        self.micro_batches = next(iter(loader))[2]
        assert any(batch.has_images for batch in self.micro_batches)
        self.facts = train.step_facts(self.model, self.micro_batches, 0, one)


def tensors_moved(value) -> list[torch.Tensor]:
    """Those that fully_shard brings to the device among a module's arguments, before the forward pass."""
    seen = []
    with mock.patch.object(torch.Tensor, "to", lambda tensor, *_, **__: seen.append(tensor) or tensor):
        _to_kwargs((value,), {}, META, False)
    return seen


def close(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((ours.held - expected).abs().max()) <= 1e-3 * float(expected.abs().max()) + 1e-5


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return blip2_train.write_checkpoint(tmp_path_factory.mktemp("t5") / "t5", blip2_train.T5)


QUICK = ("qwen sft", "blip2 lora", "blip2 pretrain1", "glm ptuning")


@pytest.mark.parametrize("case", [c if c in QUICK else slow(c) for c in [*CASES, "t5 sft"]])
def test_a_step_on_a_device(case, request):
    """Gradients and evaluation as on the CPU; no wait, no mixing of devices, a copy a dtype and micro-batch
    beside one for the step. Stage 1 waits once a micro-batch: for the lengths of the texts that it drew."""
    argv = CASES.get(case) or ["--model", "blip2", "--model_name_or_path", str(request.getfixturevalue("t5"))]
    here = Started(argv)
    on_host = SimpleNamespace(**{**vars(here), "world": here.one})
    expected = train.forward_backward(on_host, here.micro_batches, here.facts)
    grads = {n: p.grad for n, p in here.model.named_parameters() if p.grad is not None}
    here.model.zero_grad()
    assert not any(tensors_moved(batch) for batch in here.micro_batches)
    waits = len(here.micro_batches) + 1 if case == "blip2 pretrain1" else 0  # one in evaluation
    with Device(reads=waits > 0) as device:
        move(here.model)
        sums = train.forward_backward(here, here.micro_batches, here.facts)
        of_step = list(device.copies)
        with torch.no_grad():
            here.model.eval()
            passes = train.Passes(here, here.micro_batches, here.facts.has_images, len(here.entries))
            passes.forward(0)
    assert close(sums, expected)
    found = {n: p.grad for n, p in here.model.named_parameters() if p.grad is not None}
    assert found.keys() == grads.keys() and grads
    assert all(close(found[name], grads[name]) for name in grads)
    assert passes.sums.held.sum() > 0
    # ids, positions, targets, keys together, and pixels; then the losses' weights
    assert device.reads == waits
    # which rows are the decoder's, a text's, a pair's
    rows = {"t5 sft": 3, "blip2 pretrain1": 8}.get(case, 0)
    assert len(of_step) <= (2 + rows) * len(here.micro_batches) + 1, of_step


def test_the_stand_in_stumbles_where_a_gpu_would():
    with Device():
        x = torch.zeros(4, device=META)
        for wait in (x.sum().item, x.nonzero, x.cpu, lambda: x[x > 0], lambda: x + torch.ones(4)):
            with pytest.raises(RuntimeError, match="waits for|of the device and of the host"):
                wait()
        assert isinstance(x + torch.ones(()), OnDevice) and (x + 1).held.tolist() == [1.0] * 4
    assert tensors_moved({"cu_seqlens": [torch.zeros(2)]})  # what it would do to a dict


def test_a_batch_comes_to_the_device_as_it_was():
    """In one copy a dtype, each tensor where aligned kernels expect it, the host's own left there."""
    ids = torch.arange(5)
    batch = vlm.Batch(
        input_ids=ids,
        position_ids=torch.stack((ids, ids + 7)),
        cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32),
        targets=torch.tensor([1, -100, 3, 4, -100]),
        pixel_values=torch.rand(1, 3, 4, 4),
        image_positions=torch.tensor([[1, 2]]),
        prefix_lens=torch.tensor([1, 2]),
        dropout_keys=ids * 3,
        dataset_ids=torch.tensor([4, 9]),
    )
    assert batch.row_datasets.tolist() == [4, 9, 9] and batch.to(torch.device("cpu")).host is batch
    with Device() as device:
        there = batch.to(META)
        assert there.to(META).input_ids is there.input_ids
    assert sorted(dtype.itemsize for _, dtype in device.copies) == [4, 8]
    for f in fields(vlm.Batch):
        ours, was = getattr(there, f.name), getattr(batch, f.name)
        if f.name in vlm.HOST_FIELDS or not isinstance(was, torch.Tensor):
            assert ours is was or f.name == "on_host"
        else:
            assert isinstance(ours, OnDevice) and torch.equal(ours.held, was)
            assert ours.storage_offset() * was.itemsize % vlm.ALIGNED == 0
    assert there.host is batch
