"""VisualGLM against frozen outputs of the original implementations, the Hugging Face code and
SwissArmyTransformer (SAT): 1e-5 on features, hidden states, logits and losses, 1e-4 relative on gradients;
greedy tokens, ids and labels exactly."""

import dataclasses
import fnmatch
import functools
import hashlib
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import read_golden
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint
import lora
import merge
import model_visualglm as glm
import tokenizer_visualglm
import vlm
from convert import sat
from generate import Decoding, generate
from quantize import quantize
from sampling import penalise_repetition, sampling_probs, seen_mask

ROOT = Path(__file__).resolve().parent.parent


class Variant:
    def __init__(self, path):
        self.golden = read_golden(path / "golden.json")
        self.sat = read_golden(path / "sat_golden.json")
        self.io, self.sat_io = (
            read_golden(path / "golden.safetensors"),
            read_golden(path / "sat_golden.safetensors"),
        )
        self.config, self.cases = {"model_type": "chatglm", **self.golden["config"]}, self.golden["cases"]
        self.weights = load_file(path / "weights.safetensors")
        sat_weights = path / "sat_weights.safetensors"
        self.sat_weights = load_file(sat_weights) if sat_weights.exists() else None
        self.special = [self.config[k] for k in ("bos_token_id", "gmask_token_id", "mask_token_id")]

    def model(self, **overrides):
        model = glm.build_model({**self.config, **overrides})
        ignored = [n for n in self.weights if any(fnmatch.fnmatch(n, p) for p in glm.MODEL.ignored_weights)]
        missing, unexpected = model.load_state_dict(self.weights, strict=False)
        assert sorted(unexpected) == sorted(ignored) and all("prefix_encoder" in n for n in missing)
        return model.eval()

    def rows(self, name):
        """The case's rows without their pads, each with the place of its first token in the padded row."""
        ids = self.io[f"{name}.input_ids"]
        mask = self.io.get(f"{name}.attention_mask", torch.ones_like(ids)).bool()
        return [(row[keep], int(keep.int().argmax())) for row, keep in zip(ids, mask, strict=True)]

    def batch(self, name):
        """One stream of the case's rows, without their pads."""
        rows = [row for row, _ in self.rows(name)]
        ids, lengths = torch.cat(rows), torch.tensor([0] + [len(row) for row in rows])
        placed = [glm.glm_positions(row, *self.special) for row in rows]
        cu_seqlens = lengths.cumsum(0).int()
        images = self.io.get(f"{name}.images")
        batch = vlm.Batch(
            input_ids=ids,
            cu_seqlens=cu_seqlens,
            pixel_values=images,
            position_ids=torch.from_numpy(np.concatenate([p for p, _ in placed], 1)),
            prefix_lens=torch.tensor([n for _, n in placed]),
        )
        if images is not None:
            first = cu_seqlens[:-1, None].long() + self.cases[name]["pre_image_length"]
            batch.image_positions = first + torch.arange(self.config["image_length"])
        if f"{name}.labels" in self.io:
            labels = self.io[f"{name}.labels"]
            targets = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), 1).flatten()
            batch = dataclasses.replace(batch, targets=targets)
        return batch


read_variant = functools.cache(Variant)


@pytest.fixture
def variant(visualglm_variant):
    return read_variant(visualglm_variant)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a.float(), b.float(), atol=atol, rtol=0)


IMAGE_CASES = ["image", "image2", "image_batch"]


@torch.no_grad()
@pytest.mark.parametrize("case", IMAGE_CASES)
def test_golden_vision(variant, case):
    model, io = variant.model(), variant.io
    images = io[f"{case}.images"]
    N = len(images)
    vit, _ = model.image_encoder.vit(images)
    close(vit.unflatten(0, (N, -1)), io[f"{case}.vit_output"])
    close(model.image_encoder.qformer(vit, N).unflatten(0, (N, -1)), io[f"{case}.qformer_output"])
    close(model.encode_images(images), io[f"{case}.glm_proj_output"])


LOGIT_CASES = [*IMAGE_CASES, "text", "text_answer", "mask_token", "mask_and_gmask"]


