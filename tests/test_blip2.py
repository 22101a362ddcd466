"""BLIP-2 against frozen outputs of transformers and LAVIS (tolerances: 1e-4 on hidden states and logits, 1e-5
on losses, 1e-4 relative on gradients; tokens exactly). Padded rows of the originals are segments of one
stream here."""

import dataclasses
import json
import math
import types

import pytest
import torch
from golden import read_golden
from PIL import Image
from ranks import together
from safetensors.torch import load_file

import blip2_language
import blip2_stage1
import build
import lora
import model_blip2 as blip2
import parallel
import train as loop
import vlm
from convert import lavis
from generate import Decoding, beam_search, generate


def close(a, b, atol=1e-4, rtol=1e-4):
    torch.testing.assert_close(a.float(), b.float(), atol=atol, rtol=rtol)


class Variant:
    def __init__(self, path):
        self.path = path
        self.golden = read_golden(path / "golden.json")
        self.io = read_golden(path / "io.safetensors") if (path / "io.safetensors").exists() else {}

    def model(self):
        config = json.loads((self.path / "config.json").read_text())
        model = blip2.build_model(config)
        state = {
            n: t
            for n, t in load_file(self.path / "model.safetensors").items()
            if n not in blip2.MODEL.aliases(config)
        }
        model.load_state_dict(state, strict=True)
        return model.eval()


def stream(rows, targets=None, pixels=None, Q=0):
    """Rows of ids (and of what each is to predict) as one batch; the first Q tokens of a row are slots."""
    lengths = torch.tensor([len(r) for r in rows])
    cu = blip2_language.segments(lengths)
    return vlm.Batch(
        input_ids=torch.cat(rows).long(),
        cu_seqlens=cu,
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        targets=torch.cat(targets).long() if targets else torch.full((int(cu[-1]),), -100),
        pixel_values=pixels,
        image_positions=cu[:-1, None].long() + torch.arange(Q),
    )


def shifted(labels):
    return torch.cat((labels[1:], labels.new_tensor([-100])))


def opt_batch(
    io, Q, ids="in.input_ids", mask="in.attention_mask", labels="in.labels", pixels="in.pixel_values"
):
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
    hooks = [
        model.vision_model.embeddings.register_forward_hook(
            lambda _m, _i, out: seen["vision"].append(out.flatten(0, 1))
        )
    ]
    hooks += [
        b.register_forward_hook(lambda _m, _i, out: seen["vision"].append(out)) for b in model.vision_blocks
    ]
    layers = model.qformer.encoder.layer
    hooks.append(layers[0].register_forward_pre_hook(lambda _m, args: seen["qformer"].append(args[0])))
    hooks += [
        layer.register_forward_hook(lambda _m, _i, out: seen["qformer"].append(out)) for layer in layers
    ]
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
    batch.image_dropout_keys = torch.arange(len(rows))
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
        "model_type": "blip-2",
        "num_query_tokens": case["num_query_tokens"],
        "image_token_index": None,
        "image_text_hidden_size": case.get("embed_dim", 256),
        "stage1_heads": text_config is None,
        "vision_config": {**case["vision"], "post_layernorm_eps": 1e-5},
        "text_config": text,
        "qformer_config": {**case["qformer"], "use_qformer_text_input": text_config is None},
    }
    weights = load_file(variant.path / "model.safetensors")
    state = lavis.from_lavis(weights)
    if text_config is None:
        config["qformer_config"]["vocab_size"] = len(state["embeddings.word_embeddings.weight"])
    model = blip2.build_model(config)
    model.load_state_dict(state, strict=True)
    return model.eval(), weights


def lavis_name(name):
    """Our parameter for a LAVIS one; the two biases of a tower block are one of ours."""
    if name.endswith(("q_bias", "v_bias")) or name in lavis.LAVIS_REDUNDANT:
        return None
    return lavis.translate(name, lavis.LAVIS_NAMES)


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
            batch.image_ids = io["in.image_id"]
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
                ours = parameters[lavis_name(name.removeprefix(f"grad.{case}."))].grad
                close(ours.view_as(grad), grad, 1e-5)


