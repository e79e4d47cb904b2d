"""Adapters of PEFT: right gradients for every kind, enabled before or after, and everything else as if DropBP were not
there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dropbp
from tests.campaigns.zoo.training import flops_of_backward
from tests.common.engine_models import (
    assert_same_gradients,
    detached,
    llama_loss,
    masks,
    paper_gradients,
    take_gradients,
    tiny_llama,
    tokens,
)
from tests.promise import assert_equal

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASK = {"task_type": "CAUSAL_LM"}

INJECTED = {
    "LoRA": lambda: peft.LoraConfig(r=2, target_modules=LINEAR, init_lora_weights=False, **TASK),
    "LoRA on attention": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **TASK),
    "rsLoRA": lambda: peft.LoraConfig(r=2, target_modules=LINEAR, init_lora_weights=False, use_rslora=True, **TASK),
    "DoRA": lambda: peft.LoraConfig(r=2, target_modules=LINEAR, init_lora_weights=False, use_dora=True, **TASK),
    "LoRA and saved modules": lambda: peft.LoraConfig(
        r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"], init_lora_weights=False, **TASK
    ),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
        **TASK,
    ),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], init_weights=False, **TASK),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=3, target_r=2, total_step=10, target_modules=LINEAR, init_lora_weights=False, **TASK
    ),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=LINEAR, init_weights=False, **TASK),
    "LoKr": lambda: peft.LoKrConfig(r=2, target_modules=LINEAR, init_weights=False, **TASK),
    "HRA": lambda: peft.HRAConfig(r=2, target_modules=LINEAR, init_weights=False, **TASK),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=8, target_modules=LINEAR, init_weights=False, **TASK),
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"], **TASK),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, **TASK),
}
PROMPTS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "P-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **TASK),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK),
}
# An adaption prompt is put around a branch's module, not inside it: put there later it is refused.
INSIDE = [kind for kind in INJECTED if kind != "adaption prompt"]
INJECTED_CASES = [(kind, "after") for kind in INJECTED] + [(kind, "before") for kind in INSIDE]
PROMPT_CASES = [(kind, when) for kind in PROMPTS for when in ("before", "after")]
MERGING = ["LoRA", "DoRA", "IA3", "VeRA", "LoHa", "LoKr", "HRA", "FourierFT"]


def base():
    # The same number of heads for keys as for queries: adaption prompts know no grouped attention.
    return tiny_llama(num_key_value_heads=2)


def adapted(kind, model=None):
    model = base() if model is None else model
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, {**INJECTED, **PROMPTS}[kind]())
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return wrapped.train()


def branch_names(model):
    handle = dropbp.enable(model)
    names = [branch.name for branch in handle.branches]
    handle.remove()
    return names


def expected_gradients(model, names, mask, loss):
    """The paper's gradients; where its masks leave nothing to train, none."""
    with detached(model, [name for name, dropped in zip(names, mask, strict=True) if dropped]):
        value = loss(model)
        return take_gradients(model, value) if value.requires_grad else dict.fromkeys(dict(model.named_parameters()))


def assert_right(kind, model, handle):
    plain = adapted(kind)
    names = branch_names(copy.deepcopy(plain))
    for mask in masks(len(names)):
        with handle.fixed(mask):
            got = take_gradients(model, llama_loss(model))
        expected = expected_gradients(plain, names, mask, llama_loss)
        assert_same_gradients(got, expected)


@pytest.mark.parametrize("kind", INJECTED)
def test_gradients_are_right_when_enabled_after_the_adapters(kind):
    model = adapted(kind)
    handle = dropbp.enable(model)
    assert len(handle.branches) == 4
    assert_right(kind, model, handle)


@pytest.mark.parametrize("kind", INSIDE)
def test_gradients_are_right_when_enabled_before_the_adapters(kind):
    model = base()
    handle = dropbp.enable(model)
    assert_right(kind, adapted(kind, model), handle)


@pytest.mark.parametrize(("kind", "when"), PROMPT_CASES)
def test_learned_prompts_see_the_kept_branches_only(kind, when):
    """What is trained lies below all branches: dropping any of them changes its gradient, in the paper's way."""
    plain = adapted(kind)
    names = branch_names(base())
    model = base()
    handle = dropbp.enable(model, masks="exact") if when == "before" else None
    model = adapted(kind, model)
    handle = handle or dropbp.enable(model, masks="exact")
    names = [f"base_model.{name}" for name in names]
    for mask in [(False,) * 4, (True, False, False, True), (False, True, True, False)]:
        with handle.fixed(mask):
            got = take_gradients(model, llama_loss(model))
        expected = paper_gradients(plain, names, mask, llama_loss)
        assert_same_gradients(got, expected)