@torch.no_grad()
@pytest.mark.parametrize("case", LOGIT_CASES)
def test_golden_logits(variant, case):
    model, io, batch = variant.model(), variant.io, variant.batch(case)
    seen = []
    hooks = [b.register_forward_pre_hook(lambda _m, args: seen.append(args[0])) for b in model.blocks]
    keys = {}
    rotated = model.context(batch)
    q = model.blocks[0].input_layernorm(model.embed(batch))
    attention = model.blocks[0].attention
    qkv = attention.query_key_value(q).unflatten(-1, (-1, 3, attention.head_dim)).unbind(2)
    keys["key"] = torch.cat(
        [glm.rotary(h, rotated.cos[i], rotated.sin[i]) for i, h in enumerate(qkv[1].chunk(2, -1))], -1
    )
    keys["value"] = qkv[2]
    x = model.hidden(batch)
    for hook in hooks:
        hook.remove()
    logits, S = model.logits(x), len(io[f"{case}.input_ids"])
    close(logits.unflatten(0, (S, -1)), io[f"{case}.logits"])
    if f"{case}.position_ids" in io:
        assert torch.equal(
            batch.position_ids.unflatten(1, (S, -1)).transpose(0, 1), io[f"{case}.position_ids"]
        )
    if f"{case}.attention_mask_4d_true_is_blocked" in io:
        i = torch.arange(len(x) // S)
        blocked = [(i > i[:, None]) & (i >= n) for n in batch.prefix_lens]
        assert torch.equal(torch.stack(blocked)[:, None], io[f"{case}.attention_mask_4d_true_is_blocked"])
    if f"{case}.hidden_states" in io:
        last = model.transformer.final_layernorm(x)
        states = torch.stack([h.unflatten(0, (S, -1)) for h in (*seen, last)])
        # the blocks' reach 7: the original's fp32 and ours are each 7e-6 from fp64 there
        scale = io[f"{case}.hidden_states"].abs().amax().clamp(min=1)
        close(states / scale, io[f"{case}.hidden_states"] / scale)
    if f"{case}.kv_layer0_key" in io:
        for kind, value in keys.items():
            close(value[:, None], io[f"{case}.kv_layer0_{kind}"])
    if f"{case}.logits_exact_inv_freq" in io:
        exact = variant.model(exact_inv_freq=True)
        close(exact.logits(exact.hidden(batch)), io[f"{case}.logits_exact_inv_freq"][0])
        close(exact.logits(exact.hidden(batch)), variant.sat_io[f"sat.{case}.logits"][0])


@torch.no_grad()
def test_golden_long_text(variant):
    """Positions past 200, where rounded and exact frequencies part."""
    batch = variant.batch("long_text")
    for exact, name in ((False, "logits_last8"), (True, "logits_last8_exact_inv_freq")):
        model = variant.model(exact_inv_freq=exact)
        close(model.logits(model.hidden(batch)[-8:]), variant.io[f"long_text.{name}"][0])


@torch.no_grad()
def test_golden_left_padded_rows_are_their_rows(variant):
    batch, io = variant.batch("leftpad"), variant.io
    for exact, expected in ((False, io["leftpad.logits"]), (True, variant.sat_io["sat.leftpad.logits"])):
        model = variant.model(exact_inv_freq=exact)
        logits = model.logits(model.hidden(batch)).split(batch.cu_seqlens.diff().tolist())
        positions = batch.position_ids.split(batch.cu_seqlens.diff().tolist(), dim=1)
        for i, (_, first) in enumerate(variant.rows("leftpad")):
            close(logits[i], expected[i, first:])
            assert torch.equal(positions[i], io["leftpad.position_ids"][i, :, first:])
            if not exact:
                close(logits[i], io[f"leftpad.logits_single_{i}"][0])


def mean_loss(model, batch):
    loss_sum, row_losses = model(batch)
    return loss_sum / len(row_losses)


def check_norms(expected: dict, grads: dict):
    assert expected
    for name, norm in expected.items():
        ours = float(grads[name].norm()) if grads.get(name) is not None else 0.0
        assert abs(ours - norm) <= 1e-4 * norm + 2e-6, (name, ours, norm)


def test_golden_loss_and_gradients(variant):
    model, batch, case = variant.model(), variant.batch("train"), variant.cases["train"]
    close(
        model.logits(model.hidden(batch)).unflatten(0, (len(variant.io["train.labels"]), -1)),
        variant.io["train.logits"],
    )
    loss = mean_loss(model, batch)
    assert abs(loss.item() - case["loss_value"]) < 1e-5
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert set(case["grad_norms"]) <= set(grads)
    check_norms(case["grad_norms"], grads)
    full = {n.removeprefix("train.grad."): g for n, g in variant.io.items() if n.startswith("train.grad.")}
    assert full
    for name, grad in full.items():
        close(grads[name], grad, 1e-4 * float(grad.abs().max()) + 1e-7)


@torch.no_grad()
@pytest.mark.parametrize("case", ["hf_ptuning", "hf_ptuning_proj"])
def test_golden_ptuning_of_hf(variant, case):
    options = {k: variant.cases[case][k] for k in ("pre_seq_len", "prefix_projection")}
    model = variant.model(**options)
    prefix = {
        n.removeprefix(f"{case}."): t for n, t in variant.io.items() if n.startswith(f"{case}.transformer.")
    }
    assert prefix.keys() == {
        n for n in dict(model.named_parameters()) if fnmatch.fnmatch(n, glm.MODEL.prefix_tuning)
    }
    model.load_state_dict(prefix, strict=False)
    close(model.logits(model.hidden(variant.batch(case))), variant.io[f"{case}.logits"][0])


def test_golden_ptuning_of_sat(variant):
    golden = variant.sat["ptuning"]
    model = variant.model(pre_seq_len=golden["pre_seq_len"], exact_inv_freq=True)
    names = [f"mixins.ptuning.prefix.{i}" for i in range(len(model.blocks))]
    with torch.no_grad():  # (layers, 2, H, P, D) -> (P, layers * 2 * H * D)
        prefix = torch.stack([variant.sat_io[f"ptuning.{n}"] for n in names])
        model.transformer.prefix_encoder.embedding.weight.copy_(prefix.permute(3, 0, 1, 2, 4).flatten(1))
    batch = variant.batch("train")
    logits = model.logits(model.hidden(batch))
    close(logits.unflatten(0, (len(variant.io["train.labels"]), -1)), variant.sat_io["ptuning.train_logits"])
    loss = mean_loss(model, batch)
    assert abs(loss.item() - golden["loss"]) < 1e-5
    loss.backward()
    grad = model.transformer.prefix_encoder.embedding.weight.grad.unflatten(1, (len(model.blocks), -1))
    check_norms(golden["grad_norms"], {name: grad[:, i] for i, name in enumerate(names)})


def test_golden_sat_names(variant):
    """Names and row order of SAT's file, there and back bit for bit."""
    heads, names = variant.config["num_attention_heads"], variant.sat["name_map_sat_to_hf"]
    ours = dict(variant.model().named_parameters())
    assert {sat.sat_name(n): n for n in ours} == names
    assert {
        n for n in ours if not torch.equal(sat.repack_qkv(n, ours[n], heads, to_sat=True), ours[n])
    } == set(variant.sat["qkv_permuted"])
    for name, tensor in ours.items():
        theirs = sat.repack_qkv(name, tensor, heads, to_sat=True)
        assert torch.equal(sat.repack_qkv(name, theirs, heads, to_sat=False), tensor)
        if variant.sat_weights is not None:
            assert torch.equal(theirs, variant.sat_weights[sat.sat_name(name)])


def requests_of(variant, case):
    """The case's rows as requests."""
    requests, images = (
        [],
        variant.io.get(f"{case}.images", variant.io.get(f"{case.removesuffix('_rp12')}.images")),
    )
    start = variant.cases[case.removesuffix("_rp12")].get("pre_image_length")
    for i, (row, _) in enumerate(variant.rows(case)):
        positions, context = glm.glm_positions(row, *variant.special)
        requests.append(
            {
                "input_ids": row.numpy(),
                "position_ids": positions,
                "prefix_len": context,
                "seen": row.tolist(),
                "image_starts": [] if images is None else [start],
                "pixel_values": [] if images is None else [images[i]],
            }
        )
    return requests


@pytest.mark.parametrize(
    "case", ["generate_image", "generate_image_rp12", "generate_text", "generate_leftpad"]
)
def test_golden_greedy(variant, case):
    model, eos, requests = variant.model(), variant.config["eos_token_id"], requests_of(variant, case)
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in variant.cases[case]["new_tokens"]]
    options = {"repetition_penalty": 1.2 if case.endswith("_rp12") else 1.0}
    steps = variant.io[f"{case}.scores"].shape[1]
    assert generate(model, requests, Decoding(steps, **options), [[eos]]) == expected
    for request, row in zip(requests, expected, strict=True):
        assert generate(model, [request], Decoding(steps, **options), [[eos]]) == [row]


