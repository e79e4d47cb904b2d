"""Branches are found from the structure of the residual stream, and what is not understood is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dropbp
from dropbp import inputs as example
from dropbp.discovery.build import analyse
from dropbp.discovery.discover import find
from dropbp.discovery.record import record
from dropbp.discovery.restore import recording_mode
from dropbp.errors import DiscoveryError
from dropbp.flops import Shape, fitted
from tests.campaigns.zoo.check import check_model
from tests.campaigns.zoo.tiny import case

# What each architecture stands for, and how many branches its tiny model has.
REPRESENTATIVE = {
    "LlamaForCausalLM": ("causal-lm", 6),  # sequential, norm before
    "Gemma2ForCausalLM": ("causal-lm", 6),  # norms before and after
    "BertForMaskedLM": ("masked-lm", 6),  # norm after the addition, inside of a submodule
    "GPTNeoXForCausalLM": ("causal-lm", 6),  # parallel, two norms
    "GPTJForCausalLM": ("causal-lm", 6),  # parallel, one norm shared
    "CohereForCausalLM": ("causal-lm", 6),  # parallel, one chain of additions
    "FalconForCausalLM": ("causal-lm", 6),
    "BloomForCausalLM": ("causal-lm", 6),  # additions hidden in submodules
    "GraniteForCausalLM": ("causal-lm", 6),  # scaled
    "MixtralForCausalLM": ("causal-lm", 6),  # experts
    "Qwen2MoeForCausalLM": ("causal-lm", 6),  # experts, and shared ones with a gate
    "LongcatFlashForCausalLM": ("causal-lm", 15),  # experts added one sublayer late
    "DogeForCausalLM": ("causal-lm", 6),  # attention masks made from the input
    "GPTNeoXJapaneseForCausalLM": ("causal-lm", 6),  # a branch returns its bias, which the block adds
    "AlbertForMaskedLM": ("masked-lm", 6),  # one layer's weights for all
    "T5ForConditionalGeneration": ("encoder-decoder", 15),
    "BartForConditionalGeneration": ("encoder-decoder", 15),
    "ViTForImageClassification": ("vision", 6),
    "SwinForImageClassification": ("vision", 6),  # relative position biases
    "ConvNextForImageClassification": ("vision", 6),  # scales that belong to no module of the branch
    "ResNetForImageClassification": ("vision", 3),  # blocks that change the shape have no residual
}


def tiny(name: str) -> nn.Module:
    return case(name, REPRESENTATIVE[name][0]).build()


def llama(**sizes: Any) -> transformers.LlamaForCausalLM:
    options = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**options, **sizes}))


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_every_branch_of_a_representative_architecture_is_found_and_dropped_exactly(name: str) -> None:
    family, branches = REPRESENTATIVE[name]
    verdict = check_model(name, family, tiny(name))
    assert (verdict.verdict, verdict.detail) == ("right", "")
    assert verdict.branches == branches


@pytest.mark.parametrize("name", [n for n, (family, _) in REPRESENTATIVE.items() if family != "vision"])
def test_no_weight_of_a_transformer_block_is_left_out(name: str) -> None:
    model = tiny(name)
    handle = dropbp.enable(model)
    blocks = tuple(f"{block}." for block in handle.engine.structure.blocks)
    weights = {n for n, p in model.named_parameters() if p.dim() >= 2 and n.startswith(blocks)}
    assert weights
    assert weights <= set(handle.engine.structure.parameters)


def test_attention_and_mlp_of_every_layer_are_named() -> None:
    names = [branch.name for branch in dropbp.discover(llama(num_hidden_layers=3))]
    assert names == [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")]


def test_branches_of_parallel_sublayers_share_a_norm_that_drops_with_both() -> None:
    structure = _structure(tiny("GPTJForCausalLM"))
    needs = {module.name: module.needs for module in structure.branch_modules}
    assert needs["transformer.h.0.ln_1"] == (0b11,)


# -- models of one's own


class Gate(nn.Module):
    """`gate(x) * x + f(x)`: the stream is scaled by something made from itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.f = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, x_BD: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(x_BD)) * x_BD + self.f(x_BD)