def new_tokens(sequence, prompt_length, eos):
    """What was generated, up to and including the first end token."""
    out = sequence[prompt_length:]
    return out[: out.index(eos) + 1] if eos in out else out


def requests_of(ids, masks, pixels, Q, t5=False, seen=None):
    requests = []
    for row, keep, picture in zip(ids, masks.bool(), pixels, strict=True):
        row = row[keep].tolist() + ([0] if t5 else [])
        requests.append(
            {
                "input_ids": row,
                "image_starts": [0],
                "pixel_values": [picture],
                "seen": seen or ([0] if t5 else row),
            }
        )
    assert Q <= min(len(r["input_ids"]) for r in requests)
    return requests


def check_generation(model, requests, expected, eos, new, beams=1, **options):
    """`expected`: tokens (and scores) of each request, best first; alone, a request gives what it gives in a
    batch."""
    if beams == 1:
        out = [[row] for row in generate(model, requests, Decoding(new, **options), [[eos]])]
        alone = [[generate(model, [r], Decoding(new, **options), [[eos]])[0]] for r in requests]
    else:
        out = beam_search(model, requests, Decoding(new, num_beams=beams, **options), [[eos]])
        alone = [
            beam_search(model, [r], Decoding(new, num_beams=beams, **options), [[eos]])[0] for r in requests
        ]
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
            model,
            requests,
            expected,
            eos,
            args["max_new_tokens"],
            args.get("num_beams", 1),
            min_new_tokens=args.get("min_new_tokens", 0),
            **options,
        )
        if "sequences_scores" in case:
            close(
                torch.tensor([s for row in scores for s in row[:R]]), torch.tensor(case["sequences_scores"])
            )
    assert len(g["generation"]) >= 9


def test_golden_opt_generation(blip2_opt):
    check_hf_generations(Variant(blip2_opt), t5=False)


def test_golden_t5_generation(blip2_t5):
    check_hf_generations(Variant(blip2_t5), t5=True)


@torch.no_grad()
def test_golden_stage1_outputs(blip2_stage1):
    variant = Variant(blip2_stage1)
    io, g = variant.io, variant.golden
    model, _ = lavis_model(variant)
    Q, mask, ids = model.num_image_tokens, io["in.attention_mask"].bool(), io["in.input_ids"]
    image = model.vision_model(io["in.image"])
    close(image, io["out.image_embeds"])
    queries = blip2.encode_queries(model, image)
    close(queries, io["out.bert.itc_image_queries"])
    close(model.image_features(queries), io["out.image_feats"])
    text, lengths = model.encode_text(ids[mask], mask.sum(1)), mask.sum(1)
    close(text, io["out.bert.itc_text"][mask])
    close(model.text_features(text, lengths), io["out.text_feat"])
    batch = text_batch(ids, mask, Q, io["in.image"])
    rows, _ = model.text_of(batch)
    started = dataclasses.replace(batch, input_ids=batch.input_ids.clone())
    started.input_ids[rows] = io["out.lm_decoder_input_ids"][mask]
    hidden = model.hidden(started)[rows]
    close(hidden, io["out.bert.lm"][mask])
    # LAVIS lets the first position predict nothing
    close(model.logits(hidden), io["out.lm_logits"][mask])
    close(
        model(batch, "itm"),
        io["out.compute_itm"]
        if io["out.compute_itm"].max() <= 1 and io["out.compute_itm"].min() >= 0
        else model.match(image, ids[mask], lengths).softmax(-1)[:, 1],
    )
    close(model.match(image, ids[mask], lengths)[:, 1], io["out.compute_itm"])
    extract = io["in.extract_attention_mask"].bool()
    n = extract.sum(1)
    close(model.multimodal(image, io["in.extract_ids"][extract], n), io["out.extract_multimodal"])
    projected = torch.nn.functional.normalize(
        model.text_projection(model.encode_text(io["in.extract_ids"][extract], n)), dim=-1
    )
    close(projected, io["out.extract_text_proj"][extract])
    close(model.image_features(queries), io["out.extract_image_proj"])
    # one pair; which picture it is the files do not say
    pair = io["in.itm_pair_ids"].long()
    size = torch.tensor([pair.shape[1]])
    scores = torch.cat([model.match(image[i : i + 1], pair[0], size) for i in range(len(image))])
    assert (scores - io["out.blip2itm_itm"]).abs().amax(1).min() < 1e-4
    case = g["generate_greedy"]
    requests = [
        {"input_ids": [0] * Q + [model.decoder_start], "image_starts": [0], "pixel_values": [p]}
        for p in io["in.image"]
    ]
    args = case["args"]
    expected = [[new_tokens(s, 1, args["eos"])] for s in case["sequences"]]
    check_generation(
        model, requests, expected, args["eos"], args["max_length"] - 1, min_new_tokens=args["min_length"] - 1
    )


