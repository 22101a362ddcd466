"""A learning rate for each part, against closed forms written down by hand, peft's LoRA+ groups and torch's
AdamW in a loop of its own; and the same on two ranks and after a kill."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from ranks import run
from small import arguments, assert_same_run, losses
from test_restart import killed

import build
import checkpoint
import data
import model_qwen_vl as qwen
import rates
import train
import vlm
from config import Config

ROOT = Path(__file__).resolve().parent.parent
# by hand: pattern of names -> layers above it, in the sample towers of four blocks
TOWERS = {
    "qwen_vl": {
        r"transformer\.visual\.(conv1|positional_embedding|ln_pre).*": 5,
        r"transformer\.visual\.transformer\.resblocks\.(\d)\..*": None,
        r"transformer\.visual\.(proj|ln_post.*)": 1,
    },
    "blip2": {
        r"vision_model\.embeddings\..*": 5,
        r"vision_model\.encoder\.layers\.(\d)\..*": None,
        r"vision_model\.post_layernorm\..*": 1,
    },
    "visualglm": {
        r"image_encoder\.vit\.transformer\.(word|position)_embeddings.*": 5,
        r"image_encoder\.vit\.mixins\.patch_embedding.*": 5,
        r"image_encoder\.vit\.transformer\.layers\.(\d)\..*": None,
        r"image_encoder\.vit\.mixins\.cls\.ln_vision.*": 1,
    },
}


def sample_model(kind: str, lora: bool = False, **keys):
    config = checkpoint.read_config(ROOT / f"samples/tiny_{kind}")
    definition = vlm.find(config)
    model, cfg = definition.network(config), Config(lora=lora, **keys)
    if lora:
        build.add_adapter(model, definition, cfg)
    build.choose_trainable(model, definition, cfg)
    return model, definition, cfg


@pytest.mark.parametrize("kind", TOWERS)
def test_layers_of_the_tower_and_rules_by_hand(kind):
    rules = {"*.1.*bias": 3e-3, "*bias": 2e-3}
    model, definition, cfg = sample_model(
        kind, learning_rate=1e-3, learning_rate_rules=rules, vision_lr_decay=0.8, weight_decay=0.1
    )
    found = rates.rates(model, definition, cfg)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == trainable.keys()
    for name, rate in found.items():
        peak = 1e-3
        if name.endswith("bias"):
            peak = 3e-3 if ".1." in name else 2e-3
        for pattern, above in TOWERS[kind].items():
            if match := re.fullmatch(pattern, name):
                peak *= 0.8 ** (4 - int(match[1]) if above is None else above)
        assert rate.factor * 1e-3 == pytest.approx(peak), name
    seen = set()
    names = {id(p): name for name, p in model.named_parameters()}
    for group in rates.param_groups(model, found, cfg):
        for p in group["params"]:
            name = names[id(p)]
            assert group["weight_decay"] == (0.0 if p.ndim < 2 or name.endswith("bias") else 0.1), name
            assert group["factor"] == found[name].factor
            assert name not in seen and not seen.add(name)
    assert seen == found.keys()
    sizes = [
        int(line.split()[2].replace(",", "")) for line in rates.table(model, found, cfg).splitlines()[1:]
    ]
    assert sum(sizes) == sum(p.numel() for p in trainable.values())


@pytest.mark.parametrize("kind", TOWERS)
def test_lora_plus_has_the_groups_of_peft(kind):
    model, definition, cfg = sample_model(kind, lora=True, learning_rate=1e-4, loraplus_lr_ratio=16.0)
    ours = rates.param_groups(model, rates.rates(model, definition, cfg), cfg)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16.0)
    rate = {p: group["lr"] for group in theirs.param_groups for p in group["params"]}
    assert {p: g["lr"] for g in ours for p in g["params"]} == pytest.approx(rate)
    assert sorted({g["lr"] for g in ours}) == pytest.approx([1e-4, 1.6e-3])


def test_lavis_temperature_keeps_its_decay():
    """BLIP-2's one number decays with decay_scalars, whatever rate it has."""
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})
    model.temp = torch.nn.Parameter(torch.tensor(0.07))
    cfg = Config(weight_decay=0.05, decay_scalars=True, learning_rate_rules={"temp": 1e-3})
    groups = rates.param_groups(model, rates.rates(model, None, cfg), cfg)
    assert [(g["weight_decay"], g["lr"], len(g["params"])) for g in groups] == [
        (0.05, pytest.approx(1e-3), 1),
        (0.05, 5e-5, 1),
        (0.0, 5e-5, 1),
    ]