@pytest.mark.parametrize("kind", PROMPTS)
def test_learned_prompts_alone_get_their_exact_gradient_and_nothing_is_saved(kind, caplog):
    model, plain = adapted(kind), adapted(kind)
    handle = dropbp.enable(model, steps=6)
    assert "the gradient of prompt_encoder" in caplog.text and "masks='exact'" in caplog.text
    for _ in range(6):
        got = take_gradients(model, llama_loss(model))
        assert_same_gradients(got, take_gradients(plain, llama_loss(plain)))
    assert handle.report()["realised_drop_rate"] == 0


@pytest.mark.parametrize("kind", PROMPTS)
def test_learned_prompts_put_on_later_get_their_exact_gradient(kind, caplog):
    model = base()
    handle = dropbp.enable(model)
    model, plain = adapted(kind, model), adapted(kind)
    for _ in range(6):
        got = take_gradients(model, llama_loss(model))
        assert_same_gradients(got, take_gradients(plain, llama_loss(plain)))
    assert handle.report()["realised_drop_rate"] == 0 and "An input of LlamaForCausalLM requires" in caplog.text


CHOSEN = {
    "LoRA on all layers": {},
    "DoRA": {"use_dora": True},
    "LoRA on the lower layers": {"layers_to_transform": [0, 1]},
    "LoRA on the upper layers": {"layers_to_transform": [2, 3]},
    "LoRA and saved modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "LoRA and an embedding": {"modules_to_save": ["embed_tokens"]},
    "LoRA and a head": {"modules_to_save": ["lm_head"]},
    "LoRA on the embedding too": {"target_modules": [*LINEAR, "embed_tokens"]},
    "LoRA and new tokens": {"trainable_token_indices": [1, 2]},
    "LoRA and biases": {"bias": "all"},
}
BELOW = ("embed_tokens",)


@pytest.mark.parametrize("kind", CHOSEN)
@pytest.mark.parametrize("tied", [False, True])
def test_what_plain_training_moves_is_moved_or_named(kind, tied):
    """And what was chosen below the branches is moved; gradients are a plain step's, or there are none."""
    model = tiny_llama(4, tie_word_embeddings=tied).requires_grad_(False)
    if kind == "LoRA and new tokens":
        model.resize_token_embeddings(36, mean_resizing=False)
    options = {"r": 2, "target_modules": LINEAR, "init_lora_weights": False, **CHOSEN[kind]}
    model = peft.get_peft_model(model, peft.LoraConfig(**options, **TASK)).train()
    plain = take_gradients(model, llama_loss(model))
    handle = dropbp.enable(model, 0.5, steps=24)
    counts = dict.fromkeys(plain, 0)
    for _ in range(24):
        for name, gradient in take_gradients(model, llama_loss(model)).items():
            counts[name] += gradient is not None
            if gradient is not None:
                assert_equal(name, handle.mask, gradient, plain)
    still = {name for name, gradient in plain.items() if gradient is not None and not counts[name]}
    report = handle.report()
    assert set(report["never_trained"]) <= still <= {*report["never_trained"], *report["seldom_trained"]}
    assert not [name for name in still if any(part in name for part in BELOW)]


@pytest.mark.parametrize(("kind", "when"), INJECTED_CASES)
def test_a_step_trains_adapters_and_nothing_else(kind, when):
    model = base()
    handle = dropbp.enable(model, drop_rate=0.5) if when == "before" else None
    model = adapted(kind, model)
    handle = handle or dropbp.enable(model, drop_rate=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    with handle.fixed([False] * 4):
        llama_loss(model).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name])
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(("kind", "when"), INJECTED_CASES)
def test_everything_around_training_is_as_if_dropbp_were_not_there(kind, when, tmp_path):
    plain, model = adapted(kind), base()
    if when == "before":
        dropbp.enable(model)
    model = adapted(kind, model)
    if when == "after":
        dropbp.enable(model)
    llama_loss(model).backward()
    assert_same_state(model, plain)
    assert_same_outputs(model, plain)
    assert_same_files(model, plain, tmp_path)
    if kind != "LN tuning":
        with model.disable_adapter(), plain.disable_adapter(), torch.no_grad():
            assert torch.equal(model(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)


def assert_same_state(model: nn.Module, plain: nn.Module) -> None:
    assert list(model.state_dict()) == list(plain.state_dict())
    mine, theirs = peft.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(plain)
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def assert_same_outputs(model: nn.Module, plain: nn.Module) -> None:
    model.eval(), plain.eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(input_ids=tokens(), **options), plain.generate(input_ids=tokens(), **options))
    model.train(), plain.train()


