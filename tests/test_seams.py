"""What crosses the seams, for every model: a rank without data, recomputation beside adapters, packing,
cached features, 16 bits, a bad image. Tiny random models; one process without any of it is the reference."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from cells import diagonal, slow, thinned
from ranks import Replaced, run
from small import argv_of, assert_same_run, filled, losses
from test_blip2_train import OPT, T5, write_captions, write_checkpoint

import checkpoint
import generate
import model_blip2
import model_qwen_vl
import model_visualglm
import train
import vlm

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("qwen_vl", "visualglm", "opt", "t5", "pretrain1")
TOWERS = {  # adapters in the vision part beside those of the language model
    "qwen_vl": [
        *model_qwen_vl.MODEL.lora_targets,
        r".*attn_pool\.attn\.out_proj",
        r".*resblocks\.0\.mlp\.c_fc",
    ],
    "visualglm": [
        *model_visualglm.MODEL.lora_targets,
        r"image_encoder.*query_key_value",
        r"image_encoder\.glm_proj",
    ],
    "opt": [
        r".*q_proj",
        r".*fc2",
        r"vision_model.*fc1",
        r"qformer.*query",
        r"qformer.*key",
        r"language_projection",
    ],
    "t5": [
        r".*SelfAttention\.q",
        r".*EncDecAttention\.[kq]",
        r".*wo",
        r"vision_model.*fc1",
        r"qformer.*dense",
    ],
    "pretrain1": [
        r"qformer.*query",
        r"qformer.*(key|value)",
        r"qformer.*dense",
        r"vision_model.*fc1",
        r".*projection",
        r"itm_head",
        r"cls\..*dense",
    ],
}
STAGE = {"pretrain1": "pretrain1"}


def shrunk(path: Path, tiny: str, module) -> Path:
    """The tiny checkpoint of samples/ with random weights, so that no test rests on what it learned."""
    path.mkdir()
    for file in (ROOT / "samples" / tiny).iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, path / file.name)
    checkpoint.save_weights(
        path, filled(module.build_model(checkpoint.read_config(path))).state_dict().items()
    )
    return path


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("seams")
    return {
        "qwen_vl": shrunk(root / "qwen_vl", "tiny_qwen_vl", model_qwen_vl),
        "visualglm": shrunk(root / "visualglm", "tiny_visualglm", model_visualglm),
        "opt": write_checkpoint(root / "opt", OPT),
        "t5": write_checkpoint(root / "t5", T5),
        "pretrain1": write_checkpoint(root / "stage1", OPT, stage1=True),
    }


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """Seven captioned images, so that two ranks are not always both busy."""
    return write_captions(tmp_path_factory.mktemp("captions"), 7, 2)


def arguments(bases, captions, model, out, **options):
    entries = [{"data_files": str(captions)}]
    options = {
        "model_name_or_path": str(bases[model]),
        "stage": STAGE.get(model, "sft"),
        "output_dir": str(out),
        "dataset": {"train": entries, "eval": entries},
        "max_steps": 3,
        "lr_scheduler_type": "constant",
        "learning_rate": 3e-3,
        "adam_epsilon": 1e-4,
        "num_workers": 0,
        "logging_steps": 1000,
        "max_length": 128,
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        **options,
    }
    return argv_of(options)


def trained(bases, captions, model, out, world=1, **options):
    run(arguments(bases, captions, model, out, **options), world=world)
    return out


def adapter(model):
    return {"lora": True, "lora_dropout": 0.3, "lora_target_modules": TOWERS[model], "learning_rate": 1e-2}


@pytest.mark.parametrize("accumulation", [2, slow(1)])
@pytest.mark.parametrize("model, sharding", diagonal(MODELS, [None, "stage3"]))
def test_a_rank_without_data(bases, captions, tmp_path, model, sharding, accumulation):
    """Seven samples on two ranks of one sample a micro-batch: the last micro-batch of one rank is empty, with
    a full one before it in the step, or alone in its step."""
    if model == "pretrain1":  # what is contrasted is a micro-batch of all ranks
        accumulation, split = 2, {"per_device_train_batch_size": 2}
    else:
        split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation}
    batch = 2 * accumulation
    options = {"num_train_epochs": 1, "max_steps": -(-7 // batch)}
    one = trained(bases, captions, model, tmp_path / "one", **options, per_device_train_batch_size=batch)
    two = trained(bases, captions, model, tmp_path / "two", 2, **options, sharding=sharding, **split)
    assert_same_run(two, one, loss_tol=2e-5, weight_tol=2e-4)


@pytest.mark.parametrize("model", thinned(MODELS, ["qwen_vl", "t5"]))
def test_recomputation_beside_adapters_with_dropout(bases, captions, tmp_path, model):
    """Also with one image a micro-batch: the masks are the samples' own."""
    whole = trained(bases, captions, model, tmp_path / "whole", **adapter(model))
    again = trained(bases, captions, model, tmp_path / "again", recompute=True, **adapter(model))
    assert_same_run(again, whole)
    none = trained(bases, captions, model, tmp_path / "none", **{**adapter(model), "lora_dropout": 0.0})
    assert abs(losses(none)[-1] - losses(whole)[-1]) > 1e-4  # the dropout does something
    if model == "pretrain1":
        return
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert_same_run(trained(bases, captions, model, tmp_path / "b1", **one, **adapter(model)), whole)
    assert_same_run(
        trained(bases, captions, model, tmp_path / "r1", recompute=True, **one, **adapter(model)), whole
    )