class GatedBranch(nn.Module):
    """`x + gate(x) * f(x)`, the gate used for the stream as well: only f can be dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.f = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x_BD: Tensor) -> Tensor:
        gate_BD = torch.sigmoid(self.gate(x_BD))
        return (1 - gate_BD) * x_BD + gate_BD * self.f(x_BD)


class Scaled(nn.Module):
    """`x * a + b + scale * f(x)` with parameters that belong to no module of the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)
        self.a, self.b, self.scale = (nn.Parameter(torch.ones(8)) for _ in range(3))

    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD * self.a + self.b + self.scale * self.f(x_BD)


@pytest.mark.parametrize("block", [Gate, GatedBranch, Scaled])
def test_custom_residual_blocks_are_found_and_exact(block: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ModuleList([block(), block()])[0], block(), nn.Linear(8, 2))
    verdict = check_model("own", "own", model, example.Inputs(args=(torch.randn(3, 4),)))
    assert (verdict.verdict, verdict.detail, verdict.branches) == ("right", "", 2)


class Listed(nn.Module):
    """Layers are plain lists, with a list of norms inside: none of the lists is ever called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([self._norms(), *self._branches()]) for _ in range(3))

    def _norms(self) -> nn.Module:
        return nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])

    def _branches(self) -> list[nn.Module]:
        return [nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(2)]

    def forward(self, x_BD: Tensor) -> Tensor:
        for norms, mix, mlp in self.layers:
            x_BD = x_BD + mix(norms[0](x_BD))
            x_BD = x_BD + mlp(norms[1](x_BD))
        return x_BD


def test_lists_that_are_never_called_are_no_idle_modules() -> None:
    torch.manual_seed(0)
    verdict = check_model("listed", "own", Listed(), example.Inputs(args=(torch.randn(3, 8),)))
    assert (verdict.verdict, verdict.detail, verdict.branches) == ("right", "", 6)


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_transformer_encoder_is_exact(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    verdict = check_model("encoder", "own", model, example.Inputs(args=(torch.randn(2, 5, 16),)))
    assert (verdict.verdict, verdict.detail, verdict.branches) == ("right", "", 6)


def test_stem_and_head_in_the_same_sequence_as_the_blocks_are_left_alone() -> None:
    stem = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model = nn.Sequential(stem, Gate(), Gate(), nn.Linear(8, 8))
    found = dropbp.discover(nn.Sequential(model), example_inputs=torch.randn(3, 8))
    assert [branch.name for branch in found] == ["0.1.f", "0.2.f"]


# -- adapters and quantised weights


@pytest.mark.parametrize("target", ["all-linear", ["q_proj"]])
def test_adapters_on_frozen_weights_give_the_same_branches(target: Any) -> None:
    peft = pytest.importorskip("peft")
    plain = dropbp.discover(llama())
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=target))
    found = dropbp.discover(model)
    assert [b.name for b in found] == [f"base_model.model.{b.name}" for b in plain]


def test_adapters_are_dropped_exactly() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    verdict = check_model("lora", "causal-lm", model)
    assert (verdict.verdict, verdict.detail, verdict.branches) == ("right", "", 4)


class QuantisedLinear(nn.Module):
    """Eight-bit weights without gradients."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return nn.functional.linear(x_BSD, self.weight.to(x_BSD.dtype) * self.scale)


def _bitsandbytes(linear: nn.Linear) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


