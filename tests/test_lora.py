"""lora.py against PEFT (both directions), its dropout as a pure function, and merge.py on toy weights."""

import dataclasses
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from ranks import exit_codes, start, together
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint as recomputed

import lora
import merge
import model_visualglm
import terminal
import vlm
from checkpoint import copy_full_, gathered, load_into, open_weights
from kernels import dropout
from kernels.dropout import Mask, drop, dropout_mask, dropout_ref


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj, self.norm = nn.Linear(8, 12), nn.Linear(12, 8, bias=False), nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.norm(x * self.gain + self.c_proj(torch.tanh(self.c_attn(x))))


class Toy(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.wte, self.h, self.lm_head = (
            nn.Embedding(20, 8),
            nn.ModuleList([Block(), Block()]),
            nn.Linear(8, 20),
        )

    def hidden(self, input_ids):
        x = self.wte(input_ids)
        for block in self.h:
            x = block(x)
        return x

    def logits(self, x):
        return self.lm_head(x)

    def prepare_inputs_for_generation(self):
        """PEFT wants to see one on a CAUSAL_LM."""

    def forward(self, input_ids):
        return self.logits(self.hidden(input_ids))


IDS = torch.arange(20)
TARGETS = [r"h\.\d+\.c_attn", r".*\.1\.c_proj"]


def adapted(dropout=0.0, random_b=True):
    model = Toy()
    names = lora.inject(model, TARGETS, rank=2, alpha=6, dropout=dropout)
    if random_b:
        for name in names:
            nn.init.normal_(model.get_submodule(name).lora_B.weight)
    return model, names


def save(directory, model, names, extra=()):
    params = dict(model.named_parameters())
    directory.mkdir(exist_ok=True)
    lora.save_adapter(
        directory,
        model,
        lora.LoraConfig("base", 2, 6, 0.1),
        names,
        extra,
        lambda name: gathered(params[name]),
    )


def test_inject():
    model, names = adapted(random_b=False)
    assert names == ["h.0.c_attn", "h.1.c_attn", "h.1.c_proj"]
    assert torch.equal(model(IDS), Toy()(IDS))  # B is zero: nothing changes yet
    assert set(dict(model.named_parameters())) - set(dict(Toy().named_parameters())) == {
        f"{name}.lora_{side}.weight" for name in names for side in "AB"
    }
    with pytest.raises(ValueError, match="'h.0.c_atn' matches no linear layer.* h.0.c_attn"):
        lora.inject(Toy(), ["h.0.c_atn"], 2, 4, 0)
    with pytest.raises(ValueError, match="'c_attn' matches no"):  # the whole name, not its end
        lora.inject(Toy(), ["c_attn"], 2, 4, 0)
    with pytest.raises(ValueError, match="no regular expression"):
        lora.inject(Toy(), ["(h"], 2, 4, 0)
    # a tower that a pattern hits along with other modules is not meant; one that it hits alone is
    assert lora.inject(Toy(), [r".*c_attn"], 2, 4, 0, tower=["h.0.*"]) == ["h.1.c_attn"]
    assert lora.inject(Toy(), [r"h\.0\.c_attn"], 2, 4, 0, tower=["h.0.*"]) == ["h.0.c_attn"]
    with torch.device("meta"):
        meta = Toy()
    lora.inject(meta, TARGETS, 2, 6, 0)
    meta.to_empty(device="cpu")
    for name, p in meta.named_parameters():
        if ".lora_" in name:
            lora.init_lora(name, p, torch.Generator().manual_seed(0))
    A = meta.h[0].c_attn.lora_A.weight
    assert (
        0.3 < A.abs().max() <= 8**-0.5 and not meta.h[0].c_attn.lora_B.weight.any()
    )  # PEFT: U(-1/sqrt(in), ...)


def test_forward_is_base_plus_update_in_any_dtype():
    model, _ = adapted()
    layer, x = model.h[0].c_attn, torch.randn(5, 8)
    expected = nn.functional.linear(
        x, layer.weight + 3 * layer.lora_B.weight @ layer.lora_A.weight, layer.bias
    )
    torch.testing.assert_close(layer(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x).float(), expected, atol=0.05, rtol=0.05)
    layer.weight.data, layer.bias.data = layer.weight.data.bfloat16(), layer.bias.data.bfloat16()
    y = layer(x.bfloat16())  # 16-bit base, fp32 adapter
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)
    y.sum().backward()
    assert layer.lora_A.weight.grad.dtype == torch.float32


