from molf.study.engine.batching import batches
from molf.study.engine.inference import answer
from oracles import count_rows, make_requests


def test_batches_keep_to_their_bound(tiny_model, tiny_tokenizer):
    shapes = count_rows(tiny_model)
    answer(tiny_model, tiny_tokenizer, make_requests(60), batch_tokens=64)
    assert all(rows == 1 or rows * length <= 64 for rows, length, _ in shapes)
    assert any(rows > 1 for rows, _, _ in shapes)


def test_batches_of_rows_longer_than_the_bound_are_single():
    rows = [(0,) * length for length in (9, 4, 2, 2, 2, 1)]
    assert [[len(row) for row in batch] for batch in batches(rows, len, 6)] == [[9], [4], [2, 2, 2], [1]]


def test_a_batch_is_mostly_full():
    rows = [(0,) * length for length in (20, 16, 15, 14, 11, 10)]
    assert [[len(row) for row in batch] for batch in batches(rows, len, 1000)] == [[20, 16, 15], [14, 11], [10]]
    assert [len(batch) for batch in batches(rows, len, 1000, shared=10)] == [1, 2, 1, 1, 1], "of what is left to read"
