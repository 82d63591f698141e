"""Several gloo ranks against one process. The checks are in ``ranks.py``; each start of ranks serves all of them."""

import importlib.util
import json
import re
import warnings

import pytest
import torch
from torch import multiprocessing, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import ranks
from molf import MoLF, param_groups
from molf.numerics.distributed import Ranks
from small import mlp, train
from stacks import mixture

# How far apart several ranks and one process may end in float64.
APART = 1e-10
FUSED = ["fused_backward", "fused_scaled", "fused_adapters", "fused_low_parts", "fused_8_bits", "fused_in_part"]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


def start(size, folder):
    """Run all checks on so many ranks and return their reports."""
    # A fork has imported everything; CUDA does not survive one.
    how = "spawn" if torch.cuda.is_available() else "fork"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
        multiprocessing.start_processes(ranks.run, (size, str(folder)), nprocs=size, start_method=how)
    return [json.loads((folder / f"{size}ranks-{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def two(folder):
    return start(2, folder)


@pytest.fixture(scope="module")
def four(folder, two):
    return start(4, folder)


def sizes_of(checks):
    """Return checks with the numbers of ranks that they run on, all of two ranks first."""
    named = list(checks)
    return [(2, name) for name in named] + [(4, name) for name in named if name not in ranks.ON_TWO_RANKS]


@pytest.fixture(params=[2, 4])
def reports(request):
    """The reports of all ranks, as a function of the check's name."""
    found = request.getfixturevalue({2: "two", 4: "four"}[request.param])

    def of(check):
        for report in found:
            assert "failed" not in report[check], report[check]["failed"]
        return [report[check] for report in found]

    return of


@pytest.mark.parametrize(
    ("reports", "check"),
    sizes_of(name for name in ranks.COMPARED if name not in ranks.ON_FOUR_RANKS),
    indirect=["reports"],
)
def test_ranks_equal_one_process(reports, check):
    assert_equal_to_one_process(reports(check))


def test_replicated_shards_equal_one_process(four):
    assert_equal_to_one_process([report["hsdp_merged"] for report in four])


def assert_equal_to_one_process(found):
    for report in found:
        assert report["apart"] <= APART and report["norms apart"] <= APART
        assert report["same winners"]


def test_both_kinds_of_experts_win_somewhere(two):
    assert max(report["kinds of winners"] for name, report in two[0].items() if name in ranks.COMPARED) > 1


def test_ranks_seeded_differently_start_alike(reports):
    assert all(report["apart"] == 0 for report in reports("different_seeds"))


def test_layers_that_are_added_later_start_as_on_the_first_rank(monkeypatch):
    class Told(Ranks):
        def broadcast_decision(self, x, device):
            return x if x.dtype == torch.bool else torch.arange(len(x)) + 70

    monkeypatch.setattr("molf.optimizer.optimizer.find_ranks", lambda *_: Told())
    model, later = mlp(), nn.ModuleDict({"later": nn.Linear(4, 4)})
    optimizer = MoLF(model, **ranks.MERGED)
    train(model, optimizer, 1)
    groups = param_groups(later, **{key: value for key, value in ranks.MERGED.items() if key in ("ranks", "lora_lr")})
    for group in (group for group in groups if "module" in group):
        optimizer.add_param_group(group)
    train(model, optimizer, 1)
    seeds = [group["lora_seed"] for group in optimizer.param_groups if "module" in group]
    assert seeds == [70, 71, 72, 73]


def test_the_first_rank_decides(reports):
    assert all(report["winners"] == ["fft"] for report in reports("decision_is_the_first_ones"))


def test_all_ranks_skip_a_step_that_is_not_finite_or_overflows_on_one(reports):
    assert all(report == {"skipped": 1, "apart": 0} for report in reports("one_rank_is_not_finite"))
    assert all(report["skipped"] == 1 for report in reports("overflow_on_one_rank"))


def test_experts_of_a_sharded_model_are_read_whole(reports):
    for report in reports("views_are_whole"):
        assert report["shapes"] == [[13, 7], [3, 7], [13, 3], [13]]
        assert report["apart"] <= APART


@pytest.mark.parametrize("form", ["merged", "branched"])
def test_a_model_that_is_sharded_in_part_moves_whole(reports, form):
    assert all(report[form] is not None and report[form] <= APART for report in reports("in_part"))


def test_sharded_low_parts(reports):
    for report in reports("bf16"):
        # Sums over shards round otherwise than sums over rows; without low parts it would be 1e-3.
        assert report["same winners"] and report["apart"] <= 5e-5


def test_sharded_8_bit_states(reports):
    found = reports("eight_bits")
    for report in found:
        # A code may differ where sums over shards, or a kernel at an array's end, round otherwise.
        assert report["same winners"] and report["codes alike"] > 0.999 and report["apart"] <= 1e-5
        assert report["quantized"] == 4
    assert sum(report["own maxima"] for report in found) == found[0]["all maxima"]


def test_8_bit_checkpoint_of_two_ranks_goes_on_on_others(reports):
    for report in reports("eight_bit_checkpoint"):
        assert report == {"differing": [], "dtypes": ["torch.float32", "torch.uint8"], "finite": True}


def test_stochastic_rounding_of_shards(reports):
    for report in reports("stochastic_rounding"):
        assert report["again apart"] == 0 and report["values"] > 1 and not report["shards alike"]


@needs_triton
@pytest.mark.parametrize(("reports", "check"), sizes_of(FUSED), indirect=["reports"])
def test_fused_steps_equal_plain_ones_and_one_process(reports, check):
    for report in reports(check):
        # A code may differ where the last bit of a moment does.
        for other in ("one process", "plain shards"):
            assert report[other]["apart"] <= 2e-6 and report[other]["codes alike"] > 0.999
        assert report["same winners"] and report["scores apart"] <= 1e-5
        # PyTorch rounds norms of bf16 tensors to bf16.
        assert report["norms apart"] <= (5e-3 if check == "fused_low_parts" else 1e-6)
        assert report["skipped"] == [2 if check == "fused_scaled" else 0] * 3


@needs_triton
def test_all_experts_win_fused_steps(two):
    assert two[0]["fused_backward"]["kinds of winners"] == 3


@needs_triton
def test_kernels_refuse_a_gradient_of_other_rows(reports):
    for report in reports("fused_other_rows"):
        assert re.search(
            r"gradient of 1\.weight is \[13, 7\] on this rank, and the parameter is \[\d, 7\]", report["error"]
        )


def test_a_shard_of_another_shape_is_refused(reports):
    for report in reports("another_shape"):
        here, everywhere = report["errors"]
        assert re.search(r"state of 4\.weight is \[(\d), 13\] on this rank, and the parameter is \[(\d), 13\]", here)
        assert "state of 4.weight is [5, 13], and the parameter is [9, 13]: its memory was replaced" in everywhere
        assert report["still"]


@needs_triton
def test_stochastic_rounding_of_shards_by_kernels(reports):
    for report in reports("fused_stochastic_rounding"):
        assert report["whole apart"] == 0 and min(report["values"]) > 1 and not report["shards alike"]


@needs_triton
def test_checkpoint_of_either_step_goes_on_in_the_other_on_other_ranks(reports):
    for report in reports("fused_checkpoint"):
        for end in (report["written by fused"], report["written by plain"]):
            assert end["apart"] <= 2e-6 and end["codes alike"] > 0.999


def test_mixed_precision_policy(reports):
    assert all(report == {"dtypes": ["torch.float32"], "finite": True} for report in reports("mixed_precision"))


def test_states_are_sharded_like_their_weights(reports):
    pairs = [f"lora_r{r}.B{end}" for r in (2, 3) for end in ("", ".exp_avg", ".exp_avg_sq")]
    for report in reports("sharded_states"):
        assert report["sharded"] == ["exp_avg", "exp_avg_sq", *pairs, "low"]


REFUSED = {
    "odd_placements": "needs row shards, Shard(0)",
    "eight_bits_in_columns": "8-bit moments need row shards, Shard(0)",
    "state_before_sharding": "shard first, then load the state",
}


@pytest.mark.parametrize("check", REFUSED)
def test_refusals(reports, check):
    assert all(REFUSED[check] in report["error"] for report in reports(check))


def test_gradient_release_is_refused(reports):
    for report in reports("gradient_release"):
        assert ["cannot be summed over ranks first (DDP, FSDP)" in error for error in report["errors"]] == [True, True]


def test_a_whole_state_is_sharded_on_loading(reports):
    assert all(report["apart"] <= APART for report in reports("a_whole_state_is_sharded"))


CHECKPOINTS = {"checkpoint": lambda: mlp(seed=99), "checkpoint_stacked": mixture}


@pytest.mark.parametrize("check", CHECKPOINTS)
def test_checkpoint_of_two_ranks_goes_on_on_others(reports, check):
    assert all(report["apart"] <= APART for report in reports(check))


@pytest.mark.parametrize("check", CHECKPOINTS)
def test_checkpoint_of_two_ranks_goes_on_in_one_process(two, folder, check):
    model = CHECKPOINTS[check]()
    optimizer = MoLF(model, **ranks.MERGED)
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": states}
    with pytest.warns(UserWarning, match="load in a single process"):
        dcp.load(state, checkpoint_id=folder / check)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    ranks.train(model, optimizer, range(3, 6), list(range(8)))
    end = torch.load(folder / f"{check}.pt")
    assert ranks.furthest(ranks.everything(model, optimizer), end) <= APART