def assert_same_files(model: nn.Module, plain: nn.Module, folder) -> None:
    from safetensors.torch import load_file

    model.save_pretrained(folder / "model")
    plain.save_pretrained(folder / "plain")
    mine, theirs = (load_file(folder / name / "adapter_model.safetensors") for name in ("model", "plain"))
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("kind", MERGING)
@pytest.mark.parametrize("when", ["before", "after"])
def test_merged_models_are_the_same(kind, when):
    plain, model = adapted(kind), base()
    handle = dropbp.enable(model) if when == "before" else None
    model = adapted(kind, model)
    handle = handle or dropbp.enable(model)
    llama_loss(model).backward()
    handle.remove()
    mine, theirs = model.merge_and_unload().eval(), plain.merge_and_unload().eval()
    assert list(mine.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        assert torch.equal(mine(input_ids=tokens()).logits, theirs(input_ids=tokens()).logits)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "IA3"])
def test_a_merged_model_still_enabled_goes_on_dropping(kind):
    model = adapted(kind)
    handle = dropbp.enable(model)
    merged = model.merge_and_unload().train()
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.requires_grad_(True)
    handle.remove()
    handle = dropbp.enable(merged)
    with handle.fixed((True, False, True, False)):
        got = take_gradients(merged, llama_loss(merged))
    assert got["model.layers.0.self_attn.q_proj.weight"] is None
    assert got["model.layers.0.mlp.up_proj.weight"] is not None


def test_adapters_can_be_switched_while_enabled():
    model = adapted("LoRA")
    model.add_adapter("second", INJECTED["LoRA"]())
    plain = copy.deepcopy(model)
    handle = dropbp.enable(model)
    names = [branch.name for branch in handle.branches]
    mask = (True, False, False, True)
    for adapter in ("second", "default"):
        for each in (model, plain):
            each.set_adapter(adapter)
        with handle.fixed(mask):
            got = take_gradients(model, llama_loss(model))
        assert_same_gradients(got, paper_gradients(plain, names, mask, llama_loss))


@pytest.mark.parametrize("turn", [1, 2, 16])
@pytest.mark.parametrize("layers", [None, [3, 4, 5, 6, 7]])
def test_an_adapter_that_was_inactive_when_enabling_meets_the_budget(turn, layers):
    """Adapters take turns of so many steps, in 32; each has modules, and maybe layers, that the other has not."""
    first = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=2)
    wide = tiny_llama(8, hidden_size=64, intermediate_size=128)  # adapters cost little beside it, as they do in earnest
    model = peft.get_peft_model(wide, first)
    second = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2, layers_to_transform=layers)
    model.add_adapter("second", second)
    model.set_adapter("default")
    plain = copy.deepcopy(model)
    handle = dropbp.enable(model, 0.5, steps=32, max_activations=None)
    llama_loss(model)  # the first forward keeps the gradient of the stream
    skipped = whole = 0
    for step in range(32):
        for each in (model, plain):
            each.set_adapter(("second", "default")[step // turn % 2])
        loss, of_all = llama_loss(model), flops_of_backward(llama_loss(plain))
        with handle.engine.measuring((True,) * len(handle.branches)):
            rest = flops_of_backward(llama_loss(model))
        skipped, whole = skipped + of_all - flops_of_backward(loss), whole + of_all - rest
    assert handle.report()["realised_drop_rate"] == pytest.approx(skipped / whole, abs=0.02)
    assert skipped / whole == pytest.approx(0.5, abs=0.02)


def add_second(model, layers=None):
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2, layers_to_transform=layers)
    model.add_adapter("second", config)
    model.set_adapter("second")
    return model


def add_weighted(model):
    model.add_adapter("other", FIRST)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="linear")
    model.set_adapter("both")
    return model