# ---- PEFT


@pytest.mark.parametrize("extra", [(), ("lm_head.weight", "lm_head.bias", "h.0.norm.weight", "h.0.gain")])
def test_peft_reads_ours(tmp_path, extra):
    peft = pytest.importorskip("peft")
    model, names = adapted()
    with torch.no_grad():
        for name in extra:
            model.get_parameter(name).add_(torch.randn(model.get_parameter(name).shape))
    save(tmp_path, model, names, extra)
    theirs = peft.PeftModel.from_pretrained(Toy(), str(tmp_path), low_cpu_mem_usage=False)
    torch.testing.assert_close(theirs.base_model.model(IDS), model(IDS))
    ours = Toy()
    assert lora.load_adapter(ours, tmp_path) == names
    assert torch.equal(ours(IDS), model(IDS)) and not torch.equal(ours(IDS), Toy()(IDS))


@pytest.mark.filterwarnings("ignore:.*embedding layer")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"target_modules": ["c_attn", "not_here"]},
        {
            "target_modules": r"h\..*\.(c_attn|c_proj)",
            "rank_pattern": {"1.c_attn": 5},
            "alpha_pattern": {"c_proj": 3},
        },
        {"target_modules": ["c_proj"], "use_rslora": True, "modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear", "exclude_modules": ["lm_head"]},
        {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"},
        {"target_modules": ["c_attn"], "modules_to_save": ["h.1"]},
        {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
    ],
)
def test_we_read_pefts(tmp_path, kwargs):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **kwargs)
    theirs = peft.get_peft_model(Toy(), config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "modules_to_save" in name or "magnitude" in name:
                p.add_(1)
    theirs.save_pretrained(str(tmp_path))
    ours = Toy().eval()
    names = lora.load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(IDS), theirs.base_model.model(IDS))
    assert not torch.allclose(ours(IDS), Toy()(IDS), atol=1e-3)
    # and what was varied by module survives our own saving
    params = dict(ours.named_parameters())
    lora.save_adapter(
        tmp_path,
        ours,
        lora.LoraConfig("base", 4, 6, 0.0),
        names,
        [n for n in params if n.startswith(tuple(kwargs.get("modules_to_save", ()))) and ".lora_" not in n],
        params.__getitem__,
    )
    again = Toy().eval()
    lora.load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), ours(IDS))


def test_doras_gradients_are_pefts(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn", "c_proj"], use_dora=True, init_lora_weights=False, lora_alpha=6
    )
    theirs, ours = peft.get_peft_model(Toy(), config), Toy()
    theirs.save_pretrained(str(tmp_path))
    lora.load_adapter(ours, tmp_path)
    for model in (theirs.base_model.model, ours):
        model(IDS).square().sum().backward()
    found = {name: p.grad for name, p in ours.named_parameters() if ".lora_" in name}
    assert len(found) == 12
    for name, p in theirs.base_model.model.named_parameters():
        if ".lora_" in name:
            own = name.replace(".default", "").replace(lora.MAGNITUDE + ".weight", lora.MAGNITUDE)
            torch.testing.assert_close(p.grad, found[own], rtol=1e-4, atol=1e-5)