@torch.no_grad()
@pytest.mark.parametrize("case", ["generate_image", "generate_leftpad"])
def test_golden_scores_of_every_step(variant, case):
    """Decoding with the cache gives the logits of the whole text at once."""
    model, eos, scores = variant.model(), variant.config["eos_token_id"], variant.io[f"{case}.scores"]
    seen, forward = {}, model.forward

    def watch(batch, output="loss"):
        result = forward(batch, output)
        if output == "logits":  # a sequence is known by where its rows of the pool begin
            for row, start in zip(result, batch.cache.starts, strict=True):
                seen.setdefault(start, []).append(row)
        return result

    model.forward = watch
    generate(model, requests_of(variant, case), Decoding(scores.shape[1]), [[eos]])
    for rows, expected in zip(seen.values(), scores, strict=True):
        close(torch.stack(rows), expected[: len(rows)])


@torch.no_grad()
def test_generation_with_ptuning_equals_the_whole_text_at_once(visualglm_variant):
    variant = Variant(visualglm_variant)
    model, requests = variant.model(pre_seq_len=3), requests_of(variant, "generate_leftpad")
    model.transformer.prefix_encoder.embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
    answers = generate(model, requests, Decoding(6), [])
    plain = generate(variant.model(), requests, Decoding(6), [])
    assert answers != plain
    for request, answer in zip(requests, answers, strict=True):
        ids = torch.tensor([*request["input_ids"], *answer])
        positions, context = glm.glm_positions(ids, *variant.special)
        batch = vlm.Batch(
            input_ids=ids,
            position_ids=torch.from_numpy(positions),
            prefix_lens=torch.tensor([context]),
            cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        )
        best = model.logits(model.hidden(batch)).argmax(-1)
        assert best[len(request["input_ids"]) - 1 : -1].tolist() == answer


