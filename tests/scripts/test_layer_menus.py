"""What a budget would gain from more on the menu: the choice is the best of all for its bytes."""

import itertools

import paths
import pytest
import torch

from hf_rfa.calibration.budget import Way, spend

SCRIPTS = paths.SCRIPTS / "experiments"


@pytest.fixture
def menus(imported):
    return imported("layer_menus", SCRIPTS)


@pytest.fixture
def costs(menus):
    """Two layers with two heads each; more window, features or kept keys cost less, whatever the head."""
    generator = torch.Generator().manual_seed(0)
    kept = len(menus.NUMBERS)
    shape = (len(menus.WINDOWS), len(menus.FEATURES), kept)
    size = sum(x * y for x, y in zip(torch.meshgrid(*(torch.arange(1.0, n + 1) for n in shape), indexing="ij"),
                                     (4, 2, 3), strict=True))  # fmt: skip
    nats = (
        torch.rand(4, generator=generator) * torch.rand(*shape, 4, generator=generator) / size.unsqueeze(-1)
    ).double()
    price = torch.cat([size, torch.full((*shape[:2], 1), 100.0)], dim=2).double()
    nats = torch.cat([nats, torch.zeros(*shape[:2], 1, 4)], dim=2)
    return menus.Costs(torch.tensor([0, 0, 1, 1]), price, torch.stack([nats, 2 * nats]))


def test_every_point_is_the_best_choice_of_its_bytes(menus, costs):
    windows, features = (32, 64), (64, 128)
    points = menus.curve(costs, windows, features)
    places = [(menus.WINDOWS.index(w), menus.FEATURES.index(f)) for w in windows for f in features]

    def all_of_layer(heads):
        """(bytes, nats) of all that a layer may be."""
        for (w, f), kept in itertools.product(places, itertools.product(range(costs.price.shape[2]), repeat=2)):
            nats = sum(costs.nats[0, w, f, k, head].item() for k, head in zip(kept, heads, strict=True))
            yield costs.price[w, f, list(kept)].sum().item(), nats

    both = [(a[0] + b[0], a[1] + b[1]) for a, b in itertools.product(*map(list, map(all_of_layer, ((0, 1), (2, 3)))))]
    assert len(points) > 3
    for point in points:
        best = min(nats for size, nats in both if size <= point.bytes + 1e-9)
        assert point.nats == pytest.approx(best, abs=1e-12)
        assert point.held_out == pytest.approx(2 * point.nats, abs=1e-12)


def test_with_one_window_and_number_of_features_it_is_the_curve_of_a_budget(menus, costs):
    points = menus.curve(costs, (64,), (64,))
    place = menus.WINDOWS.index(64), menus.FEATURES.index(64)
    price, nats = costs.price[place], costs.nats[(0, *place)]
    ways = {(0, head): [Way(n, price[n].item(), nats[n, head].item()) for n in range(len(price))] for head in range(4)}
    steps = {round(step.bytes, 6): step.nats for step in spend(ways)[1]}
    for point in points:
        assert steps[round(point.bytes, 6)] == pytest.approx(point.nats, abs=1e-8)


def test_more_on_the_menu_never_costs_more(menus, costs):
    menu = {name: menus.curve(costs, *each) for name, each in menus.MENUS.items()}
    bytes_ = menu["kept keys and exact heads"][2].bytes
    nats = {name: menus.at(points, bytes_)["nats"] for name, points in menu.items()}
    assert nats["both per layer"] <= nats["features per layer"] + 1e-12
    assert nats["both per layer"] <= nats["a window per layer"] + 1e-12
    assert nats["features per layer"] <= nats["kept keys and exact heads"] + 1e-12
    assert menus.at(menu["both per layer"], 0.0)["nats"] is None