def ddp_rank(rank, path):
    world = torch.distributed.get_world_size()
    parallel.groups["dp"] = torch.distributed.group.WORLD
    variant = Variant(path)
    io, g = variant.io, variant.golden["ranks"][str(rank)]
    model, _ = lavis_model(variant)
    B = len(io["in.image"]) // world
    rows = slice(rank * B, (rank + 1) * B)
    batch = text_batch(
        io["in.input_ids"][rows], io["in.attention_mask"][rows], model.num_image_tokens, io["in.image"][rows]
    )
    given(model, g["negative_image_for_text"], g["negative_text_for_image"])
    losses = stage1_losses(model, batch)
    losses.sum().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return losses.tolist(), grads


def test_golden_stage1_two_processes(blip2_stage1_ddp):
    variant = Variant(blip2_stage1_ddp)
    world = variant.golden["world_size"]
    results = together(ddp_rank, blip2_stage1_ddp, world=world)
    for rank, (losses, grads) in enumerate(results):
        g = variant.golden["ranks"][str(rank)]
        for loss, name in zip(losses, blip2_stage1.Blip2Qformer.LOSSES, strict=True):
            assert abs(loss - g[f"loss_{name}"]) < 1e-5
        for expected, tensors in (
            (g["local_grads"], grads),
            (g["averaged_grads"], {n: sum(r[1][n] for r in results) / world for n in grads}),
        ):
            if expected is None:  # recorded once, with rank 0
                continue
            holder = torch.nn.Module()
            holder.named_parameters = lambda tensors=tensors: [
                (n, types.SimpleNamespace(grad=t)) for n, t in tensors.items()
            ]
            assert len(check_gradients(holder, expected, lavis_name)) > 80


def stage2(path):
    variant = Variant(path)
    io, case = variant.io, variant.golden["case"]
    t5 = "d_model" in case["text"]
    text = {**case["text"], "model_type": "t5" if t5 else "opt"}
    if t5:
        text["tie_word_embeddings"] = False
    model, weights = lavis_model(variant, text)
    io["in.pixel_values"] = io["in.image"]
    if t5:
        batch = t5_batch(
            {
                **io,
                "ids": torch.cat(
                    (torch.zeros(len(io["in.image"]), model.num_image_tokens).long(), io["in.input_ids"]), 1
                ),
            },
            model.num_image_tokens,
            "ids",
            "in.encoder_attention_mask",
        )
        # slots must not look like the start token
        batch.input_ids[batch.image_positions.flatten()] = 1
        return variant, model, weights, {"forward": batch}
    batches = {}
    for name in ("prompt", "noprompt"):
        io[f"{name}.ids"] = torch.cat(
            (torch.ones(len(io["in.image"]), model.num_image_tokens).long(), io[f"in.{name}.input_ids"]), 1
        )
        batches[name] = opt_batch(
            io, model.num_image_tokens, f"{name}.ids", f"in.{name}.attention_mask", f"in.{name}.labels"
        )[0]
    return variant, model, weights, batches


