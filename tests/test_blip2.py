"""BLIP-2 against frozen outputs of transformers and LAVIS (tolerances: 1e-4 on hidden states and logits, 1e-5 on losses, 1e-4
relative on gradients; tokens exactly). Padded rows of the originals are segments of one stream here."""
import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import model_blip2 as blip2
from generate import generate


def close(a, b, atol=1e-4, rtol=1e-4):
    torch.testing.assert_close(a.float(), b.float(), atol=atol, rtol=rtol)


class Variant:
    def __init__(self, path):
        self.path = path
        self.golden = json.loads((path / "golden.json").read_text())
        self.io = load_file(path / "io.safetensors") if (path / "io.safetensors").exists() else {}

    def model(self):
        config = json.loads((self.path / "config.json").read_text())
        model = blip2.build_model(config)
        state = {n: t for n, t in load_file(self.path / "model.safetensors").items() if n not in blip2.ALIASES or config["text_config"]["model_type"] == "t5"}
        model.load_state_dict(state, strict=True)
        return model.eval()


def stream(rows, targets=None, pixels=None, Q=0):
    """Rows of ids (and of what each is to predict) as one batch; the first Q tokens of a row are slots."""
    lengths = torch.tensor([len(r) for r in rows])
    cu = blip2.segments(lengths)
    return {
        "input_ids": torch.cat(rows).long(), "cu_seqlens": cu, "max_len": int(lengths.max()),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
        "targets": torch.cat(targets).long() if targets else torch.full((int(cu[-1]),), -100),
        "pixel_values": pixels, "image_positions": cu[:-1, None].long() + torch.arange(Q),
    }  # fmt: skip


def shifted(labels):
    return torch.cat((labels[1:], labels.new_tensor([-100])))


def opt_batch(io, Q, ids="in.input_ids", mask="in.attention_mask", labels="in.labels", pixels="in.pixel_values"):
    keep = io[mask].bool()
    rows = [r[k] for r, k in zip(io[ids], keep, strict=True)]
    targets = [shifted(r[k]) for r, k in zip(io[labels], keep, strict=True)] if labels else None
    return stream(rows, targets, io[pixels], Q), keep


def t5_batch(io, Q, ids="in.input_ids", mask="in.attention_mask", pixels="in.pixel_values"):
    """The decoder's part of a segment: the start token, then the labels; its last token predicts nothing."""
    rows, targets = [], []
    for r, k, labels in zip(io[ids], io[mask].bool(), io["in.labels"], strict=True):
        labels, encoder = labels[labels != -100], r[k]
        rows.append(torch.cat((encoder, torch.tensor([0]), labels)))
        targets.append(torch.cat((torch.full_like(encoder, -100), labels, torch.tensor([-100]))))
    return stream(rows, targets, io[pixels], Q)


def check_gradients(model, expected, rename=lambda n: n, skip=("k_proj.bias", "key.bias")):
    parameters = dict(model.named_parameters())
    seen = set()
    for name, e in expected.items():
        ours = rename(name)
        if ours is None or ours.endswith(skip):
            continue
        grad = parameters[ours].grad
        grad = torch.zeros_like(parameters[ours]) if grad is None else grad
        if ours.endswith("qkv.bias"):
            q, k, v = grad.chunk(3)
            grad = torch.cat((q, v))
        norm = float(grad.norm())
        assert abs(norm - e["norm"]) <= 1e-4 * e["norm"] + 1e-7, (name, norm, e["norm"])
        assert abs(float(grad.abs().max()) - e["absmax"]) <= 1e-4 * e["absmax"] + 1e-7, name
        seen.add(ours)
    return seen


def check_vision_and_qformer(model, io):
    seen = {"vision": [], "qformer": []}
    hooks = [model.vision_model.embeddings.register_forward_hook(lambda _m, _i, out: seen["vision"].append(out.flatten(0, 1)))]
    hooks += [b.register_forward_hook(lambda _m, _i, out: seen["vision"].append(out)) for b in model.vision_blocks]
    layers = model.qformer.encoder.layer
    hooks.append(layers[0].register_forward_pre_hook(lambda _m, args: seen["qformer"].append(args[0])))
    hooks += [layer.register_forward_hook(lambda _m, _i, out: seen["qformer"].append(out)) for layer in layers]
    image = model.vision_model(io["in.pixel_values"])
    queries = blip2.encode_queries(model, image)
    features = model.encode_images(io["in.pixel_values"])
    for hook in hooks:
        hook.remove()
    close(image, io["out.vision_last_hidden_state"])
    close(model.vision_model.post_layernorm(image[:, 0]), io["out.vision_pooler_output"])
    close(queries, io["out.qformer_last_hidden_state"])
    close(features, io["out.language_projection"])
    for i in range(len(model.vision_blocks) + 1):
        close(seen["vision"][i].view_as(io[f"out.vision_hidden.{i}"]), io[f"out.vision_hidden.{i}"])
    for i in range(len(layers) + 1):
        close(seen["qformer"][i].view_as(io[f"out.qformer_hidden.{i}"]), io[f"out.qformer_hidden.{i}"])


def check_loss_and_gradients(variant, model, batch):
    loss_sum, row_losses = model(batch)
    assert len(row_losses) == variant.golden["n_scored_tokens"]
    loss = loss_sum / len(row_losses)
    loss.backward()
    assert abs(float(loss.detach()) - variant.golden["loss"]) < 1e-5
    seen = check_gradients(model, variant.golden["grads"])
    parameters = dict(model.named_parameters())
    assert len(seen) > 0.8 * len(parameters)
    for name, grad in variant.io.items():
        if name.startswith("grad."):
            close(parameters[name[5:]].grad, grad, 1e-5)


@torch.no_grad()
def test_golden_opt_hidden_states_and_logits(blip2_opt):
    variant = Variant(blip2_opt)
    model, io = variant.model(), variant.io
    check_vision_and_qformer(model, io)
    batch, keep = opt_batch(io, model.num_image_tokens)
    close(model.logits(model.hidden(batch)), io["out.logits"][keep])


def test_golden_opt_loss_and_gradients(blip2_opt):
    variant = Variant(blip2_opt)
    model = variant.model()
    check_loss_and_gradients(variant, model, opt_batch(variant.io, model.num_image_tokens)[0])


@torch.no_grad()
def test_golden_t5_hidden_states_and_logits(blip2_t5):
    variant = Variant(blip2_t5)
    model, io = variant.model(), variant.io
    check_vision_and_qformer(model, io)
    encoded = []
    model.language_model.encoder.register_forward_hook(lambda _m, _i, out: encoded.append(out))
    batch = t5_batch(io, model.num_image_tokens)
    logits = model.logits(model.hidden(batch))
    close(encoded[0], io["out.encoder_last_hidden_state"][io["in.attention_mask"].bool()])
    lengths = (io["in.labels"] != -100).sum(1)
    for got, expected, n in zip(logits.split((lengths + 1).tolist()), io["out.logits"], lengths, strict=True):
        close(got[:n], expected[:n])


def test_golden_t5_loss_and_gradients(blip2_t5):
    variant = Variant(blip2_t5)
    model = variant.model()
    check_loss_and_gradients(variant, model, t5_batch(variant.io, model.num_image_tokens))