def test_pissa_takes_what_pefts_takes():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=TARGETS[0], init_lora_weights="pissa", lora_alpha=6)
    theirs, ours = peft.get_peft_model(Toy(), config), Toy()
    names = lora.inject(ours.requires_grad_(False), TARGETS[:1], 2, 6, 0.0)
    starts = lora.take_principal(ours, names, ours.get_parameter, lambda p, full: p.copy_(full))
    for name in names:
        (A, B), module = starts[name], theirs.base_model.model.get_submodule(name)
        torch.testing.assert_close(ours.get_submodule(name).weight, module.base_layer.weight)
        update = module.lora_B.default.weight @ module.lora_A.default.weight
        torch.testing.assert_close(B @ A, update)  # each factor up to its sign
    torch.testing.assert_close(ours(IDS), Toy()(IDS))
    with pytest.raises(ValueError, match=r"h.0.c_attn, \(12, 8\), must be frozen and"):
        ours.requires_grad_(True)
        lora.take_principal(ours, names, ours.get_parameter, lambda p, full: None)


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    model, names = adapted()

    def refuse(match, change_tensors=lambda t: t, change_config=None):
        save(tmp_path, model, names)
        file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
        save_file(change_tensors(load_file(file)), file)
        config.write_text(json.dumps(json.loads(config.read_text()) | (change_config or {})))
        with pytest.raises(ValueError, match=match):
            lora.load_adapter(Toy(), tmp_path)

    def without(*parts):
        return lambda tensors: {n: t for n, t in tensors.items() if not any(part in n for part in parts)}

    p = lora.PREFIX
    refuse("lacks 'h.0.c_attn.lora_B.weight'", without("h.0.c_attn.lora_B"))
    refuse("lacks h.0.c_attn.lora_A.weight", without("h.0.c_attn"))  # the whole pair
    refuse(
        "lacks h.0.c_attn.lora_A.weight", without("h.0.c_attn"), {"target_modules": ["c_attn", "1.c_proj"]}
    )
    refuse("no LoRA weights", without("lora"))
    refuse(
        "'h.7.c_attn', which is no linear", lambda t: t | {f"{p}h.7.c_attn.lora_A.weight": torch.zeros(2, 8)}
    )
    refuse("'h.0.norm', which is no linear", lambda t: t | {f"{p}h.0.norm.lora_A.weight": torch.zeros(2, 8)})
    embedding = {f"{p}wte.lora_A.weight": torch.zeros(2, 8), f"{p}wte.lora_B.weight": torch.zeros(20, 2)}
    refuse("does not name", lambda t: t | embedding)
    refuse("'wte', a Embedding", lambda t: t | embedding, {"target_modules": [*names, "wte"]})
    refuse("'gone.weight', which this model does not", lambda t: t | {f"{p}gone.weight": torch.zeros(2)})
    refuse(r"'lm_head.bias' is \(2,\), expected \(20,\)", lambda t: t | {f"{p}lm_head.bias": torch.zeros(2)})
    refuse(r"is \(2, 8\), expected \(3, 8\)", change_config={"r": 3})
    refuse("not a LoRA weight", lambda t: t | {f"{p}wte.lora_embedding_A": torch.zeros(2)})
    refuse("lacks 'h.0.c_attn.lora_magnitude_vector'", change_config={"use_dora": True})
    length = {f"{p}h.0.c_attn.lora_magnitude_vector": torch.ones(12)}
    refuse("magnitude_vector', but has no use_dora", lambda t: t | length)
    refuse("bias", change_config={"bias": "all"})
    refuse("peft_type is 'IA3'", change_config={"peft_type": "IA3"})
    save(tmp_path, model, names)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="cut short or no safetensors"):
        lora.load_adapter(Toy(), tmp_path)
    with pytest.raises(ValueError, match="holds no LoRA adapter"):
        lora.load_adapter(Toy(), tmp_path / "nowhere")
    save(tmp_path, model, names)
    other = Toy()
    lora.inject(other, TARGETS, 2, 8, 0)
    with pytest.raises(
        ValueError, match="scaling 3, but lora_rank, lora_alpha and use_rslora give rank 2 and scaling 4"
    ):
        lora.load_adapter(other, tmp_path)
    lora.inject(other := Toy(), TARGETS, 2, 6, 0)
    for name in names:
        lora.add_magnitude(other.get_submodule(name))
    with pytest.raises(ValueError, match="use_dora=false; set use_dora to the adapter's"):
        lora.load_adapter(other, tmp_path)
    lora.inject(other := Toy(), [r"h\.\d\..*"], 2, 6, 0)
    with pytest.raises(ValueError, match="no tensors for h.0.c_proj"):
        lora.load_adapter(other, tmp_path)


# ---- dropout


def keys_of(sample: int, length: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (length,), generator=torch.Generator().manual_seed(sample))


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_statistics(p):
    x, keys = torch.zeros(2000, 301), keys_of(0, 2000)
    mask = dropout_mask(x, Mask(keys, p, 1)).float()
    assert abs(mask.mean() - (1 - p)) < 2e-3  # 600,000 draws: 7 standard deviations
    assert (mask.mean(0) - (1 - p)).abs().max() < 6 * (p * (1 - p) / 2000) ** 0.5  # each channel
    assert (mask.mean(1) - (1 - p)).abs().max() < 6 * (p * (1 - p) / 301) ** 0.5  # each row
    consecutive = dropout_mask(x, Mask(torch.arange(2000), p, 1)).float()
    other = dropout_mask(x, Mask(keys, p, 2)).float()

    def z(a, b):  # correlation in standard deviations
        return ((a - 1 + p) * (b - 1 + p)).mean().abs() / (p * (1 - p)) * a.numel() ** 0.5

    assert z(mask, other) < 5 and z(mask, consecutive) < 5  # modules, keys
    for m in (mask, consecutive):
        assert z(m[1:], m[:-1]) < 5 and z(m[:, 1:], m[:, :-1]) < 5  # neighbours