def test_golden_stage2(blip2_stage2):
    variant, model, _, batches = stage2(blip2_stage2)
    io = variant.io
    close(blip2.encode_queries(model, model.vision_model(io["in.image"])), io["out.qformer"])
    for name, batch in batches.items():
        g = variant.golden[name]
        model.zero_grad()
        loss_sum, row_losses = model(batch)
        loss = loss_sum / len(row_losses)
        loss.backward()
        assert abs(float(loss.detach()) - g["loss"]) < 1e-5
        assert len(check_gradients(model, g["grads"], lavis_name)) > 60
        with torch.no_grad():
            logits = model.logits(model.hidden(batch))
        if name == "forward":
            n = (io["in.labels"] != -100).sum(1)
            for got, expected, length in zip(
                logits.split((n + 1).tolist()), io["out.logits"], n, strict=True
            ):
                close(got[:length], expected[:length])
        else:
            close(logits, io[f"out.{name}.logits"][io[f"in.{name}.attention_mask"].bool()])


def test_golden_stage2_generation(blip2_stage2):
    variant, model, _, batches = stage2(blip2_stage2)
    io, g, Q, t5 = variant.io, variant.golden, model.num_image_tokens, "forward" in batches
    N = len(io["in.image"])
    for name, case in g["generation"].items():
        args = case["args"]
        prompt = args.get("prompt") or ""
        eos = args["eos"] if "eos" in args else 1
        texts = [prompt.format(q) for q in args["questions"]] if "questions" in args else [prompt] * N
        text_ids = [[int(w[1:]) for w in t.split()] for t in texts]
        requests, beams = [], args["num_beams"]
        for ids, picture in zip(text_ids, io["in.image"], strict=True):
            ids = [*ids, 1, 0] if t5 else [2, *ids]
            seen = (
                [0] if t5 else ids if beams > 1 else [2]
            )  # beams by the rule "lavis" leave the prompt out themselves
            requests.append(
                {"input_ids": [1] * Q + ids, "image_starts": [0], "pixel_values": [picture], "seen": seen}
            )
        if "vqa" in name:
            new, minimum = args["max_new_tokens"], args["min_length"]
        else:  # the start token counts, but for T5's maximum
            new, minimum = args["max_length"] - (0 if t5 else 1), args["min_length"]
        options = {k: args[k] for k in ("repetition_penalty", "length_penalty") if k in args}
        if beams > 1:
            options["beam_rule"] = "lavis"
        expected = [[new_tokens(s, 1, eos)] for s in case["sequences"]]
        # the original's minimum counts the start token: as min_length does without a prompt before the
        # decoder
        least = {"min_length": minimum} if t5 or beams > 1 else {"min_new_tokens": minimum - 1}
        check_generation(model, requests, expected, eos, new, beams, **least, **options)


def run_training(model, steps, optimizer, expected, loss_of):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for i in range(steps):
        loss = loss_of(i)
        assert abs(float(loss.detach()) - expected[i]["loss"]) < 2e-4, (
            i,
            float(loss.detach()),
            expected[i]["loss"],
        )
        if i < steps - 1:  # the last loss is that after the last update
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {n: float((p - before[n]).norm()) for n, p in model.named_parameters()}


def lavis_training(variant, model, train, loss_of, stage):
    """AdamW with the groups and the freezing that train.py makes."""
    o = train["optimizer"]
    cfg = loop.Config(
        stage=stage,
        learning_rate=o["lr"],
        weight_decay=o["weight_decay"],
        adam_beta1=o["betas"][0],
        adam_beta2=o["betas"][1],
        adam_epsilon=o["eps"],
        decay_scalars=True,
    )
    build.choose_trainable(model, blip2.MODEL, cfg)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {lavis_name(n) for n in variant.golden["trainable"]} - {None}
    changes = run_training(
        model, len(train["steps"]), build.make_optimizer(model, cfg), train["steps"], loss_of
    )
    noise = set(train["parameters_whose_change_is_not_reproducible"])
    assert len(noise) < len(train["parameter_change_norm_after_all_steps"]) / 4
    for name, expected in train["parameter_change_norm_after_all_steps"].items():
        if name not in noise and not name.endswith("key.bias") and (ours := lavis_name(name)):
            assert abs(changes[ours] - expected) < 1e-3 * expected + 1e-6, name
    assert all(changes[n] == 0 for n in changes.keys() - trainable)