FIRST = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=2)
ADDED = {
    "a second adapter": (True, add_second),
    "a second adapter in some layers": (True, lambda model: add_second(model, [3, 4, 5, 6, 7])),
    "a weighted adapter": (True, add_weighted),
    "the first adapter": (False, lambda model: peft.get_peft_model(model, FIRST)),
}


@pytest.mark.parametrize(
    ("name", "masks"),
    [*((name, "nested") for name in ADDED), ("a second adapter", "exact"), ("the first adapter", "exact")],
)
def test_an_adapter_that_is_added_after_enabling_meets_the_budget(name, masks):
    before, add = ADDED[name]
    wide = tiny_llama(8, hidden_size=64, intermediate_size=128)
    model = peft.get_peft_model(wide, FIRST) if before else wide
    plain = copy.deepcopy(model)
    handle = dropbp.enable(model, 0.5, steps=25, masks=masks, max_activations=None)
    llama_loss(model)  # the first forward keeps the gradient of the stream
    model, plain = add(model), add(plain)
    skipped = whole = 0
    for _ in range(24):
        loss, of_all = llama_loss(model), flops_of_backward(llama_loss(plain))
        with handle.engine.measuring((True,) * len(handle.branches)):
            rest = flops_of_backward(llama_loss(model))
        skipped, whole = skipped + of_all - flops_of_backward(loss), whole + of_all - rest
    realised = handle.report()["realised_drop_rate"]
    # The embedding is frozen, so the lowest kept branch needs no gradient for its input: this saving is not counted.
    more = 0.02 if masks == "nested" else 0.04
    assert -0.02 < skipped / whole - realised < more
    assert realised == pytest.approx(0.5, abs=0.02)


def test_zeros_in_the_gradients_of_an_added_adapter_do_not_train_it():
    model = peft.get_peft_model(tiny_llama(4), FIRST)
    handle = dropbp.enable(model)
    add_second(model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    llama_loss(model).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    with handle.fixed((True,) * 8):
        llama_loss(model).backward()
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "second" in name)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_adapters_under_gradient_checkpointing(kind, reentrant):
    model = adapted(kind)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_right(kind, model, dropbp.enable(model))


def test_filling_zeros_finds_parameters_that_adapters_renamed():
    model = base()
    handle = dropbp.enable(model, fill="zero")
    model = adapted("LoRA", model)
    with handle.fixed((True,) * 4):
        llama_loss(model).backward()
    parameters, root = handle.engine.parameters, handle.engine.model
    names = parameters.structure.parameters.items()
    assert names and parameters.needs() == {root.get_parameter(name): need for name, need in names}


# -- quantised bases


def four_bit(model: nn.Module) -> nn.Module:
    """The linear layers of the blocks as bitsandbytes' NF4, as `load_in_4bit` makes them."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, _four_bit(bitsandbytes, linear))
    return model.requires_grad_(False)


def _four_bit(bitsandbytes, linear: nn.Linear) -> nn.Module:
    made = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    made.weight = bitsandbytes.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
    return made.to("cpu")


def int8_weights(model: nn.Module) -> nn.Module:
    """torchao's weight-only int8."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.model.layers, Int8WeightOnlyConfig())
    return model.requires_grad_(False)


QUANTISED = {"bitsandbytes": four_bit, "torchao": int8_weights}


def quantised(kind):
    model = tiny_llama(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)
    return adapted("LoRA", QUANTISED[kind](model))


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_quantised_bases_train_their_adapters(kind, checkpointing):
    plain, model = quantised(kind), quantised(kind)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    handle = dropbp.enable(model)
    names = [branch.name for branch in handle.branches]
    assert len(names) == 4
    flops = [branch.flops for branch in handle.branches]
    assert min(flops) > 0.5 * max(flops)  # packed weights are counted too
    for mask in masks(4):
        with handle.fixed(mask):
            got = take_gradients(model, llama_loss(model))
        assert_same_gradients(got, expected_gradients(plain, names, mask, llama_loss))


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_bases_save_the_same_adapters(kind, tmp_path):
    plain, model = quantised(kind), quantised(kind)
    dropbp.enable(model)
    assert_same_outputs(model, plain)
    assert_same_files(model, plain, tmp_path)