def test_golden_sampling_of_hf(variant):
    io = variant.io
    logits, ids = io["sampling_hf.logits"][0], io["sampling_hf.input_ids"][0].tolist()
    row = penalise_repetition(logits, seen_mask(ids, len(logits)), 1.2)
    row[variant.config["eos_token_id"]] = float("-inf")
    expected = io["sampling_hf.after_processors"][0]
    finite = expected > torch.finfo(torch.float32).min
    close(row[finite], expected[finite])
    close(
        sampling_probs(row[None], temperature=0.8, top_k=100, top_p=0.4),
        io["sampling_hf.after_warpers_probs"],
    )


SAT_DEFAULTS = {"temperature": 0.95, "top_k": 30, "top_p": 0.7}  # of its chat function


def test_golden_sampling_of_sat(variant):
    io = variant.sat_io
    logits = variant.io["sampling_hf.logits"][0]
    close(sampling_probs(logits[None], **SAT_DEFAULTS), io["sat.sampling.probs"])
    answer = io["sat.sampling_rp.tokens"][0].tolist()[len(variant.io["sampling_hf.input_ids"][0]) :]
    row = penalise_repetition(logits, seen_mask(answer, len(logits)), 1.2, always_divide=True)
    close(sampling_probs(row[None], **SAT_DEFAULTS), io["sat.sampling_rp.probs"])


def test_answers_are_not_shorter_than_asked(variant):
    model, requests = variant.model(), requests_of(variant, "generate_leftpad")
    stop = [
        [t] for t in {row[0] for row in variant.cases["generate_leftpad"]["new_tokens"]}
    ]  # every one stops at once
    shortest = min(len(r["input_ids"]) for r in requests)
    assert [len(a) for a in generate(model, requests, Decoding(5), stop)] == [1] * len(requests)
    answers = generate(model, requests, Decoding(12, min_length=shortest + 8), stop)
    lengths = [len(a) + len(r["input_ids"]) for a, r in zip(answers, requests, strict=True)]
    assert min(lengths) > shortest + 8 or max(map(len, answers)) == 12
    assert all(n >= shortest + 8 for n in lengths)


def sat_parts(layer: int, tensors: dict, heads: int, of=lambda t: t) -> dict:
    """One layer's LoRA tensors (or their gradients) under SAT's names: q, k, v apart."""
    out, prefix = {}, f"transformer.layers.{layer}.attention."
    for module in ("query_key_value", "dense"):
        A, B = (of(tensors[f"{prefix}{module}.lora_{side}.weight"]) for side in "AB")
        parts = 3 if module == "query_key_value" else 1
        blocks = B.unflatten(1, (parts, -1)).unflatten(0, (heads if parts == 3 else 1, parts, -1))
        for j in range(parts):
            out[f"{prefix}{module}.matrix_A.{j}"] = A.chunk(parts)[j]
            out[f"{prefix}{module}.matrix_B.{j}"] = blocks[:, j, :, j]  # a view: (groups, D, r)
    return out