def test_golden_stage1_training(blip2_stage1):
    variant = Variant(blip2_stage1)
    if not (blip2_stage1 / "train.json").exists():
        pytest.skip("this variant has no training run")
    train = read_golden(blip2_stage1 / "train.json")
    model, _ = lavis_model(variant)
    batch = text_batch(
        variant.io["in.input_ids"],
        variant.io["in.attention_mask"],
        model.num_image_tokens,
        variant.io["in.image"],
    )

    def loss_of(i):
        given(
            model, train["steps"][i]["negative_image_for_text"], train["steps"][i]["negative_text_for_image"]
        )
        losses = stage1_losses(model, batch)
        for loss, name in zip(losses, model.LOSSES, strict=True):
            assert abs(float(loss.detach()) - train["steps"][i][f"loss_{name}"]) < 2e-4, (i, name)
        return losses.sum()

    lavis_training(variant, model, train, loss_of, "pretrain1")


def test_golden_stage2_training(blip2_stage2):
    if not (blip2_stage2 / "train.json").exists():
        pytest.skip("this variant has no training run")
    variant, model, _, batches = stage2(blip2_stage2)
    train = read_golden(blip2_stage2 / "train.json")
    batch = batches["forward"] if "forward" in batches else batches["noprompt"]

    def loss_of(_):
        loss_sum, row_losses = model(batch)
        return loss_sum / len(row_losses)

    lavis_training(variant, model, train, loss_of, "pretrain2")


def test_golden_lora(blip2_lora, goldens):
    variant = Variant(blip2_lora)
    g = variant.golden
    base = Variant(goldens / "blip2" / g["base"])
    model, io, t5 = base.model(), base.io, base.golden["kind"] == "t5"
    Q = model.num_image_tokens
    batch = t5_batch(io, Q) if t5 else opt_batch(io, Q)[0]
    names = [n.removeprefix("base_model.model.") for n in g["adapted_modules"]]
    assert sorted(lora.inject(model, [g["target_modules_regex"]], g["r"], g["lora_alpha"], 0.0)) == sorted(
        names
    )
    tensors = {
        n.removeprefix("base_model.model."): t
        for n, t in load_file(blip2_lora / "adapter_model.safetensors").items()
    }
    parameters = dict(model.named_parameters())
    for n, p in parameters.items():
        p.requires_grad_(".lora_" in n)

    def loss_of(_=0):
        loss_sum, row_losses = model(batch)
        return loss_sum / len(row_losses)

    key = next(k for k in g if k.startswith("loss_with_zero_B"))
    with torch.no_grad():
        for n in tensors:
            parameters[n].copy_(torch.zeros_like(tensors[n]) if "lora_B" in n else tensors[n])
        assert abs(float(loss_of()) - g[key]) < 1e-5
        for n, t in tensors.items():
            parameters[n].copy_(t)
        logits = model.logits(model.hidden(batch))
        if t5:
            n = (io["in.labels"] != -100).sum(1)
            for got, expected, length in zip(
                logits.split((n + 1).tolist()), variant.io["out.logits"], n, strict=True
            ):
                close(got[:length], expected[:length])
        else:
            close(logits, variant.io["out.logits"][io["in.attention_mask"].bool()])
    loss = loss_of()
    loss.backward()
    assert abs(float(loss.detach()) - g["loss"]) < 1e-5
    check_gradients(model, g["grads"], lambda n: n.removeprefix("base_model.model.").replace(".default", ""))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == g["n_trainable"]
    steps = next(v for k, v in g.items() if k.startswith("adamw"))
    model.zero_grad()
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.05)
    run_training(model, len(steps), optimizer, [{"loss": x} for x in steps], loss_of)


