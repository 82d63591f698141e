import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from families import FAMILIES
from molf import MoLF, add_lora_experts
from molf.integrations.lora_targets import find_targets
from molf.setup.discovery import check_rank, routed_linears
from small import mlp, tiny_llama

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def found(model, target="all-linear", exclude=("lm_head",)):
    return list(routed_linears(model, target, exclude))


def block():
    return nn.ModuleDict({"q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 2), "norm": nn.LayerNorm(4)})


def nested():
    return nn.ModuleDict({"layers": nn.ModuleList([block(), block()]), "head": nn.Linear(4, 9)})


def test_all_linear_layers_in_the_models_order():
    assert found(mlp()) == ["1", "4", "5"]
    expected = [f"{i}.{'self_attn' if p[0] in 'qkvo' else 'mlp'}.{p}" for i in range(2) for p in PROJECTIONS]
    assert found(tiny_llama()) == [f"model.layers.{name}" for name in expected]


@pytest.mark.parametrize(
    ("target", "exclude", "expected"),
    [
        (["q_proj"], (), ["layers.0.q_proj", "layers.1.q_proj"]),
        (("1.q_proj",), (), ["layers.1.q_proj"]),
        (["layers.0.q_proj", "k_proj"], (), ["layers.0.q_proj", "layers.0.k_proj", "layers.1.k_proj"]),
        (r"layers\.1\..*_proj", (), ["layers.1.q_proj", "layers.1.k_proj"]),
        (r".*_proj", ["layers.0.k_proj"], ["layers.0.q_proj", "layers.1.q_proj", "layers.1.k_proj"]),
        ("all-linear", r".*_proj", ["head"]),
        ("all-linear", ("head", "k_proj"), ["layers.0.q_proj", "layers.1.q_proj"]),
        ("head", (), ["head"]),
    ],
    ids=str,
)
def test_notations(target, exclude, expected):
    assert found(nested(), target, exclude) == expected


def test_which_layers_are_routed():
    """A name is matched by whole parts; frozen layers are not routed, subclasses of Linear are, a shared layer once."""
    assert found(nn.ModuleDict({"proj": nn.Linear(2, 2), "q_proj": nn.Linear(2, 2)}), ["proj"]) == ["proj"]
    assert found(nn.MultiheadAttention(4, 2)) == ["out_proj"]
    layer, model = nn.Linear(3, 3), mlp()
    assert found(nn.ModuleDict({"a": layer, "b": layer})) == ["a"]
    model[4].weight.requires_grad_(False)
    assert found(model) == ["1", "5"]


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_excludes_the_output_embedding(tied):
    model = tiny_llama(tie_word_embeddings=tied)
    assert not any("lm_head" in name for name in found(model, exclude=()))
    assert tied or found(model, target=["lm_head"], exclude=()) == ["lm_head"]


def test_output_embedding_of_another_name():
    class Neo(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.embed_out = nn.Linear(4, 4), nn.Linear(4, 9, bias=False)

        def get_output_embeddings(self):
            return self.embed_out

    assert found(Neo()) == ["dense"]
    assert found(Neo(), target=["dense", "embed_out"]) == ["dense", "embed_out"]


def test_transposed_layers_beside_linear_ones_are_named(caplog):
    model = FAMILIES["GPT-2 classifier"].build()
    assert found(model) == ["score"]
    assert "4 Conv1D layers (c_attn, c_fc, c_proj), 73 % of the trained parameters" in caplog.text
    caplog.clear()
    assert found(model, target=["score"]) == ["score"]
    model.transformer.requires_grad_(False)
    assert found(model) == ["score"] and not caplog.records


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        lambda m: nn.ModuleDict({"_checkpoint_wrapped_module": m}),
        lambda m: torch.compile(nn.ModuleDict({"_fsdp_wrapped_module": m}), backend="eager"),
    ],
    ids=["compile", "checkpoint", "both"],
)
def test_wrappers_leave_no_trace_in_names(wrap):
    assert found(wrap(nested())) == found(nested())


def test_one_compiled_layer():
    model = nested()
    model["layers"][0]["q_proj"] = torch.compile(model["layers"][0]["q_proj"], backend="eager")
    model["layers"][1] = torch.compile(model["layers"][1], backend="eager")
    assert found(model) == found(nested())
    assert found(model, target=["layers.0.q_proj"]) == ["layers.0.q_proj"]


def test_a_compiled_model_still_knows_its_output_embedding():
    model = torch.compile(tiny_llama(tie_word_embeddings=False), backend="eager")
    assert found(model, exclude=()) == found(tiny_llama())


def test_an_output_embedding_inside_of_another_module_is_not_routed():
    def model():
        return tiny_llama(tie_word_embeddings=False)

    outer = nn.ModuleDict({"first": model(), "others": nn.ModuleList([model()])})
    assert found(outer, exclude=()) == [f"{at}.{name}" for at in ("first", "others.0") for name in found(tiny_llama())]
    assert "others.0.lm_head" not in find_targets(outer, exclude_modules=()).modules


@pytest.mark.parametrize("wrap", [DistributedDataParallel, nn.DataParallel])
@pytest.mark.parametrize("adapted", [False, True])
def test_data_parallel_leaves_no_trace_in_names(wrap, adapted, tmp_path):
    def names(wrap):
        model = tiny_llama(tie_word_embeddings=False)
        return list(
            MoLF(wrap(add_lora_experts(model)) if adapted else wrap(model), ranks=None if adapted else (2,)).experts
        )

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert names(wrap) == names(lambda model: model) == found(tiny_llama())
        if not adapted:
            assert found(wrap(tiny_llama(tie_word_embeddings=False)), exclude=()) == found(tiny_llama())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("target", "exclude", "words"),
    [
        (["q_prj"], (), r"no layer matches target_modules=\['q_prj'\].*head, k_proj, q_proj; did you mean 'q_proj'\?"),
        ("all-linear", ".*", r"no layer matches.*exclude_modules='\.\*'.*head, k_proj, q_proj"),
        ([], (), r"no layer matches target_modules=\[\]"),
        (["norm"], (), r"matches layers\.0\.norm, a LayerNorm: only nn\.Linear"),
        (r"layers\.0\..*", (), r"matches layers\.0\.norm, a LayerNorm"),
    ],
    ids=str,
)
def test_targets_that_do_not_work(target, exclude, words):
    with pytest.raises(ValueError, match=words):
        found(nested(), target, exclude)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_layers_are_not_routed(shape):
    model = nn.Sequential(nn.Linear(*shape), nn.Linear(3, 3))
    assert found(model) == ["1"]
    optimizer = MoLF(model, ranks=(2,))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = model[0].bias.detach().clone()
    optimizer.step()
    assert shape[1] == 0 or (model[0].bias < before).all()