@pytest.mark.parametrize("quantised", [QuantisedLinear, _bitsandbytes])
def test_quantised_weights_under_adapters_give_all_branches_with_their_flops(quantised: Any) -> None:
    peft = pytest.importorskip("peft")
    plain = dropbp.discover(llama(hidden_size=64, intermediate_size=128))
    model = llama(hidden_size=64, intermediate_size=128)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, quantised(linear))
    model.requires_grad_(False)
    target = ["lm_head"] if quantised is QuantisedLinear else ["q_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=target))
    found = dropbp.discover(model)
    assert [b.name for b in found] == [f"base_model.model.{b.name}" for b in plain]
    assert all(b.flops >= p.flops for b, p in zip(found, plain, strict=True))
    assert all(b.flops <= 1.2 * p.flops for b, p in zip(found, plain, strict=True))


# -- size


def test_a_70b_model_on_meta_is_enabled_within_seconds_and_without_memory() -> None:
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    start = time.monotonic()
    handle = dropbp.enable(model, 0.875)
    assert time.monotonic() - start < 60  # about 4 s; generous, since a busy machine must not fail a test
    assert len(handle.branches) == 160
    assert all(p.is_meta and p.grad is None for p in model.parameters())
    mlp = 16 * 2 * 3 * 8192 * 28672
    assert handle.branches[1].flops == mlp


# -- branches by name


def test_named_branches_replace_those_discovered() -> None:
    model = llama()
    names = ["model.layers.1.mlp", ["model.layers.0.mlp", "model.layers.0.self_attn"]]
    with dropbp.enable(model, masks="exact", branches=names) as handle:
        assert len(handle.branches) == 2
        model.train()
        with handle.fixed([False, True]):
            model(torch.arange(5, 15)[None]).logits.sum().backward()
        first, second = model.model.layers
        assert first.mlp.up_proj.weight.grad is None and first.self_attn.q_proj.weight.grad is None
        assert second.mlp.up_proj.weight.grad is not None and second.self_attn.q_proj.weight.grad is not None
        assert model.model.embed_tokens.weight.grad is not None


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(dropbp.DiscoveryError, match=r"branches= names \['model.layers.7.mlp'\], which Llama"):
        dropbp.enable(llama(), branches=["model.layers.7.mlp"])


def test_naming_a_whole_block_is_refused_since_it_would_cut_the_stream() -> None:
    with pytest.raises(dropbp.DiscoveryError, match=r"model.layers.1 carries the residual stream"):
        dropbp.enable(llama(), branches=["model.layers.1"])


def test_naming_modules_that_never_run_is_refused() -> None:
    model = llama()
    model.unused = nn.Linear(4, 4)
    with pytest.raises(dropbp.DiscoveryError, match=r"\['unused'\], but the small forward never ran them"):
        dropbp.enable(model, branches=["unused"])


# -- what is not understood


def test_a_model_without_residuals_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(dropbp.DiscoveryError, match=r"No residual branch was found in Sequential"):
        dropbp.enable(model, example_inputs=torch.randn(2, 4))


class BareAttention(nn.Module):
    """Computes with parameters of its own, beside the addition: there is no module to run without recording."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.mlp = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

    def forward(self, x_BD: Tensor) -> Tensor:
        x_BD = x_BD + torch.tanh(x_BD @ self.weight)
        return x_BD + self.mlp(x_BD)


def test_a_block_of_which_only_a_part_can_be_dropped_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Sequential(BareAttention(), BareAttention()))
    with pytest.raises(dropbp.DiscoveryError, match=r"Block 0\.0 \(BareAttention\) was not understood: .* 50% of its"):
        dropbp.enable(model, example_inputs=torch.randn(2, 8))


def test_one_block_of_another_kind_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Sequential(Gate(), Gate(), BareAttention()))
    with pytest.raises(dropbp.DiscoveryError, match=r"Block 0\.2 \(BareAttention\) was not understood"):
        dropbp.enable(model, example_inputs=torch.randn(2, 8))


def test_a_model_that_does_not_say_what_it_takes_asks_for_example_inputs() -> None:
    with pytest.raises(dropbp.DiscoveryError, match=r"Gate does not say what its forward takes.*example_inputs"):
        dropbp.enable(Gate())


def test_a_forward_that_fails_is_reported_with_its_error() -> None:
    with pytest.raises(dropbp.DiscoveryError, match=r"small forward .* Gate failed with RuntimeError.*example_inputs"):
        dropbp.enable(Gate(), example_inputs=torch.randn(2, 5))


def test_a_refused_model_is_left_as_it_was() -> None:
    model, inputs = nn.Sequential(nn.Sequential(Gate(), BareAttention())), torch.randn(2, 8)
    before = _everything(model)
    with pytest.raises(dropbp.DiscoveryError):
        dropbp.enable(model, example_inputs=inputs)
    assert _everything(model) == before


# -- the model afterwards


class Counting(nn.Module):
    """Buffers that a forward changes, dropout that draws."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.BatchNorm1d(8), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x_BD: Tensor) -> Tensor:
        self.calls += 1
        return x_BD + self.f(self.norm(x_BD)) + 0 * torch.rand(())


def _everything(model: nn.Module) -> list[Any]:
    modules = [
        (name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__))
        for name, m in model.named_modules()
    ]
    tensors = [(n, t.requires_grad, t.grad is None, t.tolist()) for n, t in model.state_dict(keep_vars=True).items()]
    return [modules, tensors, torch.get_rng_state().tolist(), torch.is_grad_enabled()]