def test_golden_lavis_names_go_round(blip2_stage1, blip2_stage2):
    for path, text in ((blip2_stage1, None), (blip2_stage2, "lm")):
        if text is None:
            model, weights = lavis_model(Variant(path))
        else:
            _, model, weights, _ = stage2(path)
        back = lavis.to_lavis(dict(model.named_parameters()), model.config.qformer.max_position_embeddings)
        assert back.keys() == weights.keys() | (back.keys() & lavis.LAVIS_REDUNDANT.keys())
        for name, tensor in weights.items():
            assert torch.equal(back[name], tensor), name


TABLES = {
    "hf_blip2-opt-2.7b": "blip2-opt-2.7b",
    "hf_blip2-flan-t5-xl": "blip2-flan-t5-xl",
    "hf_blip2-itm-vit-g": "blip2-itm-vit-g",
}


def shapes_of(config):
    with torch.device("meta"):
        return {n: list(p.shape) for n, p in blip2.build_model(config).named_parameters()}


@pytest.mark.parametrize("table", TABLES)
def test_golden_published_names_and_shapes(goldens, table):
    expected = read_golden(goldens / "blip2" / "tables" / f"{table}.json")
    ours = shapes_of(vlm.shape(TABLES[table]))
    assert ours == expected["released_names"]
    assert sum(math.prod(s) for s in ours.values()) == expected["n_parameters"]


def test_golden_lavis_names_and_shapes(goldens):
    table = read_golden(goldens / "blip2" / "tables" / "lavis_names.json")
    for file, names in table["files"].items():
        if "bare" in file:
            ours = {
                n: t
                for n, t in lavis.from_lavis(
                    {n: torch.empty(s, device="meta") for n, s in names["file_has"].items()}
                ).items()
            }
            expected = {
                n: s
                for n, s in shapes_of(vlm.shape("blip2-opt-2.7b")).items()
                if n.startswith(tuple(p[:-1] for p in blip2.TOWER))
            }
            assert {n: list(t.shape) for n, t in ours.items()} == expected
            continue
        preset = next(
            (p for k, p in (("opt2.7b", "blip2-opt-2.7b"), ("flant5xl", "blip2-flan-t5-xl")) if k in file),
            "blip2-stage1",
        )
        config = vlm.shape(preset)
        if "364" in file:
            config = {**config, "vision_config": {**config["vision_config"], "image_size": 364}}
        if "opt" in preset:  # LAVIS's own OPT, before the image token
            config = {**config, "text_config": {**config["text_config"], "vocab_size": 50272}}
        with torch.device("meta"):
            model = blip2.build_model(config)
        state = {n: torch.empty(p.shape, device="meta") for n, p in model.named_parameters()}
        ours = {n: list(t.shape) for n, t in lavis.to_lavis(state).items()}
        whole = {**names["file_has"], **names["module_also_has_but_frozen"]}
        assert {n: s for n, s in ours.items() if n in whole or n not in lavis.LAVIS_REDUNDANT} == whole
        back = lavis.from_lavis({n: torch.empty(s, device="meta") for n, s in whole.items()})
        assert {n: list(t.shape) for n, t in back.items()} == {n: list(t.shape) for n, t in state.items()}


def test_golden_preprocessing(goldens):
    root = goldens / "blip2" / "preproc"
    images = read_golden(root / "golden.json")["images"]
    for name, e in images.items():
        with Image.open(root / e["file"]) as image:
            pixels = blip2.preprocess_image(image, int(name.split("@")[1]))
        got = [float(pixels[tuple(i)]) for i in e["indices_chw"]]
        close(torch.tensor(got), torch.tensor(e["lavis_eval"]["values"]), 1e-5, 0)


def test_golden_position_interpolation(goldens):
    io = read_golden(goldens / "blip2" / "pos_embed_interpolation.safetensors")
    size = math.isqrt(io["out.pos_embed"].shape[1] - 1)
    close(blip2.resize_positions(io["in.pos_embed"], size, size), io["out.pos_embed"], 1e-6)