@pytest.mark.parametrize("layer", [nn.Conv1d(2, 2, 1), nn.Embedding(3, 2)], ids=lambda m: type(m).__name__)
def test_other_kinds_of_layers(layer):
    kind = type(layer).__name__
    with pytest.raises(ValueError, match=f"matches layer, a {kind}"):
        found(nn.ModuleDict({"layer": layer, "linear": nn.Linear(2, 2)}), target=["layer", "linear"])
    with pytest.raises(ValueError, match=f"no nn.Linear layer to route; its layers with weights are {kind}"):
        found(nn.ModuleDict({"layer": layer}))


def test_for_conv1d_layers_adapters_are_advised():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 30, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    words = r"layers c_attn, c_fc, c_proj .* are Conv1D.*add_lora_experts\(model, freeze_base=False"
    with pytest.raises(ValueError, match=words):
        found(model, exclude=("lm_head",))
    optimizer = MoLF(add_lora_experts(model, ranks=(2,), freeze_base=False))
    assert optimizer.param_groups[-1]["experts"] == ("fft", "lora_r2")


def test_tied_head():
    with pytest.raises(ValueError, match=r"lm_head is shared.*model\.embed_tokens\.weight.*exclude_modules"):
        found(tiny_llama(), target=["lm_head"], exclude=())


def two_layers_with_one_weight():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    return model


def layer_with(weight):
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    model["q_proj"].weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    return model


def split_by_zero_3():
    """DeepSpeed leaves an empty tensor with a mark in a parameter's place."""
    model = mlp()
    for p in model.parameters():
        p.data, p.ds_id = torch.zeros(0), 0
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: nn.Sequential(nn.ReLU()), "weights are none"),
        (split_by_zero_3, r"DeepSpeed's ZeRO-3 has split 1 .* FSDP2 instead.*fully_shard\(model\)"),
        (
            lambda: mlp().requires_grad_(False),
            r"weights of all 3 matching layers are frozen or empty \(1, .*add_lora_experts",
        ),
        (two_layers_with_one_weight, r"the weight of a is shared \(a\.weight = b\.weight\)"),
        (
            lambda: layer_with(torch.zeros(8, 1, dtype=torch.uint8)),
            "q_proj is torch.uint8, not floating point.*quantised",
        ),
        (
            lambda: layer_with(torch.zeros(8, 1, dtype=torch.int8)),
            "q_proj is torch.int8, not floating point.*quantised",
        ),
        (lambda: layer_with(torch.zeros(2, 2, 4)), r"q_proj has shape \[2, 2, 4\]"),
    ],
    ids=["no layer", "ZeRO-3", "frozen", "shared weight", "uint8", "int8", "no matrix"],
)
def test_models_that_cannot_be_routed(build, words):
    with pytest.raises(ValueError, match=words):
        found(build())


def test_ranks_up_to_the_larger_side():
    for ranks in ((), (1,), (2, 6)):
        check_rank("layer", (2, 6), ranks)
    with pytest.raises(ValueError, match=r"ranks=\(2, 7\).*layer \[2, 6\]; use r <= 6 or exclude"):
        check_rank("layer", (2, 6), (2, 7))
