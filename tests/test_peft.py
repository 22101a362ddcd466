"""Adapters of every model, here and in PEFT: what train.py saves gives our logits there, what PEFT saves
gives its own here, and what would not is refused. For BLIP-2 the base there is transformers' model, else our
own module under PEFT."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import T5_TEXT
from torch import nn

import build
import checkpoint
import generate
import lora
import merge
import model_blip2 as blip2
import model_qwen_vl as qwen
import model_visualglm as glm
import serve
import terminal
import vlm
from kernels import linear

peft = pytest.importorskip("peft")
ROOT = Path(__file__).resolve().parent.parent
MODULES = {"qwen_vl": qwen, "blip2": blip2, "visualglm": glm}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def recipes():
    """(model file, settings) of every shipped configuration that trains an adapter, and of each model's
    defaults."""
    found = [(kind, {}) for kind in MODULES] + [("t5", {})]
    for path in sorted((ROOT / "configs").glob("*/*.json")):
        settings = json.loads(path.read_text())
        if settings.get("lora"):
            keys = ("lora_target_modules", "lora_rank", "lora_alpha", "lora_split", "freeze_exclude")
            found.append((path.parent.name, {k: settings[k] for k in keys if k in settings}))
    found.append(("visualglm", {"lora_split": True}))
    found.append(("visualglm", {"lora_split": True, "use_rslora": True}))
    found.append(("qwen_vl", {"use_rslora": True, "lora_alpha": 4}))
    # an adapted layer's own weight and bias trained too, and a parameter without a module of its own
    found.append(
        ("qwen_vl", {"freeze_exclude": ["transformer.h.0.attn.c_attn.*", "transformer.visual.proj"]})
    )
    found.append(("blip2", {"freeze_exclude": ["language_model.*.q_proj.bias", "query_tokens"]}))
    found += [(kind, {"use_dora": True}) for kind in MODULES]
    found += [("qwen_vl", {"init_lora_weights": "pissa"}), ("blip2", {"init_lora_weights": "pissa"})]
    found.append(("visualglm", {"init_lora_weights": "pissa", "use_rslora": True}))
    # modules with adapted layers inside, tied names, last parts
    found.append(("qwen_vl", {"modules_to_save": ["ln_f", "h.1.mlp"]}))
    found.append(("blip2", {"modules_to_save": ["lm_head", "language_projection"]}))
    found.append(("visualglm", {"modules_to_save": ["transformer.final_layernorm", "layers.0.attention"]}))
    return found


@pytest.fixture
def base(tmp_path):
    """A small checkpoint of a kind; t5 and the deep VisualGLM of a
    recipe are made anew, with random weights."""

    def make(kind: str, num_layers: int | None = None) -> Path:
        name = "blip2" if kind == "t5" else kind
        source, path = ROOT / f"samples/tiny_{name}", tmp_path / f"base_{kind}"
        if kind != "t5" and not num_layers:
            return source
        path.mkdir()
        config = checkpoint.read_config(source)
        if num_layers:
            config |= {"num_layers": num_layers, "hidden_size": 32, "inner_hidden_size": 48}
        if kind == "t5":
            config["use_decoder_only_language_model"] = False
            config["text_config"] = T5_TEXT
        checkpoint.write_json(path / "config.json", config)
        checkpoint.copy_side_files(source, path)
        model = MODULES[name].build_model(config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                model.init_weights(name, p, torch.Generator().manual_seed(len(name)))
        checkpoint.save_weights(path, model.named_parameters())
        return path

    return make


def trained_adapter(directory: Path, out: Path, settings: dict) -> nn.Module:
    """A model as train.py adapts it by `settings`, every trained value moved, saved to `out`."""
    import train

    model = generate.load_model(directory)
    module = MODULES[vlm.kind_of(checkpoint.read_config(directory))]
    cfg = train.Config(lora=True, **settings)
    build.check_stage(cfg, module.MODEL)
    names = build.add_adapter(model, module.MODEL, cfg)
    build.choose_trainable(model, module.MODEL, cfg)
    extra = [n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n]
    starts = None
    if cfg.init_lora_weights == "pissa":
        read = dict(model.named_parameters()).__getitem__
        starts = lora.take_principal(model, names, read, lambda p, full: p.copy_(full))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name and (parts := model.get_submodule(name.partition(".lora_B")[0]).parts):
                G, P = parts
                blocks = p.unflatten(1, (P, -1)).unflatten(0, (G, P, -1))
                for j in range(P):
                    blocks[:, j, :, j].normal_(std=0.1, generator=generator)
            elif p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    params = dict(model.named_parameters())
    out.mkdir()
    lora.save_adapter(
        out,
        model,
        lora.LoraConfig(directory, cfg.lora_rank, cfg.lora_alpha, rslora=cfg.use_rslora, starts=starts),
        names,
        extra,
        params.__getitem__,
    )
    return model


def t5_batch() -> vlm.Batch:
    Q = 8
    ramp = torch.linspace(-1, 1, 64)
    ids = torch.tensor([1001] * Q + [5, 6, 7, 1, 0])
    return vlm.Batch(
        input_ids=ids,
        position_ids=torch.arange(len(ids)),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        image_positions=torch.arange(Q)[None],
        pixel_values=(ramp[:, None] * ramp).expand(1, 3, 64, 64),
    )


def logits_of(model: nn.Module, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.hidden(batch))


def transformers_logits(model, batch: dict, kind: str, slot: int) -> torch.Tensor:
    ids = batch.input_ids
    inputs = {"pixel_values": batch.pixel_values}
    if kind == "t5":  # our stream holds the encoder's tokens, then the decoder's one
        inputs |= {"input_ids": ids[None, :-1], "decoder_input_ids": ids[None, -1:]}
    else:
        inputs |= {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    with torch.no_grad():
        return model(**inputs).logits[0]


def their_base(directory: Path, kind: str, slot: int):
    if kind in ("blip2", "t5"):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32
        ).eval()
        theirs.config.image_token_index = theirs.config.image_token_id = slot
        return theirs
    ours = generate.load_model(directory)
    ours.prepare_inputs_for_generation = lambda: None  # PEFT wants to see one
    return ours


@pytest.mark.parametrize(
    "kind,settings", recipes(), ids=lambda v: v if isinstance(v, str) else "-".join(v) or "plain"
)
def test_every_recipe_computes_the_same_in_peft(base, tmp_path, kind, settings, monkeypatch):
    needs_depth = any("14" in pattern for pattern in settings.get("lora_target_modules", ()))
    directory = base(kind, num_layers=15 if needs_depth else None)
    ours = trained_adapter(directory, tmp_path / "adapter", settings)
    module = MODULES["blip2" if kind == "t5" else kind]
    processor = module.load_processor(directory) if kind != "t5" else None
    if kind == "t5":
        batch = t5_batch()
    else:
        batch = module.probe_batch(processor)
    expected = logits_of(ours, batch)
    monkeypatch.setattr(linear, "WORTH_PACKING", 0)
    again = linear.pack(generate.load_model(directory, lora_path=tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(again, batch), expected, atol=1e-3, rtol=1e-3)
    slot = 1001
    theirs = peft.PeftModel.from_pretrained(
        their_base(directory, kind, slot), str(tmp_path / "adapter")
    ).eval()
    if kind in ("blip2", "t5"):
        got = transformers_logits(theirs, batch, kind, slot)
    else:
        got = logits_of(theirs.base_model.model, batch)
    scale = expected.abs().max()
    assert (
        got - logits_of(generate.load_model(directory), batch)
    ).abs().max() > 3e-4 * scale  # it changes something
    torch.testing.assert_close(got / scale, expected / scale, atol=1e-4, rtol=0)


PARTLY = {"freeze_exclude": ["transformer.h.0.attn.c_attn.*", "transformer.visual.proj"]}


@pytest.mark.parametrize(
    "kind, settings", [("qwen_vl", PARTLY), ("blip2", {}), ("t5", {}), ("visualglm", {})]
)
def test_a_merge_has_the_weights_of_one_block_at_a_time(base, tmp_path, kind, settings):
    """Its check of the logits: those of the whole model, to the bit."""
    directory, out = base(kind), tmp_path / "adapter"
    trained_adapter(directory, out, settings)
    module = MODULES["blip2" if kind == "t5" else kind]
    batch = t5_batch() if kind == "t5" else module.probe_batch(module.load_processor(directory))
    for path in (None, out):
        model = merge.streamed_model(directory, path)
        blocks, most = [*model.vision_blocks, *model.blocks], []
        for block in blocks:  # how many have all their weights, when one of them has run

            def count(*_, blocks=blocks, most=most):
                most.append(sum(not any(p.is_meta for p in b.parameters()) for b in blocks))

            block.register_forward_pre_hook(count)
            block.register_forward_hook(count)
        expected = logits_of(generate.load_model(directory, lora_path=path), batch)
        assert torch.equal(logits_of(model, batch), expected)
        assert most == [1, 0] * len(blocks)


def test_weighted_adapters_are_one(base, tmp_path, capsys):
    """W plus each update times its weight; the adapter that they make is PEFT's too."""
    directory, targets = base("qwen_vl"), qwen.MODEL.lora_targets
    settings = {"a": {}, "b": {"lora_rank": 3, "use_rslora": True, "lora_target_modules": targets[:1]}}
    expected = dict(generate.load_model(directory).named_parameters())
    for (name, own), weight in zip(settings.items(), (0.07, -0.03), strict=True):
        trained = trained_adapter(directory, tmp_path / name, own)
        for layer, module in trained.named_modules():
            if isinstance(module, lora.LoraLinear):
                update = module.lora_B.weight.double() @ module.lora_A.weight.double() * module.scaling
                expected[f"{layer}.weight"] = expected[f"{layer}.weight"].double() + weight * update
    paths, weights = [str(tmp_path / name) for name in settings], ["0.07", "-0.03"]
    argv = ["--lora_path", *paths, "--weights", *weights, "--merge_model_path", str(tmp_path / "merged")]
    assert merge.main([*argv, "--dtype", "float32"]) == 0
    assert f"adapters: 0.07 x {paths[0]} + -0.03 x {paths[1]}" in capsys.readouterr().out
    merged = generate.load_model(tmp_path / "merged")
    for name, p in merged.named_parameters():
        torch.testing.assert_close(p.double(), expected[name].double(), atol=1e-5, rtol=1e-5)
    lora.combine(paths, [0.07, -0.03], tmp_path)
    theirs = peft.PeftModel.from_pretrained(their_base(directory, "qwen_vl", 0), str(tmp_path)).eval()
    batch = qwen.probe_batch(qwen.load_processor(directory))
    got, want = logits_of(theirs.base_model.model, batch), logits_of(merged, batch)
    torch.testing.assert_close(got, want, atol=1e-3 * float(want.abs().max()), rtol=0)