def test_discovery_leaves_the_model_and_the_random_state_exactly_as_they_were() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(Counting(), Counting())
    model[0].f[0].weight.requires_grad_(False)
    model[1].eval()
    inputs = torch.randn(4, 8)
    before = _everything(model)
    assert len(dropbp.discover(model, example_inputs=inputs)) == 2
    assert _everything(model) == before


@dataclasses.dataclass
class Kept:
    """Asked for some of its fields, it raises an error, as configurations with values for each layer do."""

    last_BD: Tensor | None = None
    width: int = 8

    def __getattribute__(self, name: str) -> Any:
        if name == "width":
            raise AttributeError("ask the layers")
        return super().__getattribute__(name)


class Holds(nn.Module):
    """Keeps what it computes in evaluation: in tables, lists and objects, with a flag that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner, self.head = nn.Parameter(torch.ones(8)), nn.Linear(8, 8), nn.Linear(8, 8)
        self._made: dict[str, Tensor] = {}
        self.seen: list[list[Tensor]] = [[torch.zeros(1)]]
        self.kept, self.is_built = Kept(), False

    def forward(self, x_BD: Tensor) -> Tensor:
        if self.training:
            return self.head(x_BD + self.inner(x_BD) * self.scale.exp())
        if not self.is_built:
            self.built_D, self.is_built = self.scale.exp(), True
        scale_D = self._made.setdefault("scale", self.built_D * 1)
        self.seen[0].append(scale_D)
        self.kept.last_BD = x_BD + self.inner(x_BD) * scale_D
        return self.head(self.kept.last_BD)


def test_modules_keep_nothing_of_the_recorded_forward() -> None:
    model, batch = Holds().train(), torch.randn(2, 8)
    made, before = model._made, set(vars(model))
    with dropbp.enable(model, example_inputs=batch):
        assert model._made is made and not made and len(model.seen[0]) == 1 and model.kept.last_BD is None
        with torch.no_grad():
            model.scale.add_(1)
            copy.deepcopy(model)
            assert torch.equal(model.eval()(batch), model.train()(batch))
    assert set(vars(model)) == before | {"built_D"}  # by the evaluation


class Grows(nn.Module):
    """Replaces its table of positions for longer rows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.length = nn.Linear(8, 8), 0
        self.register_buffer("table_SD", torch.zeros(0, 8))

    def forward(self, x_BSD: Tensor) -> Tensor:
        if x_BSD.shape[1] > self.length:
            self.length, self.table_SD = x_BSD.shape[1], torch.ones(x_BSD.shape[1], 8)
        return x_BSD + self.inner(x_BSD + self.table_SD[: x_BSD.shape[1]])


def test_a_buffer_that_the_recorded_forward_replaced_is_put_back() -> None:
    model = nn.Sequential(Grows(), nn.Linear(8, 8))
    table = model[0].table_SD
    with dropbp.enable(model, example_inputs=torch.randn(2, 4, 8)):
        assert model[0].table_SD is table and model[0].length == 0
        model(torch.randn(2, 4, 8))
        assert model[0].length == 4


class WritesData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.register_buffer("level", torch.zeros(()))

    def forward(self, x_BD: Tensor) -> Tensor:
        self.level.data.add_(1)
        return x_BD + self.inner(x_BD) * self.level


def test_a_buffer_that_the_recorded_forward_wrote_by_its_data_is_put_back() -> None:
    model = nn.Sequential(WritesData(), nn.Linear(8, 8))
    version = model[0].level._version
    with dropbp.enable(model, example_inputs=torch.randn(2, 8)):
        assert model[0].level == 0 and model[0].level._version > version
    plain = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8))
    version = plain[0].running_mean._version
    with recording_mode(plain):
        plain(torch.randn(2, 8))
    assert plain[0].running_mean._version == version