@pytest.mark.parametrize("images", [0, 3])
def test_dropout_as_an_operator_is_dropout(images):
    """What a compiled block calls: forward and backward."""
    x, dy = torch.randn(2, 12, 33)
    mask = Mask(torch.randint(-(2**62), 2**62, (images or 12,)), 0.3, 1147886398, 4, images)
    results = []
    for dropped in (
        lambda x: dropout.dropout(x, mask, 0.7),
        lambda x: dropout._opaque(x, mask.keys, 0.3, mask.seed, 4, images, 0.7),
    ):
        own = x.clone().requires_grad_()
        y = dropped(own)
        y.backward(dy)
        results.append((y.detach(), own.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and (results[0][1] == 0).any()


def test_dropout_depends_on_keys_only():
    a, b = keys_of(1, 5), keys_of(2, 7)

    def mask(keys, C=9, first=0):
        return dropout_mask(torch.zeros(len(keys), C), Mask(keys, 0.5, 3, first))

    packed, order = mask(torch.cat([a, b])), torch.randperm(12)
    assert torch.equal(packed, torch.cat([mask(a), mask(b)]))
    assert torch.equal(packed[order], mask(torch.cat([a, b])[order]))
    assert torch.equal(packed[:, 4:], mask(torch.cat([a, b]), C=5, first=4))  # a tensor-parallel slice
    images = keys_of(3, 2)  # of 4 tokens each
    both = dropout_mask(torch.zeros(2, 4, 9), Mask(images, 0.5, 3, images=2))
    assert both.shape == (2, 4, 9) and not torch.equal(both[:, 0], both[:, 1])
    assert torch.equal(both[1:], dropout_mask(torch.zeros(1, 4, 9), Mask(images[1:], 0.5, 3, images=1)))
    with pytest.raises(AssertionError, match="8 rows"):
        dropout_mask(torch.zeros(8, 9), Mask(a, 0.5, 3))
    with pytest.raises(AssertionError, match="9 rows of 2 images, but dropout keys of 2"):
        dropout_mask(torch.zeros(9, 9), Mask(images, 0.5, 3, images=2))
    with pytest.raises(
        AssertionError, match="8 rows of 4 images, but dropout keys of 2"
    ):  # though 2 divides 8
        dropout_mask(torch.zeros(8, 9), Mask(images, 0.5, 3, images=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dropout_in_blocks_is_the_definition(monkeypatch, dtype):
    monkeypatch.setattr("kernels.dropout.BLOCK", 64)
    for C, first, images in ((9, 0, 0), (9, 3, 0), (40, 2, 4), (1, 7, 0), (301, 0, 2)):
        x = torch.randn(12, C + 1, dtype=dtype)[:, 1:]  # rows with a gap between them
        mask = Mask(keys_of(1, images or 12), 0.3, 5, first, images)
        for y, source in zip(drop([x, 2 * x], mask), (x, 2 * x), strict=True):
            assert torch.equal(y, dropout_ref(source, mask))
        assert torch.equal(drop([x], mask, 0.7)[0], dropout_ref(x, mask, 0.7))


def test_dropout_in_the_layer():
    model, _ = adapted(dropout=0.5)
    layer, x = model.h[0].c_attn, torch.randn(20, 8, requires_grad=True)
    plain = layer(x)  # no keys: no dropout
    keys = keys_of(1, 20)
    kept = dropout_mask(x, Mask(keys, 0.5, layer.seed))
    expected = nn.functional.linear(x, layer.weight, layer.bias) + 3 * layer.lora_B(
        layer.lora_A(x * kept / 0.5)
    )
    assert layer.seed != model.h[1].c_attn.seed
    with dropout.dropout_rows(keys):
        torch.testing.assert_close(layer(x), expected)
        assert not torch.allclose(plain, expected)
        recompute = dropout.with_rows_of_now(layer)
        outputs = layer(x), recomputed(recompute, x, use_reentrant=False)
    with dropout.dropout_rows(
        keys_of(2, 20)
    ):  # another micro-batch is in flight when the backward pass comes
        grads = [torch.autograd.grad(y.square().sum(), layer.lora_A.weight)[0] for y in outputs]
    assert torch.equal(*grads)
    assert torch.equal(layer(x), plain)
    model.eval()
    with dropout.dropout_rows(keys):
        assert torch.equal(layer(x), plain)


# ---- sharded


def two_ranks(rank, directory):
    model, names = adapted(dropout=0.5)
    plain, _ = adapted(dropout=0.5)
    for m in (model, plain):
        for name, p in m.named_parameters():
            p.requires_grad_(".lora_" in name)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with dropout.dropout_rows(keys_of(1, 20)):
        outputs = [m(IDS) for m in (model, plain)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().mean().backward()
    grad = model.h[0].c_attn.lora_A.weight.grad.full_tensor()
    torch.testing.assert_close(grad, plain.h[0].c_attn.lora_A.weight.grad)
    params = dict(model.named_parameters())
    lora.save_adapter(
        directory,
        model,
        lora.LoraConfig("base", 2, 6, 0.5),
        names,
        [],
        lambda n: gathered(params[n]),
        rank == 0,
    )
    torch.distributed.barrier()
    torch.nn.init.zeros_(model.h[0].c_attn.lora_B.weight)
    lora.load_adapter(model, directory, copy=copy_full_)
    with dropout.dropout_rows(keys_of(1, 20)):
        torch.testing.assert_close(model(IDS), outputs[0])


def test_lora_under_fully_shard(tmp_path):
    together(two_ranks, tmp_path)
    model = Toy()
    lora.load_adapter(model, tmp_path)
    assert torch.equal(model(IDS), adapted()[0](IDS))


# ---- merge.py, with a toy in the place of a model file


class ToyFile:
    """Stands in for model_visualglm.py and merge.streamed_model."""

    MODEL = dataclasses.replace(
        model_visualglm.MODEL,
        ignored_weights=[],
        build_model=lambda config: Toy(),
        load_processor=lambda directory, stage: None,
        probe_batch=lambda processor: IDS,
    )
    wrong = 0.0  # added to the merged model's logits, to see the check fail

    @classmethod
    def streamed_model(cls, directory, lora_path=None):
        model = Toy()
        load_into(dict(model.named_parameters()), open_weights(directory))
        if lora_path is not None:
            lora.load_adapter(model, lora_path)
        elif str(directory).endswith(".tmp"):
            model.lm_head.bias.data += cls.wrong
        return model.eval()


@pytest.fixture
def merge_setup(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_visualglm", ToyFile)
    monkeypatch.setattr(merge, "streamed_model", ToyFile.streamed_model)
    monkeypatch.setattr(vlm, "check_complete", lambda *_: None)  # a toy is no whole model
    monkeypatch.chdir(tmp_path)
    lora.base_sample.cache_clear()

    def write(dtype=torch.float32):
        Path("base").mkdir(exist_ok=True)
        save_file({n: p.detach().to(dtype) for n, p in Toy().named_parameters()}, "base/model.safetensors")
        Path("base/config.json").write_text('{"model_type": "visualglm", "torch_dtype": "float32"}')
        Path("base/ice_text.model").write_text("tokenizer")
        model, names = adapted()
        model.lm_head.weight.data = model.lm_head.weight.data.to(dtype).float()  # frozen, so as in the base
        model.lm_head.bias.data += 1
        save(Path("output"), model, names, ["lm_head.bias"])
        return model, names

    return write


@pytest.mark.parametrize(
    "base_dtype,dtype", [("float32", "keep"), ("bfloat16", "keep"), ("float32", "float16")]
)
def test_merge(merge_setup, capsys, base_dtype, dtype):
    model, names = merge_setup(getattr(torch, base_dtype))
    for _ in range(2):  # the second replaces an earlier merge
        merge.main(["--model_name_or_path", "base", "--dtype", dtype])
    out = capsys.readouterr().out
    assert "largest logit difference merged vs base+adapter: " in out
    assert "generate.py --model_name_or_path merged" in out
    merged, stored = (
        load_file("merged/model.safetensors"),
        getattr(torch, base_dtype if dtype == "keep" else dtype),
    )
    base = load_file("base/model.safetensors")
    assert set(merged) == set(base) and all(t.dtype == stored for t in merged.values())
    for name, tensor in merged.items():
        expected = base[name].double()
        if name.removesuffix(".weight") in names:
            layer = model.get_submodule(name.removesuffix(".weight"))
            expected = expected + 3 * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
        elif name == "lm_head.bias":
            expected = model.lm_head.bias.detach().double()
        else:
            assert torch.equal(tensor, base[name].to(stored))
        torch.testing.assert_close(
            tensor.double(),
            expected.detach(),
            rtol=torch.finfo(stored).eps,
            atol=2e-6 * float(expected.abs().max()),
        )
    assert Path("merged/ice_text.model").read_text() == "tokenizer"
    assert json.loads(Path("merged/merge_info.json").read_text())["changed_tensors"] == 4
    assert sorted(p.name for p in Path(".").iterdir()) == ["base", "merged", "output"]


def test_merge_refuses(merge_setup, capsys, monkeypatch):
    model, names = merge_setup()

    def refuse(match, *args):
        assert terminal.cli(lambda: merge.main(["--model_name_or_path", "base", *args])) == 1
        assert re.search(match, capsys.readouterr().err)
        assert not Path("merged").exists() and not Path("merged.tmp").exists()

    refuse("holds the base model", "--merge_model_path", "base")
    refuse("holds the adapter", "--merge_model_path", "output")
    Path("full").mkdir()
    Path("full/notes.txt").write_text("keep")
    refuse("no earlier merge", "--merge_model_path", "full")
    refuse("'gone' is no checkpoint directory", "--model_name_or_path", "gone")
    Path("run/checkpoint-7").mkdir(parents=True)
    refuse("train one with lora", "--lora_path", "run")
    Path("output").rename("run/checkpoint-9")
    refuse("run/checkpoint-9 does", "--lora_path", "run")
    monkeypatch.setattr(ToyFile, "wrong", 0.5)
    refuse("self-check failed: logits are off by 0.5", "--lora_path", "run/checkpoint-9")
    save(Path("output"), *adapted(random_b=False))
    refuse("changes nothing")
    for name in names:
        model.get_submodule(name).lora_B.weight.data *= 1e-6
    save(Path("output"), model, names)
    refuse("lost in rounding to torch.bfloat16", "--dtype", "bfloat16")
    model.h[0].c_attn.lora_B.weight.data += 1e6
    save(Path("output"), model, names)
    refuse("too large for torch.float16", "--dtype", "float16")
    other = {n.replace("c_attn", "qkv"): p.detach() for n, p in Toy().named_parameters()}
    save_file(other, "base/model.safetensors")
    refuse("trained on other weights than those of base")
    Path("base/config.json").write_text('{"model_type": "llama"}')
    refuse("model_type='llama'")


def killed_merge(kill_at: int, count: Path) -> None:
    """In a child: merge, killed before its kill_at-th change of the file system."""
    changes = 0

    def hook(event, args):
        nonlocal changes
        writes = event == "open" and isinstance(args[1], str) and any(c in args[1] for c in "wax+")
        if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or writes:
            changes += 1
            os.write(file, b".")
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    file = os.open(count, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.addaudithook(hook)
    sys.modules["model_visualglm"], merge.streamed_model = ToyFile, ToyFile.streamed_model
    vlm.check_complete = lambda *_: None
    os._exit(merge.main(["--model_name_or_path", "base"]))


@pytest.mark.slow
def test_a_killed_merge_loses_nothing(merge_setup):
    """kill -9 at each of its changes, over an earlier merge: that is
    there, or put back by the same command."""
    merge_setup()
    merge.main(["--model_name_or_path", "base"])
    whole = Path("merged/model.safetensors").read_bytes()

    def child(kill_at: int) -> int:
        return exit_codes(start(killed_merge, kill_at, Path("count")))[0]

    assert child(-1) == 0
    changes = Path("count").stat().st_size
    assert changes > 5
    for kill_at in range(1, changes + 1):
        assert child(kill_at) == -signal.SIGKILL
        kept = [p for p in (Path("merged"), Path("merged.old")) if (p / "merge_info.json").is_file()]
        assert kept and all((p / "model.safetensors").read_bytes() == whole for p in kept), kill_at
        assert child(-1) == 0 and Path("merged/model.safetensors").read_bytes() == whole
        assert not Path("merged.old").exists() and not Path("merged.tmp").exists()