def test_what_combining_refuses(base, tmp_path, capsys):
    directory = base("qwen_vl")
    trained_adapter(directory, tmp_path / "a", {})
    trained_adapter(directory, tmp_path / "whole", PARTLY)
    shutil.copytree(directory, tmp_path / "words")
    first, second, *more = (directory / "qwen.tiktoken").read_bytes().splitlines()
    (a, n), (b, m) = first.split(), second.split()
    swapped = [b"%s %s" % (b, n), b"%s %s" % (a, m), *more]
    (tmp_path / "words/qwen.tiktoken").write_bytes(b"\n".join(swapped))
    a, whole = str(tmp_path / "a"), str(tmp_path / "whole")
    for argv, words in (
        (["--lora_path", a, a, "--weights", "1"], "for 2 adapters; expected a number for each"),
        (["--lora_path", a, a], "for 2 adapters"),
        (["--lora_path", a, "--weights", "nan"], "--weights"),
        (["--lora_path", a, whole, "--weights", "1", "1"], "whole, which is no update"),
        (["--average", a, str(directory)], "is no checkpoint"),
        (["--lora_path", a, a, "--weights", "0", "0"], "--weights are all 0"),
        (["--average", str(directory), "--weights", "1"], "--average takes checkpoints alone"),
        (["--average", str(directory)], "one checkpoint is its own mean"),
        (["--average", str(directory), str(tmp_path / "words")], "another tokenizer"),
        (["--average", str(directory), str(ROOT / "samples/tiny_visualglm")], "different models"),
    ):
        argv += ["--merge_model_path", str(tmp_path / "merged")]
        assert terminal.cli(lambda argv=argv: merge.main(argv)) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1, error
    assert not (tmp_path / "merged").exists()


