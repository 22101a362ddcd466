"""A model that the project does not ship, tests/model_llava.py, through every script and layout with no line
elsewhere; its numbers against transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import model_llava
import pytest
import torch
from ranks import run
from small import arguments, assert_same_run, losses
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import checkpoint
import data
import generate
import vlm

ROOT = Path(__file__).resolve().parent.parent
transformers = pytest.importorskip("transformers")
Q, IMAGE = 4, 300


@pytest.fixture(scope="session")
def llava_base(tmp_path_factory):
    """What transformers saves of a small LLaVA, with a tokenizer of bytes beside it."""
    path = tmp_path_factory.mktemp("llava") / "base"
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    text = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=304,
        rms_norm_eps=1e-5,
        initializer_range=0.1,  # else the answers hang on the sixth digit
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=Q
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<unk>", "<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="session")
def theirs(llava_base):
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    return load(llava_base, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def prompts(llava_base, dataset):
    """Two questions with an image, of different lengths."""
    processor = data.load_processor(str(llava_base))
    entry = data.Entry(dataset["train"][0])
    conversations = [entry.conversations(n)[0] for n in range(len(entry))]
    found = [c for c in conversations if len(c.images) == 1][:2]
    return processor, found


def test_logits_loss_and_gradients_equal_transformers(llava_base, theirs, prompts):
    processor, conversations = prompts
    samples = [data.attach_images(processor.encode(c, 512), processor) for c in conversations]
    model = generate.load_model(llava_base)
    model.zero_grad()
    theirs.zero_grad()
    summed, count = 0.0, 0
    for sample in samples:
        batch = data.collate([sample])
        ids, labels = (torch.from_numpy(sample[k]).long()[None] for k in ("input_ids", "labels"))
        pixels = torch.stack(sample["pixel_values"])
        out = theirs(input_ids=ids, pixel_values=pixels, labels=labels, attention_mask=torch.ones_like(ids))
        ours = model.logits(model.hidden(batch))
        torch.testing.assert_close(ours, out.logits[0], atol=1e-5, rtol=1e-5)
        summed, count = summed + out.loss * batch.num_supervised, count + batch.num_supervised
    summed.backward()
    loss, _ = model(data.collate(samples))  # both packed into one stream
    loss.backward()
    assert abs(float(loss.detach() - summed.detach())) / count < 1e-5
    grads = {name.replace("vision_model.", ""): p.grad for name, p in theirs.named_parameters()}
    largest = max(float(p.abs().max()) for p in grads.values() if p is not None)
    for name, p in model.named_parameters():
        place = name.replace("language_model.lm_head", "lm_head")
        place = place if place.startswith("lm_head") else "model." + place.replace("model.model.", "model.")
        expected = grads[place]
        if expected is None:  # the tower's last block and norm are behind the features that are taken
            assert p.grad is None or not p.grad.any(), name
        else:
            torch.testing.assert_close(p.grad, expected, atol=1e-6 * largest, rtol=1e-4)


def test_greedy_tokens_equal_transformers(llava_base, theirs, prompts):
    processor, conversations = prompts
    model, requests = generate.load_model(llava_base), []
    for c in conversations:
        request = processor.prompt(c)
        requests.append({**request, "pixel_values": [processor.load_image(i) for i in request["images"]]})
    answers = generate.generate(model, requests, generate.Decoding(12), [])
    for request, answer in zip(requests, answers, strict=True):
        ids = torch.from_numpy(request["input_ids"]).long()[None]
        expected = theirs.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.stack(request["pixel_values"]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )[0, ids.shape[1] :]
        assert answer == expected.tolist()


@pytest.fixture(scope="session")
def llava_run(llava_base, dataset, tmp_path_factory):
    def do(world=1, **options):
        out = tmp_path_factory.mktemp("llava") / "out"
        degrees = [options.get(f"{axis}_parallel_degree", 1) for axis in ("tensor", "pipeline")]
        options = {"max_steps": 4, "per_device_train_batch_size": 2, **options}
        options.setdefault("gradient_accumulation_steps", 4 * max(degrees) // world)
        run(arguments(llava_base, dataset, out, **options), world)
        return out

    return do


@pytest.fixture(scope="session")
def reference(llava_run):
    made = {}

    def get(lora):
        if lora not in made:
            made[lora] = llava_run(lora=lora)
        return made[lora]

    return get


LAYOUTS = {
    "zero1": {"sharding": "stage1"},
    "zero3 lora": {"sharding": "stage3", "lora": True},
    "tp2": {"tensor_parallel_degree": 2},
    "tp2 lora": {"tensor_parallel_degree": 2, "lora": True},
    "pp2": {"pipeline_parallel_degree": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_run(llava_run, reference, layout):
    options = LAYOUTS[layout]
    expected = reference(options.get("lora", False))
    assert losses(expected)[-1] < losses(expected)[0]
    assert_same_run(llava_run(world=2, **options), expected)


def test_scripts_take_the_model(llava_base, reference, dataset, tmp_path):
    """merge, generate, evaluate, check, preview and a dry run by their commands; the model is on the path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    adapter, merged = reference(True), tmp_path / "merged"

    def script(*argv):
        command = [sys.executable, str(ROOT / argv[0]), *map(str, argv[1:])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "as computed" in script("merge.py", "--lora_path", adapter, "--merge_model_path", merged)
    image = data.Entry(dataset["train"][0]).conversations(0)[0].images[0]
    question = ["--image", image, "--prompt", "what is it?", "--max_new_tokens", "4"]
    answers = [
        script("generate.py", *where, *question)
        for where in (["--lora_path", adapter], ["--model_name_or_path", merged])
    ]
    assert answers[0] == answers[1]
    config = {"model_name_or_path": str(merged), "dataset": dataset, "max_length": 128}
    (tmp_path / "merged.json").write_text(json.dumps(config))
    scores = [
        script("evaluate.py", *where, "--max_new_tokens", "4").splitlines()[-1]
        for where in (["--lora_path", adapter], [tmp_path / "merged.json"])
    ]
    assert scores[0] == scores[1]
    options = ["--model_name_or_path", llava_base, "--dataset", json.dumps(dataset)]
    assert "GiB" in script("train.py", *options, "--dry_run")
    assert "0 problems" in script("data.py", "check", *options)


def test_a_model_file_that_lacks_something_is_refused():
    with pytest.raises(
        ValueError, match="MODEL lacks load_processor, .*parts.*; vlm.Model says what each is"
    ):
        vlm.Model(build_model=model_llava.build_model)
    with pytest.raises(ValueError, match="Llava lacks blocks; vlm.Network"):
        vlm.check_complete(
            type("Llava", (), {n: 0 for n in vlm.members(vlm.Network) if n != "blocks"})(), vlm.Network
        )
    config = {"model_type": "no such type"}
    with pytest.raises(
        ValueError, match="model_type='no such type'; supported: .* any type with a model_<type>.py"
    ):
        vlm.find(config)
    assert vlm.find({"model_type": "llava"}) is model_llava.MODEL
    assert checkpoint and generate
