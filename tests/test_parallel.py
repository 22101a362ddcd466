"""Tensor parallelism against one process: losses, weights, checkpoints, communication, generation."""

import pytest
import test_blip2_train as blip2_train
import test_train_visualglm as glm_train
from test_train import arguments, assert_same_run, run

import model_qwen_vl as qwen

glm_base, glm_dataset = glm_train.glm_base, glm_train.glm_dataset

LORA = {"lora": True, "lora_dropout": 0.3}
MODES = {  # name -> (which base, settings)
    "qwen sft": ("qwen", {}),
    "qwen lora": ("qwen", {**LORA, "lora_target_modules": [*qwen.LORA_TARGETS, r".*resblocks.*c_(fc|proj)"]}),
    "glm sft": ("glm", {}),
    "glm lora": ("glm", {**LORA, "lora_target_modules": [r".*attention\.(query_key_value|dense)", ".*4h_to_h"]}),
    "glm split lora": ("glm", {**LORA, "lora_split": True, "lora_rank": 3}),
    "glm ptuning": ("glm", {"pre_seq_len": 3, "learning_rate": 0.05}),
    "opt sft": ("opt", {}),
    "opt lora": ("opt", {**LORA, "lora_target_modules": [r"language_model.*(q|v|out)_proj", r"language_model.*fc2"]}),
    "t5 sft": ("t5", {}),
    "t5 lora": ("t5", {**LORA, "lora_target_modules": [r"language_model.*Attention\.[qvo]", r".*DenseReluDense\.wo"]}),
    "stage 1": ("stage1", {"stage": "pretrain1"}),
}


@pytest.fixture(scope="session")
def bases(base, glm_base, dataset, glm_dataset, blip2_captions, tmp_path_factory):
    """{name: (checkpoint, dataset)}"""
    root = tmp_path_factory.mktemp("blip2")
    write, opt, t5 = blip2_train.write_checkpoint, blip2_train.OPT, {**blip2_train.T5, "num_heads": 4}
    return {
        "qwen": (base, dataset), "glm": (glm_base, glm_dataset), "opt": (write(root / "opt", opt), blip2_captions),
        "t5": (write(root / "t5", t5), blip2_captions), "stage1": (write(root / "1", opt, True), blip2_captions),
    }  # fmt: skip


@pytest.fixture(scope="session")
def blip2_captions(tmp_path_factory):
    captions = blip2_train.dataset.__wrapped__(tmp_path_factory)
    return {key: captions[key] for key in ("train", "eval")}


def start(bases, mode, out, world=1, batch=8, **options):
    kind, settings = MODES[mode]
    split = {"per_device_train_batch_size": batch, **options}
    split["gradient_accumulation_steps"] = 8 // (batch * (world // options.get("tensor_parallel_degree", 1)))
    run(arguments(*bases[kind], out, **{**settings, **split}), world=world)


@pytest.fixture(scope="session")
def references(bases, tmp_path_factory):
    made = {}

    def reference(mode):
        if mode not in made:
            made[mode] = tmp_path_factory.mktemp("reference") / "out"
            start(bases, mode, made[mode])
        return made[mode]

    return reference


LAYOUTS = {"tp2": (2, {}), "tp2 x dp2": (4, {})}  # name -> (processes, settings)
LAYOUTS |= {f"tp2 x zero{n}": (4, {"sharding": f"stage{n}"}) for n in (1, 2, 3)}
CELLS = [("qwen sft", layout) for layout in LAYOUTS] + [(mode, "tp2") for mode in MODES if mode != "qwen sft"]


@pytest.mark.parametrize("mode, layout", CELLS)
def test_equals_one_process(bases, references, tmp_path, mode, layout):
    world, options = LAYOUTS[layout]
    batch = 16 // world if mode == "stage 1" else 2  # pictures are contrasted within a round of micro-batches
    start(bases, mode, tmp_path / "out", world, batch, tensor_parallel_degree=2, **options)
    assert_same_run(tmp_path / "out", references(mode))