def test_mean_of_checkpoints(base, tmp_path):
    directory = base("visualglm")
    held = checkpoint.open_model(directory, glm.MODEL)
    shutil.copytree(directory, tmp_path / "other")
    checkpoint.save_weights(tmp_path / "other", ((name, held.read(name) * 3) for name in held))
    assert (
        merge.main(
            ["--average", str(directory), str(tmp_path / "other"), "--merge_model_path", str(tmp_path / "m")]
        )
        == 0
    )
    mean = checkpoint.open_model(tmp_path / "m", glm.MODEL)
    assert mean.names == held.names
    for name in held:
        assert mean.dtype(name) == held.dtype(name)
        torch.testing.assert_close(mean.read(name).float(), held.read(name).float() * 2, rtol=1e-2, atol=1e-6)


# ---- what PEFT saves


CHANGES_THE_MATHS = [
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_4"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "lora_ga"),
    ("use_qalora", True),
    ("lora_bias", True),
    ("bias", "all"),
    ("bias", "lora_only"),
    ("fan_in_fan_out", True),
    ("alora_invocation_tokens", [1, 2]),
    ("layer_replication", [[0, 2]]),
    ("trainable_token_indices", [3]),
    ("trainable_token_indices", {"wte": [3]}),
    ("target_parameters", ["x.weight"]),
    ("megatron_config", {"a": 1}),
    ("use_bdlora", {"a": 1}),
    ("arrow_config", {"a": 1}),
    ("kasa_config", {"a": 1}),
    ("a_key_of_tomorrow", None),
    ("r", 0),
    ("r", True),
    ("lora_alpha", float("nan")),
    ("lora_alpha", 0),
    ("lora_dropout", 5),
    ("rank_pattern", {"(": 3}),
    ("rank_pattern", {"x": "3"}),
    ("alpha_pattern", {"x": None}),
    ("target_modules", "("),
    ("target_modules", None),
    ("target_modules", []),
    ("modules_to_save", 5),
    ("use_rslora", "x"),
    ("peft_type", ["LORA"]),
    ("layers_to_transform", "0"),
    ("base_model_name_or_path", 5),
]