class Short(nn.Module):
    """Reads short rows with another module, from the first one on, as BigBird does."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=32)
        self.embedding, self.mixer, self.is_short = nn.Embedding(32, 8), nn.Linear(8, 8), False

    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.shape[1] < 32 and not self.is_short:
            self.mixer, self.is_short = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), True
        x_BSD = self.embedding(input_ids)
        return x_BSD + self.mixer(x_BSD)


def test_a_model_that_replaces_modules_for_generated_inputs_gets_them_back() -> None:
    model, ids = Short(), torch.arange(32).reshape(1, 32)
    mixer, before = model.mixer, _everything(model)
    with pytest.raises(DiscoveryError, match=r"Short replaced the module mixer.*example_inputs"):
        dropbp.enable(model)
    assert model.mixer is mixer and not model.is_short and _everything(model) == before
    with dropbp.enable(model, example_inputs=ids) as handle:
        assert model.mixer is mixer and len(handle.branches) == 1


def test_discovery_leaves_a_model_with_adapters_as_it_was() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules="all-linear"))
    before = _everything(model)
    dropbp.discover(model)
    assert _everything(model) == before


# -- facts for scaling


def _structure(model: nn.Module) -> Any:
    given = example.build(model)
    return analyse(record(model, given.args, given.kwargs), model)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM", "CohereForCausalLM", "MixtralForCausalLM"])
def test_every_branch_has_one_exit_where_its_gradient_can_be_scaled(name: str) -> None:
    structure = _structure(tiny(name))
    assert not structure.unscalable
    assert [e.branch for e in sorted(structure.branch_outputs, key=lambda e: e.branch)] == list(
        range(len(structure.branches))
    )
    for entry in structure.branch_outputs:
        assert any(entry.module.startswith(module) for module in structure.branches[entry.branch].modules)


def test_shared_layers_scale_each_call_for_its_own_branch() -> None:
    structure = _structure(tiny("AlbertForMaskedLM"))
    calls = sorted((e.branch, e.calls) for e in structure.branch_outputs)
    assert [branch for branch, _ in calls] == list(range(6))
    assert [made for _, made in calls] == [(0,), (0,), (1,), (1,), (2,), (2,)]


def test_a_scale_outside_of_the_branchs_modules_cannot_be_scaled_and_says_so() -> None:
    model = nn.Sequential(Scaled(), Scaled())
    with pytest.raises(dropbp.ConfigError, match=r"not exact for branch 0\.f: a parameter is multiplied in outside"):
        dropbp.enable(model, scaling="unbiased", example_inputs=torch.randn(2, 8))


# -- FLOPs


@pytest.mark.parametrize("length", [48, 100])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_flops_at_other_lengths_equal_a_direct_count(length: int, heads: int) -> None:
    model = llama(num_key_value_heads=heads)
    ids = torch.arange(3 * length).reshape(3, length) % 100
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    counts = counter.get_flop_counts()
    with dropbp.enable(model) as handle:
        model.train()
        model(ids)
        for branch in handle.branches:
            assert branch.flops == sum(counts[f"LlamaForCausalLM.{branch.name}"].values())


def test_stacked_experts_are_counted() -> None:
    model = tiny("MixtralForCausalLM")
    config = model.config
    experts = dropbp.discover(model)[1]
    per_token = 2 * 3 * config.hidden_size * config.intermediate_size * config.num_experts_per_tok
    router = 2 * config.hidden_size * config.num_local_experts
    assert experts.flops == 16 * (per_token + router)


def test_a_sliding_window_counts_as_the_full_attention_that_is_computed() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_key_value_heads": 32}
    made = [
        transformers.MistralForCausalLM(transformers.MistralConfig(vocab_size=64, sliding_window=window, **sizes))
        for window in (8, None)
    ]
    windowed, full = (dropbp.discover(model)[0].flops for model in made)
    assert windowed == full


def test_a_branch_that_pads_to_chunks_is_taken_as_proportional() -> None:
    model = fitted({Shape(1, 16): [640], Shape(1, 32): [640]})
    assert model.at(Shape(2, 1000)) == (2 * 1000 * 20,)


class Relative(nn.Module):
    """Projects its table of positions in every branch, once for all rows, as DeBERTa does."""

    def __init__(self) -> None:
        super().__init__()
        self.table_PD, self.places, self.body = nn.Parameter(torch.randn(32, 8)), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return x_BSD + self.body(x_BSD) @ self.places(self.table_PD).T.sum(1).diag()


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_what_is_computed_once_for_all_rows_counts_once(rows: int) -> None:
    branch = find(nn.Sequential(Relative(), nn.Linear(8, 8)), torch.randn(rows, 6, 8), None)
    per_token, table = 2 * 8 * 8 * 2, 2 * 32 * 8 * 8
    for shape in (Shape(1, 6), Shape(16, 6), Shape(3, 100)):
        assert branch.flops.at(shape) == (shape.batch_size * shape.sequence_length * per_token + table,)