@pytest.fixture
def official_lora(variant):
    """A model with SAT's adapter in it: layers by list, an A and a B for each of q, k, v."""
    golden, model, heads = (
        variant.sat["lora"],
        variant.model(exact_inv_freq=True),
        variant.config["num_attention_heads"],
    )
    layers = "|".join(map(str, golden["layer_range"]))
    targets = [rf"transformer\.layers\.({layers})\.attention\.{m}" for m in ("query_key_value", "dense")]
    names = lora.inject(
        model, targets, golden["rank"], golden["lora_alpha"], 0.0, glm.lora_parts(model.config)
    )
    assert len(names) == 2 * len(golden["layer_range"])
    for name, p in model.named_parameters():
        p.requires_grad_(".lora_" in name)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for layer in golden["layer_range"]:
            for name, view in sat_parts(layer, parameters, heads).items():
                view.copy_(variant.sat_io[f"lora.{name}"].view_as(view))
    return model, names


def test_golden_lora_of_sat(variant, official_lora):
    golden, heads = variant.sat["lora"], variant.config["num_attention_heads"]
    model, names = official_lora
    assert all(model.get_submodule(n).scaling == golden["scaling"] for n in names)
    batch = variant.batch("train")
    logits = model.logits(model.hidden(batch)).unflatten(0, (len(variant.io["train.labels"]), -1))
    close(logits, variant.sat_io["lora.train_logits"])
    loss = mean_loss(model, batch)
    assert abs(loss.item() - golden["loss"]) < 1e-5
    loss.backward()
    parameters, grads = dict(model.named_parameters()), {}
    for layer in golden["layer_range"]:
        grads |= sat_parts(layer, parameters, heads, of=lambda p: p.grad)
    grads = {n: g.reshape(-1, g.shape[-1]) for n, g in grads.items()}
    assert {n: list(g.shape) for n, g in grads.items()} == golden["trainable"]
    check_norms(golden["grad_norms"], grads)
    trained = sum(p.numel() for n, p in parameters.items() if p.grad is not None)
    counted = sum((p.grad != 0).sum().item() for p in parameters.values() if p.grad is not None)
    assert counted <= sum(g.numel() for g in grads.values()) < trained  # nothing flows between the parts


def write_checkpoint(directory, variant, config=None):
    directory.mkdir()
    checkpoint.write_json(directory / "config.json", config or {**variant.config, "model_type": "chatglm"})
    checkpoint.save_weights(directory, variant.weights.items())
    return directory