@pytest.fixture(scope="module")
def qwen_adapter(tmp_path_factory):
    out = tmp_path_factory.mktemp("peft") / "adapter"
    trained_adapter(ROOT / "samples/tiny_qwen_vl", out, {})
    return out


@pytest.mark.parametrize("key,value", CHANGES_THE_MATHS)
def test_keys_that_change_the_maths_are_refused(qwen_adapter, tmp_path, key, value):
    shutil.copytree(qwen_adapter, tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    (tmp_path / "a/adapter_config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=key if value != [] else "does not name") as info:
        generate.load_model(ROOT / "samples/tiny_qwen_vl", lora_path=tmp_path / "a")
    assert len(str(info.value).splitlines()) == 1


def test_every_key_of_pefts_is_known(qwen_adapter, tmp_path):
    """Those of a plain adapter, as the installed PEFT writes them, are read; none is missing from the three
    lists."""
    shutil.copytree(qwen_adapter, tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    theirs = peft.LoraConfig(**{k: v for k, v in config.items() if k != "peft_type"})
    theirs.save_pretrained(tmp_path / "a")
    written = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert len(written) > 25 and not written.keys() - {*lora.USED, *lora.PLAIN, *lora.SAID}
    assert lora.read_adapter_config(tmp_path / "a")["r"] == config["r"]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn"], "layers_to_transform": 0},
        {"target_modules": ["c_attn", "w1"], "layers_to_transform": [1], "layers_pattern": "h"},
        {
            "target_modules": r"transformer\.h\.[01]\..*c_proj",
            "rank_pattern": {"mlp.c_proj": 3},
            "use_rslora": True,
        },
        {
            "target_modules": ["c_attn"],
            "alpha_pattern": {r"h\.1\.attn\.c_attn": 3},
            "exclude_modules": ["h.0.attn.c_attn"],
        },
        {"target_modules": ["w2"], "modules_to_save": ["lm_head", "ln_f"], "init_lora_weights": "gaussian"},
    ],
)
def test_what_peft_saves_computes_the_same_here(tmp_path, options):
    directory = ROOT / "samples/tiny_qwen_vl"
    theirs = peft.get_peft_model(
        their_base(directory, "qwen_vl", 0), peft.LoraConfig(r=4, lora_alpha=6, **options)
    )
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    theirs.eval().save_pretrained(tmp_path)
    batch = qwen.probe_batch(qwen.load_processor(directory))
    ours = generate.load_model(directory, lora_path=tmp_path)
    expected = logits_of(theirs.base_model.model, batch)
    scale = expected.abs().max()
    torch.testing.assert_close(logits_of(ours, batch) / scale, expected / scale, atol=1e-4, rtol=0)
    assert (expected - logits_of(generate.load_model(directory), batch)).abs().max() > 0.1


def test_an_adapter_knows_its_base(qwen_adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # found from anywhere
    directory = ROOT / "samples/tiny_qwen_vl"
    assert Path(lora.find_base(qwen_adapter)) == directory
    weights = checkpoint.open_model(directory, qwen.MODEL)
    lora.check_base(qwen_adapter, weights)
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    state = load_file(other / "model.safetensors")
    save_file({n: t.float() for n, t in state.items()}, other / "model.safetensors")
    lora.check_base(
        qwen_adapter, checkpoint.open_model(other, qwen.MODEL)
    )  # in another precision it is the same
    name = "transformer.h.2.mlp.w1.weight"
    save_file({**state, name: state[name] * (1 + 2**-7)}, other / "model.safetensors")
    beside = ["--model_name_or_path", str(other), "--lora_paths", f"a={qwen_adapter}"]
    for read in (
        lambda: generate.load_model(other, lora_path=qwen_adapter),
        lambda: merge.merge(other, qwen_adapter, tmp_path / "merged"),
        lambda: serve.open_service(serve.arguments(beside)),
    ):
        with pytest.raises(ValueError, match="trained on other weights than those of .*other"):
            read()
    assert not (tmp_path / "merged").exists()
    shutil.copytree(qwen_adapter, tmp_path / "damaged")
    tensors = load_file(qwen_adapter / "adapter_model.safetensors")
    for sample in ("x", "a b c", "a 0 AAAA"):
        save_file(tensors, tmp_path / "damaged/adapter_model.safetensors", {"base": sample})
        with pytest.raises(ValueError, match="damaged.*of its base is damaged|trained on other weights"):
            lora.check_base(tmp_path / "damaged", checkpoint.open_model(directory, qwen.MODEL))
    shutil.copytree(qwen_adapter, tmp_path / "moved")
    config = json.loads((tmp_path / "moved/adapter_config.json").read_text())
    for name, found in (
        ("samples/tiny_qwen_vl", directory),
        ("/gone/other", tmp_path / "other"),
        ("gone", None),
    ):
        (tmp_path / "moved/adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": name})
        )
        if found:
            assert Path(lora.find_base("moved")) == found
        else:
            with pytest.raises(ValueError, match="names the base model 'gone'.* with --model_name_or_path"):
                lora.find_base("moved")


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
)
def test_tied_weights_that_peft_saves(tmp_path, options):
    """What PEFT saves of a tied weight is tied no longer; here and merged it computes what PEFT does."""
    directory, slot = ROOT / "samples/tiny_blip2", 1001
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False, **options)
    theirs = peft.get_peft_model(their_base(directory, "blip2", slot), config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "modules_to_save" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    theirs.save_pretrained(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(their_base(directory, "blip2", slot), str(tmp_path / "a")).eval()
    batch = blip2.probe_batch(blip2.load_processor(directory))
    expected = transformers_logits(theirs, batch, "blip2", slot)
    ours = logits_of(generate.load_model(directory, lora_path=tmp_path / "a"), batch)
    scale = expected.abs().max()
    torch.testing.assert_close(ours / scale, expected / scale, atol=1e-3, rtol=0)
    merge.merge(directory, tmp_path / "a", tmp_path / "merged", torch.float32)
    merged = logits_of(generate.load_model(tmp_path / "merged"), batch)
    torch.testing.assert_close(merged / scale, expected / scale, atol=1e-3, rtol=0)


def test_a_tied_weight_is_saved_under_all_its_names(tmp_path):
    directory, head = ROOT / "samples/tiny_blip2", "base_model.model.language_model.lm_head.weight"
    ours = trained_adapter(
        directory, tmp_path / "a", {"freeze_exclude": ["language_model.*.embed_tokens.weight"]}
    )
    state = load_file(tmp_path / "a/adapter_model.safetensors")
    assert torch.equal(state[head], ours.language_model.model.decoder.embed_tokens.weight)
    del state[head]
    save_file(state, tmp_path / "a/adapter_model.safetensors")
    for read in (
        lambda: generate.load_model(directory, lora_path=tmp_path / "a"),
        lambda: lora.load_adapter(generate.load_model(directory), tmp_path / "a"),
    ):
        with pytest.raises(ValueError, match="one tied tensor in this model, the adapter holds only"):
            read()


@pytest.mark.parametrize("tied", [True, False])
def test_an_untied_opt_is_transformers(tmp_path, tied):
    directory = tmp_path / "base"
    shutil.copytree(ROOT / "samples/tiny_blip2", directory)
    config, state = checkpoint.read_config(directory), load_file(directory / "model.safetensors")
    words = state["language_model.model.decoder.embed_tokens.weight"]
    head = torch.randn(words.shape, generator=torch.Generator().manual_seed(0)) / 10
    state["language_model.lm_head.weight"] = words.clone() if tied else head
    save_file(state, directory / "model.safetensors")
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = tied
    checkpoint.write_json(directory / "config.json", config)
    batch = blip2.probe_batch(blip2.load_processor(directory))
    expected = transformers_logits(their_base(directory, "blip2", 1001), batch, "blip2", 1001)
    model = generate.load_model(directory)
    assert hasattr(model.language_model, "lm_head") is not tied
    scale = expected.abs().max()
    torch.testing.assert_close(logits_of(model, batch) / scale, expected / scale, atol=1e-3, rtol=0)


def test_a_base_with_nan_is_not_merged(qwen_adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(ROOT / "samples/tiny_qwen_vl", base)
    state = load_file(base / "model.safetensors")
    state["transformer.wte.weight"][7, 3] = float(
        "nan"
    )  # a value that the adapter's record of its base does not hold
    save_file(state, base / "model.safetensors")
    with pytest.raises(ValueError, match="transformer.wte.weight holds NaN"):
        merge.merge(base, qwen_adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
