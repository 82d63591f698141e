import pytest

from molf.study.results.routing import explained_by_kind, kind_of


@pytest.mark.parametrize(
    ("shares", "explained"),
    [((1, 1, 0, 0), 1.0), ((1, 0, 1, 0), 0.0), ((1, 1, 1, 0), 1 / 3), ((1, 1, 1, 1), None)],
    ids=str,
)
def test_how_much_of_the_map_the_kind_of_projection_explains(shares, explained):
    names = ("0.q_proj", "1.q_proj", "0.k_proj", "1.k_proj")
    found = explained_by_kind(dict(zip(names, map(float, shares), strict=True)))
    assert found == (None if explained is None else pytest.approx(explained))


def test_kinds_of_projections():
    names = ["q_proj", "0.mlp.up_proj[3]", "0.mlp.input_linear.weight[3]", "0.mlp.gate.weight"]
    assert [kind_of(name) for name in names] == ["q_proj", "up_proj", "input_linear", "gate"]