@pytest.mark.parametrize("model", [m for m in MODELS if m != "pretrain1"])
def test_packed_and_cached_beside_adapters(bases, captions, tmp_path, model):
    """Streams of several samples, and features made once: the losses of the samples one by one."""
    language = {"opt": [r".*q_proj"], "t5": [r".*SelfAttention\.q"]}
    adapters = {
        **adapter(model),
        "lora_target_modules": language.get(model, TOWERS[model][:2]),
        "max_length": 4096,
    }
    options = {"per_device_train_batch_size": 7, "max_steps": 2, **adapters}
    whole = trained(bases, captions, model, tmp_path / "whole", **options)
    packed = {**options, "mixtoken": True, "per_device_train_batch_size": 1}
    assert_same_run(trained(bases, captions, model, tmp_path / "packed", **packed), whole)
    if model in (
        "qwen_vl",
        "visualglm",
    ):  # BLIP-2's Q-Former has a dropout, which a cache would leave out: refused
        cached = trained(bases, captions, model, tmp_path / "cached", cache_image_features=True, **options)
        assert_same_run(cached, whole)


PRECISIONS = {
    "fp16": {"fp16": True},
    "fp16-master": {"fp16": True, "fp16_opt_level": "O2"},
    "bf16": {"bf16": True},
    "bf16-master": {"bf16": True, "fp16_opt_level": "O2"},
}


@pytest.mark.parametrize("precision, model", diagonal(PRECISIONS, MODELS))
def test_sixteen_bits(bases, captions, tmp_path, model, precision):
    """Forward, backward, generation. The first loss is fp32's up to the precision."""
    if model == "t5" and precision.startswith("fp16"):
        pytest.skip("Flan-T5 refuses fp16")
    options = {"max_steps": 2, "do_eval": True, "per_device_eval_batch_size": 2, **PRECISIONS[precision]}
    out = trained(bases, captions, model, tmp_path / "out", **options)
    reference = trained(bases, captions, model, tmp_path / "fp32", max_steps=1)
    assert losses(out)[0] == pytest.approx(losses(reference)[0], rel=0.03)
    if model != "pretrain1":
        dtype = "bfloat16" if "bf16" in precision else "float16"
        argv = [
            "--model_name_or_path",
            str(out),
            "--image",
            str(captions.parent / "0.png"),
            "--prompt",
            "what",
            "--max_new_tokens",
            "3",
            "--dtype",
            dtype,
        ]
        run(argv, main=generate.main)


def dtypes_seen(seen, rotary, x, cos, sin):
    with open(seen, "a") as file:
        file.write(f"{x.dtype} {cos.dtype} {sin.dtype}\n")
    return rotary(x, cos, sin)


@pytest.mark.parametrize("model", ["qwen_vl", "visualglm"])
def test_rotary_angles_stay_fp32_under_16_bit_weights(bases, captions, tmp_path, model):
    seen = tmp_path / "seen"
    options = {"max_steps": 1, "bf16": True, "fp16_opt_level": "O2"}
    for world, sharding in ((1, {}), (2, {"sharding": "stage3"})):
        argv = arguments(bases, captions, model, tmp_path / f"{world}", **options, **sharding)
        run(argv, world, Replaced(f"model_{model}.rotary", partial(dtypes_seen, seen)))
    assert set(seen.read_text().splitlines()) == {"torch.bfloat16 torch.float32 torch.float32"}


@pytest.mark.parametrize("model", MODELS)
def test_a_bad_image_at_batch_one(bases, captions, tmp_path, model, capfd):
    folder = tmp_path / "data"
    shutil.copytree(captions.parent, folder)
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    options = {"max_steps": 7, "per_device_train_batch_size": 1, "max_bad_samples": 0.5}
    if model == "pretrain1":
        options |= {"per_device_train_batch_size": 2, "max_steps": 3}
    trained(bases, folder / "a.json", model, tmp_path / "out", **options)
    out, err = capfd.readouterr()
    assert "left out" in err
    alone = 0 if model == "pretrain1" else 1  # a step whose only sample it was
    assert len(losses(tmp_path / "out")) == options["max_steps"] - alone
    assert ("nothing is learned in it" in out) == bool(alone)


def test_a_contrast_of_one_pair_is_refused(bases, captions, tmp_path):
    for options in ({"per_device_train_batch_size": 1}, {"do_eval": True, "per_device_eval_batch_size": 1}):
        argv = arguments(bases, captions, "pretrain1", tmp_path / "out", **options)
        with pytest.raises(ValueError, match="one pair alone is its own negative"):
            train.main(argv)


def test_a_pair_without_a_negative_learns_no_negative(bases):
    """The last micro-batch of an epoch, or one whose other images could not be read."""
    torch.manual_seed(0)
    model = filled(model_blip2.build_model(checkpoint.read_config(bases["pretrain1"])))
    Q = model.num_image_tokens
    one = vlm.Batch(
        input_ids=torch.cat((torch.zeros(Q, dtype=torch.long), torch.tensor([2, 9, 10, 3]))),
        targets=torch.cat((torch.full((Q,), -100), torch.tensor([9, 10, 3, -100]))),
        position_ids=torch.arange(Q + 4),
        cu_seqlens=torch.tensor([0, Q + 4], dtype=torch.int32),
        image_positions=torch.arange(Q)[None],
        pixel_values=torch.randn(1, 3, 28, 28),
        dropout_keys=torch.arange(Q + 4),
        image_dropout_keys=torch.zeros(1, dtype=torch.long),
    )
    model.eval()
    losses_of, _ = model.losses(one)
    rows, lengths = model.text_of(one)
    logits = model.match(model.vision_model(one.pixel_values), one.input_ids[rows], lengths)
    positive = torch.nn.functional.cross_entropy(logits, torch.tensor([1]))
    torch.testing.assert_close(losses_of[1], positive)
    assert losses_of[0] == 0