def test_golden_text_processing(goldens):
    g = read_golden(goldens / "blip2" / "lavis_text_processing.json")
    for name, cases in g.items():
        if name == "source":
            continue
        for text, expected in cases:
            if name == "blip_question":
                assert blip2.question_text(text) == expected
            elif name == "vqa_prompt":
                assert blip2.Blip2Processor.QUESTION_PROMPT.format(blip2.question_text(text)) == expected
            else:
                words = int(name.split("max_words=")[1]) if "max_words=" in name else 50
                prompt = name.split("'")[1] if "prompt=" in name else ""
                assert prompt + blip2.caption_text(text, words) == expected, name


def test_golden_tokenizers(goldens, tokenizers_dir):
    if tokenizers_dir is None:
        pytest.skip("needs the published tokenizer files: pass --tokenizers DIR")
    g = read_golden(goldens / "blip2" / "tokenizer_golden.json")
    opt, t5, bert = (
        blip2.Blip2Tokenizer(tokenizers_dir / d, k)
        for d, k in (("opt", "opt"), ("t5", "t5"), ("bert-base-uncased", "bert"))
    )
    count = 0
    for section, cases in g.items():
        for text, ids in cases.items():
            if section.startswith("opt"):
                got = [opt.begin, *opt.encode(text)]
            elif section.startswith("t5"):
                got = [*t5.encode(text), t5.eos]
            elif section.startswith("bert"):
                got = [bert.begin, *bert.encode(text), bert.eos]
            elif text == "opt newline":
                got, ids = opt.encode("\n"), [ids]
            else:
                content = text.split("'")[1]
                got = (
                    [opt.begin, *opt.encode(content)]
                    if text.startswith("opt")
                    else [*t5.encode(content), t5.eos]
                )
            assert got == ids, (section, text)
            count += 1
    assert count > 40


def test_golden_schedule(goldens):
    g = read_golden(goldens / "blip2" / "lavis_lr_schedule.json")
    for name, case in g.items():
        if name == "source":
            continue
        c, per_epoch = case["config"], case["iters_per_epoch"]
        cfg = loop.Config(
            learning_rate=c["init_lr"],
            eta_min=c["min_lr"],
            warmup_start_lr=c["warmup_lr"],
            warmup_steps=c["warmup_steps"],
            lr_scheduler_type="cosine_epochs",
            num_train_epochs=c["max_epoch"],
        )
        for epoch, step, lr in case["epoch_step_lr"]:
            ours = loop.learning_rate_at(epoch * per_epoch + step, per_epoch * c["max_epoch"], cfg, epoch)
            assert abs(ours - lr) < 1e-12, (name, epoch, step)


def test_golden_optimizer_groups(goldens):
    g = read_golden(goldens / "blip2" / "lavis_optimizer_groups.json")
    groups = g["stage1 (ViT frozen)"]
    names = {n for group in groups for n in group["params"]}
    layers = {int(n.split(".")[4]) for n in names if n.startswith("Qformer.bert.encoder.layer.")}
    cross = min(
        (
            i
            for i in layers
            if i and f"Qformer.bert.encoder.layer.{i}.crossattention.self.query.weight" in names
        ),
        default=1,
    )
    config = {
        **vlm.shape("blip2-stage1"),
        "vision_config": {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
        },
        "qformer_config": {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "vocab_size": 20,
            "encoder_hidden_size": 16,
            "num_hidden_layers": len(layers),
            "cross_attention_frequency": cross,
            "use_qformer_text_input": True,
        },
    }
    model = blip2.build_model(config)
    cfg = loop.Config(stage="pretrain1", weight_decay=0.05, decay_scalars=True)
    build.choose_trainable(model, blip2.MODEL, cfg)
    by_id = {id(p): n for n, p in model.named_parameters()}
    ours = {
        group["weight_decay"]: {by_id[id(p)] for p in group["params"]}
        for group in build.make_optimizer(model, cfg).param_groups
    }
    theirs = {}
    for group in groups:
        theirs.setdefault(group["weight_decay"], set()).update(filter(None, map(lavis_name, group["params"])))
    assert ours == theirs
