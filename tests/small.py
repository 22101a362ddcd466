"""Small models of random weights, the command lines that train them, and what their runs leave."""

import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import build
import checkpoint
import lora
import vlm

T5_TEXT = {  # for the shipped BLIP-2, whose own text model is OPT's
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": 1002,
    "tie_word_embeddings": False,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu",
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def filled(network: nn.Module) -> nn.Module:
    """With the weights that a training from scratch begins with, functions of their names."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            network.init_weights(name, p, build.named_generator(1, name))
    return network


def argv_of(options: dict) -> list[str]:
    return [a for k, v in options.items() for a in (f"--{k}", v if isinstance(v, str) else json.dumps(v))]


def arguments(base, dataset, out, **options) -> list[str]:
    # the bias of attention's keys has no gradient but rounding, which an epsilon of 1e-8 would make whole
    # steps of
    options = {
        "model_name_or_path": str(base),
        "dataset": dataset,
        "output_dir": str(out),
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-5,
        "max_steps": 10,
        "lr_scheduler_type": "cosine",
        "num_workers": 0,
        "logging_steps": 1000,
        "max_length": 128,
        "disable_tqdm": True,
        **options,
    }
    return argv_of(options)


def log_of(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def losses(out) -> list[float]:
    return [r["loss"] for r in log_of(out) if "loss" in r]


def weights(out) -> dict[str, Tensor]:
    if (Path(out) / "adapter_config.json").exists():
        return lora.read_adapter(out)[1]
    w = checkpoint.open_weights(out)
    return {name: w.read(name) for name in w.names}


def assert_same_run(out, reference, loss_tol=1e-5, weight_tol=1e-4) -> None:
    a, b = losses(out), losses(reference)
    assert len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b, strict=True)) < loss_tol, (a, b)
    wa, wb = weights(out), weights(reference)
    assert wa.keys() == wb.keys()
    for name in wa:
        assert (wa[name] - wb[name]).abs().max() < weight_tol, name


def wait_for_step(out, step: int, running) -> None:
    """Until the log has that step; running() tells whether it may still come."""
    while not (out / "log.jsonl").exists() or len(losses(out)) < step:
        assert running(), f"the run ended before step {step}"
        time.sleep(0.01)


def gradients(model: nn.Module, batches: list[vlm.Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, gradients by name) of one update over the micro-batches."""
    model.zero_grad()
    loss = sum(model(b)[0] for b in batches) / sum(b.num_supervised for b in batches)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