def test_golden_lora_file_merges_into_packed_rows(variant, official_lora, tmp_path):
    """Saved as an ordinary adapter, read back, folded: the rows of SAT's merged weights, also in SAT's own
    file."""
    golden = variant.sat["lora"]
    model, names = official_lora
    parameters = dict(model.named_parameters())
    lora.save_adapter(
        tmp_path,
        model,
        lora.LoraConfig("base", golden["rank"], golden["lora_alpha"], 0.0),
        names,
        [],
        lambda n: parameters[n].detach(),
    )
    config, tensors = lora.read_adapter(tmp_path)
    scalings, extra = lora.adapter_updates(
        config, tensors, {n: p.shape for n, p in variant.model().named_parameters()}
    )
    assert sorted(scalings) == sorted(names) and not extra
    base = write_checkpoint(tmp_path / "base", variant)
    weights, merged = checkpoint.open_weights(base), tmp_path / "merged"
    merged.mkdir()
    update = merge.Update(weights, scalings, tensors)
    checkpoint.save_weights(merged, ((n, update.merged(n)) for n in weights))
    checkpoint.write_json(merged / "config.json", checkpoint.read_config(base))
    sat.main(["export", str(merged), str(tmp_path / "sat"), "--qkv", "split"])
    state = torch.load(tmp_path / "sat" / "1" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    expected = {
        n.removeprefix("lora.merged."): t for n, t in variant.sat_io.items() if n.startswith("lora.merged.")
    }
    assert expected
    for name, tensor in expected.items():
        close(state[name], tensor, 3e-6)
    again = variant.model(exact_inv_freq=True)
    lora.inject(again, names, 1, 1, 0.0)
    with pytest.raises(ValueError, match="lora_rank"):
        lora.load_adapter(again, tmp_path)
    loaded = variant.model(exact_inv_freq=True)
    lora.load_adapter(loaded, tmp_path)
    batch = variant.batch("train")
    close(loaded.logits(loaded.hidden(batch)), model.logits(model.hidden(batch)), 1e-6)
    peft = pytest.importorskip("peft")
    wanted = variant.model(exact_inv_freq=True)
    wanted.prepare_inputs_for_generation = None  # PEFT asks for it
    theirs = peft.PeftModel.from_pretrained(wanted, str(tmp_path)).base_model.model
    close(theirs.logits(theirs.hidden(batch)), model.logits(model.hidden(batch)), 1e-6)
    mixed = {
        lora.PREFIX + n: t + 1 for n, t in tensors.items()
    }  # an ordinary adapter can't go on as a split one
    save_file(mixed, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="lora_split"):
        lora.load_adapter(model, tmp_path)


@pytest.mark.parametrize("qkv", ["split", "per_head"])
def test_golden_sat_checkpoints_there_and_back(variant, tmp_path, qkv):
    """Ours -> SAT -> ours, bit for bit and with the same configuration; SAT's own file gives SAT's logits."""
    config = {**variant.config, "model_type": "chatglm"}
    base = write_checkpoint(tmp_path / "base", variant)
    sat.main(["export", str(base), str(tmp_path / "sat"), "--qkv", qkv])
    sat.main(["import", str(tmp_path / "sat"), str(tmp_path / "again"), "--qkv", qkv])
    again = checkpoint.open_weights(tmp_path / "again")
    kept = {n for n in variant.weights if not n.endswith("inv_freq")}
    assert again.names == kept and all(torch.equal(again.read(n), variant.weights[n]) for n in kept)
    back = glm.VisualGLMConfig.from_dict(checkpoint.read_config(tmp_path / "again"))
    before = glm.VisualGLMConfig.from_dict(config)
    assert {**vars(back), "raw": None} == {**vars(before), "raw": None}
    state = torch.load(tmp_path / "sat" / "1" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    if variant.sat_weights is not None and qkv == "split":
        assert state.keys() - variant.sat_weights.keys() <= set(sat.LEFT_OUT)
        assert all(torch.equal(state[n], t) for n, t in variant.sat_weights.items() if n not in sat.LEFT_OUT)
    wrong = {"split": "per_head", "per_head": "split"}[qkv]
    sat.main(["import", str(tmp_path / "sat"), str(tmp_path / "wrong"), "--qkv", wrong])
    name = "transformer.layers.0.attention.query_key_value.weight"
    assert not torch.equal(checkpoint.open_weights(tmp_path / "wrong").read(name), variant.weights[name])
    with pytest.raises(ValueError, match="exists"):
        sat.main(["export", str(base), str(tmp_path / "sat"), "--qkv", qkv])
    del state["lm_head.weight" if "lm_head.weight" in state else "mixins.chatglm-final.lm_head.weight"]
    torch.save({"module": state}, tmp_path / "sat" / "1" / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match="missing mixins.chatglm-final.lm_head.weight"):
        sat.main(["import", str(tmp_path / "sat"), str(tmp_path / "third"), "--qkv", qkv])


@torch.no_grad()
@pytest.mark.parametrize("kind, limit", [("int8", 0.01), ("int4", 0.2)])
def test_golden_weights_quantised_close_to_fp32(variant, kind, limit):
    batch, exact, model = variant.batch("image"), variant.io["image.logits"][0], variant.model()
    linears = {
        n: m.weight
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and n.startswith("transformer.layers.")
    }
    report = quantize(model, kind, batch)
    logits = model.logits(model.hidden(batch))
    error = float((logits - exact).norm() / exact.norm())
    assert 0 < error < limit and f"{len(linears)} linear layers" in report
    for (
        name,
        weight,
    ) in linears.items():  # no weight is further off than half a step, up to the scale's fp16 rounding
        top = 2 ** (int(kind[3:]) - 1) - 1
        step = weight.abs().amax(1, keepdim=True) / top
        new = model.get_submodule(name).few
        assert ((new.weight(torch.float32) - weight).abs() <= step * (0.5 + top / 1024)).all()
        assert new.q.numel() * 8 // new.bits == weight.numel()


# --------------------------------------------------------------------------------------------------
# Files beside the variants


@pytest.fixture
def root(goldens):
    if not (goldens / "visualglm").is_dir():
        pytest.fail(f"no visualglm below {goldens}", pytrace=False)
    return goldens / "visualglm"


def test_golden_published_names_and_shapes(root):
    table = read_golden(root / "param_table.json")
    with torch.device("meta"):
        model = glm.build_model(vlm.shape("visualglm-6b"))
    ours = {name: list(p.shape) for name, p in model.named_parameters()}
    kinds = {
        kind: {n: t["shape"] for n, t in table["tensors"].items() if t["kind"] == kind}
        for kind in ("parameter", "buffer")
    }
    assert ours == kinds["parameter"] and model.state_dict().keys() == ours.keys()
    assert sum(math.prod(shape) for shape in ours.values()) == table["total_parameters"]
    assert len(table["tensors"]) == 1039
    frequencies = list(glm.inverse_frequencies(model.config.head_dim).shape)
    for name, shape in kinds["buffer"].items():
        assert any(fnmatch.fnmatch(name, p) for p in glm.MODEL.ignored_weights) and shape == frequencies
    for name in ours:
        assert sat.sat_name(name) == table["tensors"][name]["sat_name"]


def test_golden_rotary_tables(root):
    g = read_golden(root / "rotary_real.safetensors")
    head_dim = 4 * len(g["inv_freq_exact"])
    for exact, suffix, inv_freq in (
        (True, "exact", "inv_freq_exact"),
        (False, "fp32_half_rounded_inv_freq", "inv_freq_half"),
    ):
        ours = glm.inverse_frequencies(head_dim, exact)
        close(ours, g[inv_freq], 1e-7)
        angles = g["positions"][:, None].float() * ours  # the original writes each angle twice
        close(angles.cos().repeat(1, 2), g[f"cos_{suffix}"], 2e-4 if exact else 1e-6)
        close(angles.sin().repeat(1, 2), g[f"sin_{suffix}"], 2e-4 if exact else 1e-6)


def test_golden_image_preprocessing(root):
    expected = read_golden(root / "image_golden.json")["images"]
    tensors = read_golden(root / "image_golden.safetensors")
    assert expected
    for name, e in expected.items():
        resized = tensors[f"{name}.resized_uint8_hwc"]
        with Image.open(root / e["file"]) as image:
            ours = glm.resize_image(image, len(resized))
            pixels = glm.preprocess_image(image, len(resized))
        assert np.array_equal(ours, resized.numpy())
        assert hashlib.sha256(ours.tobytes()).hexdigest() == e["sha256_resized"]
        close(pixels[:, ::16, ::16], tensors[f"{name}.normalized_every_16th"], 1e-6)
        if f"{name}.normalized" in tensors:
            close(pixels, tensors[f"{name}.normalized"], 1e-6)
        assert abs(float(pixels.double().abs().sum()) - e["abs_sum"]) < 1e-6 * e["abs_sum"]


@pytest.fixture(scope="session")
def tokenizer(tokenizers_dir):
    if tokenizers_dir is None or not (tokenizers_dir / "chatglm-6b/ice_text.model").exists():
        pytest.skip("needs the published chatglm-6b/ice_text.model: pass --tokenizers DIR")
    return tokenizer_visualglm.GLMTokenizer(tokenizers_dir / "chatglm-6b")


@pytest.fixture
def tokenizer_golden(root):
    return read_golden(root / "tokenizer_golden.json")


class Replacements(tokenizer_visualglm.CharacterMap):
    def __init__(self, table: dict[bytes, str]):
        self.table = table

    def longest(self, data, start):
        sizes = [n for n in range(1, 5) if data[start : start + n] in self.table]
        return (sizes[-1], self.table[data[start : start + sizes[-1]]]) if sizes else None

    def begins(self, data):
        return any(key.startswith(data) for key in self.table)


@pytest.mark.parametrize(
    "table",
    [
        {"é": "e", "e\u0301": "é", "x": " ", "  ": "B", "bcd": "Z", "\n": " "},
        dict.fromkeys(map(chr, range(128)), "a "),
    ],
)
def test_runs_are_normalised_as_characters_are(monkeypatch, table):
    tk, rng = tokenizer_visualglm.GLMTokenizer(ROOT / "samples/tiny_visualglm"), np.random.default_rng(0)
    monkeypatch.setattr(tk, "map", Replacements({key.encode(): value for key, value in table.items()}))
    runs = tk.map.runs()
    for _ in range(300):
        text = "".join(rng.choice([*"abcdex  y\né中", "e\u0301", "bcd"], rng.integers(1, 12)))
        found = []
        for pattern in (runs, re.compile(b"(?!)")):
            monkeypatch.setattr(tk, "runs", pattern)
            found.append(tk.normalise(text))
        assert found[0] == found[1]


def test_golden_tokenizer_strings(tokenizer, tokenizer_golden):
    g, tk = tokenizer_golden, tokenizer
    assert tk.vocab_size == g["vocab_size"]
    ids = [g[f"{t}_token_id"] for t in ("unk", "pad", "bos", "eos", "mask", "gmask")]
    assert [tk.unk, tk.pad, tk.sop, tk.eop, tk.mask, tk.gmask] == ids
    assert {i: tk.pieces[int(i)] for i in g["special_by_id"]} == g["special_by_id"]
    for s in g["strings"]:
        assert tk.encode(s["text"]) == s["ids"], s["text"]
        assert [tk.pieces[i] for i in s["ids"]] == s["tokens"]
        assert tk.decode(s["ids"]) == s["decoded"], s["text"]
        if "sp_only_ids" in s:
            assert tk.encode_plain(s["text"]) == s["sp_only_ids"], s["text"]
    for case in g["decode_cases"]:
        assert tk.decode(case["ids"]) == case["decoded"]
        assert tk.decode(case["ids"], skip_special=True) == case["decoded_skip_special"]
    for token in map(int, g["beyond_vocab"]):  # deviation: left out, not an error
        assert tk.decode([token]) == ""


def test_golden_left_padded_batch(tokenizer, tokenizer_golden):
    batch = tokenizer_golden["batch_leftpad"]
    for ids, mask, positions in zip(
        batch["input_ids"], batch["attention_mask"], batch["position_ids"], strict=True
    ):
        row = np.array(ids)[np.array(mask, bool)]
        ours, _ = glm.glm_positions(row, tokenizer.sop, tokenizer.gmask, tokenizer.mask)
        assert ours.tolist() == np.array(positions)[:, -len(row) :].tolist()


def test_golden_prompts_and_responses(tokenizer, tokenizer_golden):
    for case in tokenizer_golden["chat"]:
        history = [tuple(turn) for turn in case["history"]]
        language = "en" if "english" in case["name"] else "zh"
        Q = case.get("input_ids_hf", case["input_ids_sat"]).count(
            tokenizer.pad if "input_ids_hf" not in case else tokenizer.unk
        )
        assert bool(Q) == case["image"]
        text = glm.context_text(case["query"], history, language)
        assert ("<img></img>" if Q else "") + text == case["prompt"]
        if "input_ids_hf" in case:
            assert glm.chat_prompt(tokenizer, case["query"], history, Q, language) == case["input_ids_hf"]
        assert (
            glm.chat_prompt(tokenizer, case["query"], history, Q, language, tokenizer.pad)
            == case["input_ids_sat"]
        )
        assert glm.context_ids(tokenizer, text, Q, 0)[1] == ([case["pre_image"]] if Q else [])
        if "context_length" in case:
            positions, context = glm.glm_positions(
                case["input_ids_hf"], tokenizer.sop, tokenizer.gmask, tokenizer.mask
            )
            assert (context, positions[0, -1]) == (case["context_length"], case["mask_position"])
    for case in tokenizer_golden["process_response"]:
        assert glm.clean_response(case["in"]) == case["out"]


def test_golden_finetuning_rows(tokenizer, tokenizer_golden):
    for setting in tokenizer_golden["finetune"]:
        limits = setting["max_source_length"], setting["max_target_length"]
        for row in setting["rows"]:
            text = glm.context_text(row["prompt"])
            context, starts = glm.context_ids(tokenizer, text, setting["image_length"], tokenizer.pad)
            ids, labels = glm.training_ids(tokenizer, context, row["label"], *limits)
            pads = sum(limits) - len(ids)
            ignored = -100 if setting["ignore_pad_token_for_loss"] else tokenizer.pad
            assert ids + [tokenizer.pad] * pads == row["input_ids"]
            assert labels + [ignored] * pads == row["labels"]
            assert starts == [row["pre_image"]]
