"""BLIP-2 against frozen outputs of transformers and LAVIS (tolerances: 1e-4 on hidden states and logits, 1e-5 on losses, 1e-4
relative on gradients; tokens exactly). Padded rows of the originals are segments of one stream here."""
import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import model_blip2 as blip2
from generate import beam_search, generate


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


def text_batch(ids, mask, Q, pixels):
    """Stage 1's stream: slots, then [CLS] text [SEP]."""
    rows, targets = [], []
    for r, k in zip(ids, mask.bool(), strict=True):
        text = r[k]
        rows.append(torch.cat((torch.zeros(Q, dtype=torch.long), text)))
        labels = torch.cat((torch.full((Q + 1,), -100), text[1:]))
        targets.append(shifted(labels))
    batch = stream(rows, targets, pixels, Q)
    batch["num_supervised"] = int((batch["targets"] != -100).sum())
    batch["image_dropout_keys"] = torch.arange(len(rows))
    return batch


@torch.no_grad()
def test_golden_retrieval(blip2_itm):
    variant = Variant(blip2_itm)
    model, io = variant.model(), variant.io
    mask = io["in.attention_mask"].bool()
    ids, lengths = io["in.input_ids"][mask].long(), mask.sum(1)
    image = model.vision_model(io["in.pixel_values"])
    close(model.match(image, ids, lengths), io["out.itm_logits_per_image"])
    close(model.multimodal(image, ids, lengths), io["out.itm_last_hidden_state"][:, : model.num_image_tokens])
    text = model.encode_text(ids, lengths)
    close(text, io["out.text_last_hidden_state"][mask])
    close(model.image_features(blip2.encode_queries(model, image)), io["out.image_embeds"])
    close(model.text_features(text, lengths), io["out.text_embeds"])
    batch = text_batch(io["in.input_ids"], mask, model.num_image_tokens, io["in.pixel_values"])
    close(model(batch, "itc"), io["out.itc_logits_per_image"])
    close(model(batch, "itm"), io["out.itm_logits_per_image"].softmax(-1)[:, 1])


def lavis_model(variant, text_config=None):
    """A LAVIS variant's weights in our model."""
    case = variant.golden["case"]
    text = text_config or {"model_type": "opt"}
    config = {
        "model_type": "blip-2", "num_query_tokens": case["num_query_tokens"], "image_token_index": None,
        "image_text_hidden_size": case.get("embed_dim", 256), "stage1_heads": text_config is None,
        "vision_config": {**case["vision"], "post_layernorm_eps": 1e-5}, "text_config": text,
        "qformer_config": {**case["qformer"], "use_qformer_text_input": text_config is None},
    }  # fmt: skip
    weights = load_file(variant.path / "model.safetensors")
    state = blip2.from_lavis(weights)
    if text_config is None:
        config["qformer_config"]["vocab_size"] = len(state["embeddings.word_embeddings.weight"])
    model = blip2.build_model(config)
    model.load_state_dict(state, strict=True)
    return model.eval(), weights


def lavis_name(name):
    """Our parameter for a LAVIS one; the two biases of a tower block are one of ours."""
    if name.endswith(("q_bias", "v_bias")) or name in blip2.LAVIS_REDUNDANT:
        return None
    return blip2.translate(name, blip2.LAVIS_NAMES)


def given(model, images, texts):
    """Replaces the draw of negatives by what the original drew."""
    model.draw = lambda scores, rows, columns, purpose: torch.tensor(images if purpose == 1 else texts)


def stage1_losses(model, batch):
    sums, facts = model(batch)
    counts = torch.tensor(model.loss_counts(batch)).float()
    close(facts.sum(0)[:, 0], sums)
    assert torch.equal(facts.sum(0)[:, 1], counts)
    return sums / counts


