import random

import pytest
import torch

from molf.errors import MolfError
from molf.study.engine.inference import answer
from molf.tasks import Generate, Likelihood, TargetScores
from oracles import PROMPT, assert_same, continue_alone, make_requests, score_alone


def test_targets_that_cannot_be_scored(tiny_model, tiny_tokenizer, bos_tokenizer):
    with pytest.raises(ValueError, match="the target '' adds no token to the prompt 'The'"):
        answer(tiny_model, tiny_tokenizer, [Likelihood("The", "")])
    with pytest.raises(ValueError, match="no token comes before the target 'The' of the prompt ''"):
        answer(tiny_model, tiny_tokenizer, [Likelihood("", "The")])
    with pytest.raises(ValueError, match="nothing to continue: the prompt is empty"):
        answer(tiny_model, tiny_tokenizer, [Generate("", 3)])
    answers = answer(tiny_model, bos_tokenizer, [Likelihood("", "The"), Generate("", 3)])
    assert isinstance(answers[0], TargetScores) and isinstance(answers[1], str)


def test_a_broken_model_is_an_error(tiny_model, tiny_tokenizer):
    torch.nn.init.constant_(tiny_model.model.norm.weight, float("nan"))
    with pytest.raises(MolfError, match="contain NaN.*smaller learning rate"):
        answer(tiny_model, tiny_tokenizer, [Likelihood(PROMPT, " Paris")])


def test_the_output_layer_gets_contiguous_states(tiny_model, tiny_tokenizer, monkeypatch):
    # With a frozen weight, as after LoRA is merged, torch would copy the weight for every row of strided states.
    head, seen = tiny_model.lm_head, []
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda x: seen.append(x.is_contiguous()) or forward(x))
    tiny_model.requires_grad_(False)
    answer(tiny_model, tiny_tokenizer, make_requests(20))
    assert len(seen) > 2 and all(seen)
    assert not head._forward_pre_hooks


def test_mixed_requests_keep_their_order_in_any_order(tiny_model, tiny_tokenizer):
    requests = [*make_requests(20), Generate(PROMPT, 4), Generate("SELECT", 4), Generate(PROMPT, 4)]
    random.Random(3).shuffle(requests)
    answers = answer(tiny_model, tiny_tokenizer, requests)
    backwards = answer(tiny_model, tiny_tokenizer, requests[::-1])[::-1]
    for request, one, other in zip(requests, answers, backwards, strict=True):
        if isinstance(request, Generate):
            assert one == other == continue_alone(tiny_model, tiny_tokenizer, request)
        else:
            assert_same([one, other], [score_alone(tiny_model, tiny_tokenizer, request)] * 2)


def test_nothing_asked_nothing_answered(tiny_model, tiny_tokenizer):
    assert answer(tiny_model, tiny_tokenizer, []) == []


def test_model_and_tokenizer_are_left_as_they_were(tiny_model, tiny_tokenizer):
    tiny_model.train()
    tiny_model.model.layers[0].eval()
    before = [module.training for module in tiny_model.modules()]
    side, pad = tiny_tokenizer.padding_side, tiny_tokenizer.pad_token
    answer(tiny_model, tiny_tokenizer, [Likelihood(PROMPT, " Rome"), Generate(PROMPT, 2)])
    assert [module.training for module in tiny_model.modules()] == before
    assert (tiny_tokenizer.padding_side, tiny_tokenizer.pad_token) == (side, pad)
    with pytest.raises(ValueError):
        answer(tiny_model, tiny_tokenizer, [Likelihood(PROMPT, "")])
    assert [module.training for module in tiny_model.modules()] == before


def test_training_goes_on_after_an_evaluation(tiny_model, tiny_tokenizer):
    answer(tiny_model, tiny_tokenizer, [Likelihood(PROMPT, " Rome"), Generate(PROMPT, 2)])
    ids = torch.tensor([tiny_tokenizer(PROMPT).input_ids])
    tiny_model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in tiny_model.parameters())


def test_progress_is_shown_only_on_request(tiny_model, tiny_tokenizer, capsys):
    answer(tiny_model, tiny_tokenizer, [Likelihood(PROMPT, " Rome")])
    assert capsys.readouterr().err == ""
    answer(tiny_model, tiny_tokenizer, [Likelihood(PROMPT, " Rome")], progress=True)
    assert "Likelihoods" in capsys.readouterr().err