def test_training_is_torchs_adamw_with_groups(base, dataset, tmp_path):
    """Warm-up and cosine with a floor scale every group; all samples in each step, so their order is none."""
    rules = {"transformer.visual.*": 1e-3, "*.attn.c_attn.*": 2e-3, "transformer.h.*": 5e-3}
    options = {"learning_rate": 1e-2, "learning_rate_rules": rules, "eta_min": 1e-3, "warmup_steps": 1}
    options |= {"max_steps": 4, "weight_decay": 0.1, "max_grad_norm": 0.0, "vision_lr_decay": 0.5}
    out = tmp_path / "out"
    run(arguments(base, dataset, out, per_device_train_batch_size=40, **options))

    model = qwen.build_model(checkpoint.read_config(base)).train()
    checkpoint.load_into(dict(model.named_parameters()), checkpoint.open_weights(base))
    processor = qwen.load_processor(base)
    index = data.build_index(dataset["train"], processor, 128, None, 0, False)
    plan = data.Plan(index, 0, 128)
    batch = data.collate([data.load_sample(plan, n, 0, processor) for n in range(len(index))])
    groups = []
    for name, p in model.named_parameters():
        share = 0.1 if "visual" in name else 0.2 if "c_attn" in name else 0.5 if ".h." in name else 1.0
        if "visual" in name and "attn_pool" not in name:
            block = re.search(r"resblocks\.(\d)", name)
            share *= 0.5 ** (
                2 - int(block[1]) if block else 1 if "post" in name or "proj" in name[-4:] else 3
            )
        decay = 0.0 if p.ndim < 2 or name.endswith("bias") else 0.1
        groups.append({"params": [p], "share": share, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, eps=1e-5)
    for step in range(4):
        rate = 1e-2 * step if step < 1 else 1e-3 + 9e-3 * (1 + math.cos(math.pi * (step - 1) / 3)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        loss = model(batch)[0] / batch.num_supervised
        assert losses(out)[step] == pytest.approx(loss.item(), abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = checkpoint.open_weights(out)
    for name, p in model.named_parameters():
        assert (trained.read(name) - p).abs().max() < 1e-4, name


RATES = {"learning_rate_rules": {"*.0.*": 3e-3, "*vi[st]*": 1e-3}, "vision_lr_decay": 0.7}
LORA_RATES = {**RATES, "loraplus_lr_ratio": 4.0, "lora": True, "freeze_exclude": ["*vi[st]*.bias"]}


def sample_arguments(kind: str, out: Path, **options) -> list[str]:
    """A short run of a sample model on the samples of its shipped LoRA configuration."""
    shipped = json.loads((ROOT / f"configs/{kind}/samples_lora.json").read_text())
    kept = {k: shipped[k] for k in ("dataset", "max_length") if k in shipped}
    short = {"per_device_train_batch_size": 4, "max_steps": 4, "lr_scheduler_type": "constant", "model": kind}
    return arguments("tiny", kept.pop("dataset"), out, **{"lora_dropout": 0.1, **kept, **short, **options})


def test_begun_on_two_ranks_and_ended_on_one_is_equal(base, dataset, tmp_path):
    options = {**LORA_RATES, "max_steps": 4, "lr_scheduler_type": "constant"}
    run(arguments(base, dataset, tmp_path / "one", **options, per_device_train_batch_size=2))
    begun = {**options, "max_steps": 2, "sharding": "stage2"}
    run(arguments(base, dataset, tmp_path / "two", **begun), world=2)
    run(arguments(base, dataset, tmp_path / "two", **options, per_device_train_batch_size=2))
    assert_same_run(tmp_path / "two", tmp_path / "one")


ADAPTERS = {
    "rates": {**LORA_RATES, "use_rslora": True, "lora_alpha": 2, "neftune_noise_alpha": 5},
    "PiSSA": {"lora": True, "init_lora_weights": "pissa"},
    "DoRA": {"lora": True, "use_dora": True, "modules_to_save": ["lm_head"]},
}


KINDS = [(kind, method) for method in ADAPTERS for kind in (TOWERS if method != "PiSSA" else ["visualglm"])]


@pytest.mark.slow
@pytest.mark.parametrize("kind, method", KINDS)
def test_two_ranks_and_a_killed_run_are_equal(tmp_path, kind, method):
    once, again, two = (tmp_path / name for name in ("once", "again", "two"))
    run(sample_arguments(kind, once, **ADAPTERS[method]))
    killed(sample_arguments(kind, again, **ADAPTERS[method], save_steps=2), update=4)
    run(sample_arguments(kind, again, **ADAPTERS[method], save_steps=2))
    assert_same_run(again, once, 1e-6, 1e-6)
    half = {"per_device_train_batch_size": 2, "sharding": "stage2"}
    run(sample_arguments(kind, two, **ADAPTERS[method], **half), world=2)
    assert_same_run(two, once, 1e-5, 1e-4)


TP, PP = {"tensor_parallel_degree": 2}, {"pipeline_parallel_degree": 2}
PISSA, DORA = ({**ADAPTERS[method], "modules_to_save": ["lm_head"]} for method in ("PiSSA", "DoRA"))


@pytest.mark.slow
@pytest.mark.parametrize("layout, method", [(TP, RATES), (PP, RATES), (TP, PISSA), (PP, DORA)])
def test_tensor_and_pipeline_parallel_are_equal(base, dataset, tmp_path, layout, method):
    options = {**method, "max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    run(arguments(base, dataset, tmp_path / "one", **options))
    run(arguments(base, dataset, tmp_path / "two", **options, **layout), world=2)
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_changed_rates_are_refused(base, dataset, tmp_path, capfd):
    options = {"learning_rate_rules": {"*bias": 1e-3, "*visual*": 1e-4}, "max_steps": 2, "save_steps": 1}
    run(arguments(base, dataset, tmp_path / "out", **options))
    assert "rule *visual*" in capfd.readouterr().out
    changes = ({"*visual*": 1e-4, "*bias": 1e-3}, {"*bias": 2e-3, "*visual*": 1e-4})  # the order counts too
    for change in [*({"learning_rate_rules": c} for c in changes), {"vision_lr_decay": 0.5}]:
        argv = arguments(base, dataset, tmp_path / "out", **{**options, **change, "max_steps": 3})
        with pytest.raises(ValueError, match=f"can't continue from .*{next(iter(change))} is "):
            train.main(argv)


def test_mistakes_are_one_line_before_anything_is_trained(base, dataset, tmp_path):
    for options, said in (
        ({"learning_rate_rules": {"*visul*": 1e-5}}, r"'\*visul\*' matches no parameter; near names"),
        ({"learning_rate_rules": {"*visual*": 1e-5}, "lora": True}, "'.*' matches .* all frozen"),
        (
            {"learning_rate_rules": {"*bias": 1e-4, "*visual*": 1e-5, "*ln_post.bias": 1e-6}},
            "'.*ln_post.bias'",
        ),
        ({"use_dora": True, "lora": True, "quantize": "nf4"}, "use_dora=true with quantize=nf4"),
        (
            {"init_lora_weights": "pissa", "lora": True, "use_dora": True},
            "init_lora_weights=pissa with use_dora=true",
        ),
        (
            {"use_dora": True, "lora": True, "tensor_parallel_degree": 2},
            "use_dora=true with tensor_parallel_degree=2",
        ),
        ({"modules_to_save": ["ln_g"], "lora": True}, "'ln_g' is no module with .*near names: .*ln_"),
        (
            {"learning_rate_rules": {"*visual*": 0}},
            r"learning_rate_rules\['\*visual\*'\]=0.0; expected above 0",
        ),
        ({"learning_rate_rules": {"*visual*": "1e-5"}}, "wrong type; expected number"),
        ({"learning_rate_rules": {" ": 1e-5}}, "is empty"),
        (
            {"learning_rate_rules": {"*": 1e-5}, "learning_rate": 0.0},
            "learning_rate=0 with learning_rate_rules",
        ),
        ({"vision_lr_decay": 0.5, "freeze_include": ["*visual*"]}, "no parameter of the vision tower trains"),
        ({"vision_lr_decay": 0.0}, "expected .*above 0"),
    ):
        argv = arguments(base, dataset, tmp_path / "out", **options)
        for mode in ([], ["--dry_run"]):
            with pytest.raises(ValueError, match=said):
                train.main([*argv, *mode])


def test_dry_run_prints_the_groups(base, dataset, tmp_path, capsys):
    assert not train.main([*arguments(base, dataset, tmp_path / "out", **LORA_RATES), "--dry_run"])
    text = capsys.readouterr().out
    for said in ("peak rate", r"rule \*\.0\.\* \* vision_lr_decay \*\* 2", r"rule .* \* loraplus_lr_ratio"):
        assert re.search(said, text), said
