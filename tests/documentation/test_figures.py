"""The figures of docs/how_it_works.md show what they say."""

import re

import matplotlib.pyplot as plt
import pytest
import torch
from paths import ROOT


@pytest.fixture
def figures(imported):
    """scripts/draw_figures.py."""
    return imported("draw_figures")


@pytest.mark.parametrize("kept", [0, 6])
def test_every_query_sees_its_keys_in_one_way(figures, kept):
    window, sinks, length = 16, 2, 96
    how = figures.seen(length, window, sinks, kept)
    place = torch.arange(length)
    assert torch.equal(how == figures.HIDDEN, place > place[:, None])
    near = (place[:, None] // window - place // window <= 1) & (place <= place[:, None])
    assert torch.equal(how == figures.NEAR, near)
    far_away = place[:, None] // window >= 2
    assert torch.equal(how == figures.SINK, far_away & (place < sinks) & ~near)
    # From the third chunk on as many keys are kept as may be, and all others are far.
    assert ((how == figures.KEPT).sum(-1) == torch.where(far_away.squeeze(-1), kept, 0)).all()


def test_tempering_takes_the_noise_and_the_slope(figures):
    figure = figures.far()
    spread = []
    for ax in figure.axes:
        points = torch.from_numpy(ax.collections[0].get_offsets().data)  # those of 64 features
        centred = points - points.mean(0)
        slope = (centred[:, 0] * centred[:, 1]).sum() / centred[:, 0].square().sum()
        spread.append((float(slope), float((centred[:, 1] - slope * centred[:, 0]).std())))
    plt.close(figure)
    assert [ax.get_title() for ax in figure.axes] == ["alpha=1", "alpha=0.5", "alpha=0.25"]
    assert spread == sorted(spread, reverse=True)
    assert spread[0][1] > 10 * spread[-1][1]


def test_the_page_shows_all_of_them():
    text = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    drawn = {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    assert (
        set(re.findall(r"\]\(figures/(\S+)\)", text))
        == drawn
        == {f"{n}.png" for n in ("near", "kept", "far", "exact")}
    )
