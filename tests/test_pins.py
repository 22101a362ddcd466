"""What other programs compute, where else only our own runs would be compared with each other: schedules and
the optimiser's step against transformers and torch, minimal lengths, norm epsilons, order of images, borders
of segments."""

import copy

import pytest
import torch
import transformers
from PIL import Image

import build
import data
import model_blip2
import parallel
import records
import train
import vlm
from config import Config
from generate import Decoding, generate


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_learning_rates_are_those_of_transformers(kind, warmup):
    total, peak = 20, 3e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    cfg = Config(learning_rate=peak, lr_scheduler_type=kind, warmup_steps=warmup)
    for step in range(total):
        assert train.learning_rate_at(step, total, cfg) == pytest.approx(
            theirs.get_last_lr()[0], rel=1e-9, abs=0
        )
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e3])
def test_a_step_is_torchs_clipping_and_adamw(max_grad_norm):
    """Gradients as small as epsilon, so that its place counts; no decay on biases and norms."""
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3)).double()
    theirs = copy.deepcopy(ours)
    cfg = Config(learning_rate=1e-2, adam_epsilon=1e-3, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95)
    optimizer, scaler = build.make_optimizer(ours, cfg), train.LossScaler(False)
    decayed = [p for n, p in theirs.named_parameters() if n in ("0.weight", "2.weight")]
    plain = [p for n, p in theirs.named_parameters() if n not in ("0.weight", "2.weight")]
    reference = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.8, 0.95),
        eps=1e-3,
        weight_decay=0.1,
    )
    world = parallel.World(0, 1, torch.device("cpu"))
    for n in range(4):
        x = torch.randn(7, 6, dtype=torch.float64) * (1e-3 if n % 2 else 10)
        for model in (ours, theirs):
            model(x).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm)
        reference.step()
        reference.zero_grad()
        found = train.clip_and_step(dict(ours.named_parameters()), optimizer, max_grad_norm, scaler, world)
        assert float(found) == pytest.approx(float(norm), rel=1e-9)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            # the fused optimiser takes the clipping factor in fp32
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("wrong", [None, "loss", "gradient"])
def test_without_a_finite_loss_and_gradient_there_is_no_update(wrong):
    """The host reads neither before the update, so the optimiser itself leaves it out."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5)
    before, optimizer = copy.deepcopy(model), build.make_optimizer(model, Config(weight_decay=0.1))
    loss = model(torch.randn(7, 6)).square().sum()
    loss.backward()
    if wrong == "gradient":
        model.weight.grad[0, 0] = float("inf")
    loss = loss.detach() * (float("nan") if wrong == "loss" else 1)
    world, scaler = parallel.World(0, 1, torch.device("cpu")), train.LossScaler(False)
    train.clip_and_step(dict(model.named_parameters()), optimizer, 1.0, scaler, world, loss=loss)
    assert torch.equal(model.weight, before.weight) == (wrong is not None)
    assert {float(state["step"]) for state in optimizer.state.values()} == {0.0 if wrong else 1.0}


def tiny_opt() -> tuple:
    """The same random OPT as ours inside BLIP-2, and as transformers'."""
    text = {
        "model_type": "opt",
        "vocab_size": 40,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "max_position_embeddings": 48,
        "word_embed_proj_dim": 24,
        "dropout": 0.0,
        "eos_token_id": 5,
        "bos_token_id": 2,
        "pad_token_id": 1,
    }
    vision = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "image_size": 14,
    }
    qformer = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "encoder_hidden_size": 16,
        "vocab_size": 20,
    }
    config = {
        "model_type": "blip-2",
        "num_query_tokens": 2,
        "image_token_index": None,
        "vision_config": vision,
        "qformer_config": qformer,
        "text_config": text,
    }
    ours = model_blip2.build_model(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(
                torch.ones_like(p)
                if "norm" in name and name.endswith("weight")
                else torch.randn_like(p) * 0.4
            )
    theirs = transformers.OPTForCausalLM(
        transformers.OPTConfig(**{k: v for k, v in text.items() if k != "model_type"})
    )
    state = {
        n.removeprefix("language_model."): p
        for n, p in ours.state_dict().items()
        if n.startswith("language_model.")
    }
    missing, extra = theirs.load_state_dict(state, strict=False)
    assert not extra and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("least", [0, 3, 4, 7, 8, 14])
def test_min_length_counts_the_prompt_as_transformers_does(least):
    """The end is a token that each prompt's answer has early, so that the minimum decides."""
    ours, theirs = tiny_opt()
    for prompt, end in (([2, 7, 9], 11), ([2, 12], 11), ([2, 30, 31, 8], 36)):
        options = {
            "max_new_tokens": 14,
            "min_length": least,
            "do_sample": False,
            "eos_token_id": end,
            "pad_token_id": 1,
        }
        ids = torch.tensor([prompt])
        with torch.no_grad():
            expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
        request = {"input_ids": prompt, "image_starts": [], "pixel_values": []}
        (found,) = generate(ours, [request], Decoding(14, min_length=least), [[end]])
        assert [*prompt, *found] == expected


def test_norm_epsilons_are_those_of_transformers():
    ours, _ = tiny_opt()
    raw = ours.config.raw
    theirs = transformers.Blip2ForConditionalGeneration(
        transformers.Blip2Config(
            vision_config=raw["vision_config"],
            qformer_config=raw["qformer_config"],
            text_config=raw["text_config"],
            num_query_tokens=2,
        )
    )
    expected = {n: m.eps for n, m in theirs.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    found = {n: m.eps for n, m in ours.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    expected = {
        n.replace("model.vision_model", "vision_model").removeprefix("model."): e for n, e in expected.items()
    }
    common = found.keys() & expected.keys()
    kinds = ("vision_model.encoder", "vision_model.post_layernorm", "qformer.layernorm", "qformer.encoder")
    assert all(any(n.startswith(kind) for n in common) for kind in kinds), (sorted(found), sorted(expected))
    assert {n: found[n] for n in common} == {n: expected[n] for n in common}
    assert len(set(found.values())) > 1  # they do differ from part to part


def test_images_of_a_sample_stay_in_their_order(tmp_path):
    """Through the reader, the processor, the batch and the model: the k-th features stand at the k-th image's
    slots."""
    processor = data.load_processor(str(data.ROOT / "samples/tiny_qwen_vl"))
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("c.png", "green")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / name)
    names = ["b.png", "a.png", "c.png"]
    content = [str(tmp_path / name) for name in names]
    conversation = records.request([("user", "x <image> y <image> z <image>")], content, "test")
    sample = {**processor.encode(conversation, 512), "num_image_tokens": processor.num_image_tokens}
    other = {
        "input_ids": sample["input_ids"][:3],
        "labels": sample["labels"][:3],
        "image_starts": [],
        "images": [],
        "num_image_tokens": processor.num_image_tokens,
    }
    batch = data.collate([data.attach_images(other, processor), data.attach_images(sample, processor)])
    assert torch.equal(batch.pixel_values, torch.stack([processor.load_image(p) for p in content]))
    slots = batch.image_positions
    assert (slots[1:, 0] > slots[:-1, -1]).all()
    assert (batch.input_ids[slots[:, 0] - 1] == processor.tokenizer.img_start).all()


def test_losses_by_dataset_end_at_the_borders_of_segments():
    """Supervised at both ends of each segment; two of one dataset stand around one of the other."""
    targets = torch.tensor([4, -100, 5, 6, 7, -100, -100, 8, 9])  # segments of 3, 1, 5 tokens
    batch = vlm.Batch(
        input_ids=targets,
        position_ids=torch.arange(9),
        targets=targets,
        cu_seqlens=torch.tensor([0, 3, 4, 9], dtype=torch.int32),
        dataset_ids=torch.tensor([1, 0, 1]),
    )
    sums = train.losses_by_dataset(batch, torch.tensor([1.0, 2.0, 10.0, 100.0, 200.0, 400.0]), 3)
    assert sums[:, 0].tolist() == [[10.0, 1.0], [703.0, 5.0], [0.0, 0.0]]