def test_golden_stage1(blip2_stage1):
    variant = Variant(blip2_stage1)
    io, g = variant.io, variant.golden
    for case in ("plain", "image_id"):
        model, _ = lavis_model(variant)
        Q = model.num_image_tokens
        assert model.decoder_start == g["special_ids"]["dec(bos)"]
        batch = text_batch(io["in.input_ids"], io["in.attention_mask"], Q, io["in.image"])
        if case == "image_id":
            batch["image_ids"] = io["in.image_id"]
        drawn = {}
        draw = model.draw

        def record(scores, rows, columns, purpose, drawn=drawn, draw=draw):
            drawn[purpose] = scores.exp()
            return draw(scores, rows, columns, purpose)

        model.draw = record
        model(batch)
        close(drawn[1], io[f"out.{case}.weights_t2i"])
        close(drawn[2], io[f"out.{case}.weights_i2t"])
        given(model, g[case]["negative_image_for_text"], g[case]["negative_text_for_image"])
        losses = stage1_losses(model, batch)
        losses.sum().backward()
        for loss, name in zip(losses, model.LOSSES, strict=True):
            assert abs(float(loss.detach()) - g[case][f"loss_{name}"]) < 1e-5, (case, name)
        seen = check_gradients(model, {n: e for n, e in g[case]["grads"].items()}, lavis_name)
        assert len(seen) > 0.7 * len(g["trainable"])
        parameters = dict(model.named_parameters())
        for name, grad in io.items():
            if name.startswith(f"grad.{case}."):
                close(parameters[lavis_name(name.removeprefix(f"grad.{case}."))].grad, grad, 1e-5)


def new_tokens(sequence, prompt_length, eos):
    """What was generated, up to and including the first end token."""
    out = sequence[prompt_length:]
    return out[: out.index(eos) + 1] if eos in out else out


def requests_of(ids, masks, pixels, Q, t5=False, seen=None):
    requests = []
    for row, keep, picture in zip(ids, masks.bool(), pixels, strict=True):
        row = row[keep].tolist() + ([0] if t5 else [])
        requests.append({"input_ids": row, "image_starts": [0], "pixel_values": [picture], "seen": seen or ([0] if t5 else row)})
    assert Q <= min(len(r["input_ids"]) for r in requests)
    return requests


def check_generation(model, requests, expected, eos, new, beams=1, **options):
    """`expected`: tokens (and scores) of each request, best first; alone, a request gives what it gives in a batch."""
    if beams == 1:
        out = [[row] for row in generate(model, requests, new, [[eos]], **options)]
        alone = [[generate(model, [r], new, [[eos]], **options)[0]] for r in requests]
    else:
        out = beam_search(model, requests, new, [[eos]], beams, **options)
        alone = [beam_search(model, [r], new, [[eos]], beams, **options)[0] for r in requests]
        for o, a in zip(out, alone, strict=True):
            close(torch.tensor([s for s, _ in o]), torch.tensor([s for s, _ in a]))
        out, scores = [[t for _, t in o] for o in out], [[s for s, _ in o] for o in out]
        alone = [[t for _, t in a] for a in alone]
    assert out == alone
    for o, e in zip(out, expected, strict=True):
        assert o[: len(e)] == e
    return scores if beams > 1 else None


def check_hf_generations(variant, t5):
    model, io, g = variant.model(), variant.io, variant.golden
    Q = model.num_image_tokens
    config = json.loads((variant.path / "config.json").read_text())
    slot, bos = config["image_token_index"], config["text_config"]["bos_token_id"]
    for name, case in g["generation"].items():
        args = case["args"]
        if "_prompt" in name:
            ids, masks = io["in.prompt_ids"], io["in.prompt_attention_mask"]
        else:
            ids = torch.tensor([[slot] * Q + [bos]] * len(io["in.pixel_values"]))
            masks = torch.ones_like(ids)
        # transformers counts pads among what the penalty sees
        requests = requests_of(ids, masks, io["in.pixel_values"], Q, t5)
        if not t5:
            for r, row in zip(requests, ids.tolist(), strict=True):
                r["seen"] = row
        start = 1 if t5 else ids.shape[1]
        R = args.get("num_return_sequences", 1)
        eos = args["eos_token_id"]
        rows = [new_tokens(s, start, eos) for s in case["sequences"]]
        expected = [rows[i : i + R] for i in range(0, len(rows), R)]
        options = {k: args[k] for k in ("repetition_penalty", "length_penalty") if k in args}
        scores = check_generation(
            model, requests, expected, eos, args["max_new_tokens"], args.get("num_beams", 1),
            min_new_tokens=args.get("min_new_tokens", 0), **options,
        )  # fmt: skip
        if "sequences_scores" in case:
            close(torch.tensor([s for row in scores for s in row[:R]]), torch.tensor(case["sequences_scores"]))
    assert len(g["generation"]) >= 9


def test_golden_opt_generation(blip2_opt):
    check_hf_generations(Variant(blip2_opt), t5=False)


def test_golden_t5_generation(blip2_t5):
    check_hf_generations(Variant(blip2_t5), t5=True)
