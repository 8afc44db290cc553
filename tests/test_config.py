"""`RFAConfig`: what it accepts, what it says when it does not, and that a saved one comes back as it was."""

import dataclasses
import json

import pytest

from hf_rfa import ConfigError, RFAConfig, RFAError
from hf_rfa.config import FORMAT_VERSION


def test_defaults():
    config = RFAConfig()
    assert dataclasses.asdict(config) == {
        "feature_map": "hyperbolic",
        "num_features": 64,
        "layer_features": None,
        "omega": "sphere",
        "window": 64,
        "sink_tokens": 4,
        "kept_keys": None,
        "head_kept_keys": None,
        "softmax_heads": None,
        "loss_budget": 0.005,
        "budget": None,
        "budget_context": 8192,
        "layers": "all",
        "seed": 0,
        "resample": "never",
        "alpha": 0.25,
        "gamma": 1.0,
        "gate": False,
    }


@pytest.mark.default_kept_keys
def test_the_default_number_of_kept_keys_is_128_where_there_is_a_window():
    assert (RFAConfig().kept_of(0, 2), RFAConfig().most_kept_keys) == (128, 128)
    assert RFAConfig(window=0, sink_tokens=0).most_kept_keys == 0
    assert RFAConfig(kept_keys=0).most_kept_keys == 0
    heads = RFAConfig(head_kept_keys={(1, 0): 512})
    assert (heads.kept_of(1, 2), heads.kept_of(0, 2), heads.most_kept_keys) == ((512, 128), 128, 512)
    assert dataclasses.replace(RFAConfig(), window=0, sink_tokens=0).most_kept_keys == 0
    with pytest.raises(ConfigError, match="needs a window"):
        RFAConfig(window=0, sink_tokens=0, kept_keys=128)


@pytest.mark.default_kept_keys
def test_a_saved_config_holds_the_number_and_not_the_default():
    saved = RFAConfig().to_dict()
    assert saved["kept_keys"] == 128
    del saved["kept_keys"]  # a file from before kept keys
    assert RFAConfig.from_dict(saved).most_kept_keys == 0


def test_every_field_says_what_it_is():
    for field in dataclasses.fields(RFAConfig):
        assert len(field.metadata["help"]) > 20, field.name


def test_a_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RFAConfig().window = 32


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("feature_map", "cosine"),
        ("feature_map", None),
        ("omega", "trained"),
        ("num_features", 0),
        ("num_features", -1),
        ("num_features", 64.0),
        ("num_features", True),
        ("num_features", "64"),
        ("window", -1),
        ("window", 1.5),
        ("sink_tokens", -1),
        ("sink_tokens", None),
        ("seed", -1),
        ("seed", 0.5),
        ("alpha", -0.1),
        ("alpha", float("nan")),
        ("alpha", float("inf")),
        ("alpha", "0.25"),
        ("alpha", True),
        ("gamma", -1),
        ("gamma", float("nan")),
        ("gamma", float("inf")),
        ("gamma", None),
        ("gamma", False),
        ("resample", "always"),
        ("resample", 0),
        ("resample", -3),
        ("resample", True),
        ("resample", 2.0),
        ("softmax_heads", "all"),
        ("softmax_heads", 1),
        ("softmax_heads", True),
        ("softmax_heads", 1.1),
        ("softmax_heads", -0.1),
        ("softmax_heads", float("nan")),
        ("softmax_heads", [3]),
        ("softmax_heads", [(1, 2, 3)]),
        ("softmax_heads", [(0, -1)]),
        ("softmax_heads", [(0, 1.0)]),
        ("softmax_heads", [(False, 1)]),
        ("softmax_heads", ["01"]),
        ("layers", "none"),
        ("layers", "every 1st stays softmax"),
        ("layers", "every 0th stays softmax"),
        ("layers", "every 4th"),
        ("layers", "every -4th stays softmax"),
        ("layers", []),
        ("layers", [-1]),
        ("layers", [0.5]),
        ("layers", [True]),
        ("layers", 3),
        ("layers", None),
    ],
)
def test_a_wrong_value_is_named_with_what_was_got(field, value):
    with pytest.raises(ConfigError) as error:
        RFAConfig(**{field: value})
    message = str(error.value)
    assert f"`{field}`" in message
    assert f"Got {value!r}." in message
    assert "Set" in message.rsplit("Got", 1)[1]  # what to do comes last


def test_an_error_is_a_value_error_and_one_of_the_package():
    with pytest.raises(ValueError, match="`window`"):
        RFAConfig(window=-1)
    with pytest.raises(RFAError, match="`window`"):
        RFAConfig(window=-1)


def test_sinks_must_fit_into_the_window():
    with pytest.raises(ConfigError, match=r"`sink_tokens` must be at most `window`\. Got 5 > 4\."):
        RFAConfig(window=4, sink_tokens=5)
    assert RFAConfig(window=4, sink_tokens=4).sink_tokens == 4
    assert RFAConfig(window=0, sink_tokens=4).window == 0  # without a window the sinks are ignored


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, None),
        ("auto", "auto"),
        (0.0, 0.0),
        (0.25, 0.25),
        (1.0, 1.0),
        ([], ()),
        ([(3, 1), [0, 0]], ((0, 0), (3, 1))),
        (((3, 1), (3, 1)), ((3, 1),)),
    ],
)
def test_softmax_heads(given, kept):
    config = RFAConfig(softmax_heads=given)
    assert config.softmax_heads == kept
    assert type(config.softmax_heads) is type(kept)


@pytest.mark.parametrize(
    ("layers", "converted"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ([2, 0, 2], [0, 2]),
        ((1,), [1]),
        ("every 4th stays softmax", [0, 1, 2, 4, 5, 6, 8]),
        ("every 2nd stays softmax", [0, 2, 4, 6, 8]),
        ("every 3rd stays softmax", [0, 1, 3, 4, 6, 7]),
        ("every 21st stays softmax", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_which_layers_are_converted(layers, converted):
    config = RFAConfig(layers=layers)
    assert [layer for layer in range(9) if config.converts_layer(layer)] == converted


CONFIGS = [
    RFAConfig(),
    RFAConfig(feature_map="trigonometric", num_features=7, omega="gaussian", window=0, sink_tokens=0, seed=3),
    RFAConfig(softmax_heads=[(3, 1), (0, 0)], layers=[0, 3], alpha=0, gamma=2, resample=10),
    RFAConfig(softmax_heads=0.5, layers="every 4th stays softmax", resample="forward"),
    RFAConfig(softmax_heads="auto"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_survives_json(config):
    saved = json.loads(json.dumps(config.to_dict()))
    assert saved["format_version"] == FORMAT_VERSION
    loaded = RFAConfig.from_dict(saved)
    assert loaded == config.settled()
    assert hash(loaded) == hash(config.settled())  # lists came back as tuples
    assert loaded.to_dict() == config.to_dict()


def test_from_dict_leaves_its_argument_alone():
    saved = RFAConfig().to_dict()
    RFAConfig.from_dict(saved)
    assert saved == RFAConfig().to_dict()


def test_a_newer_format_is_refused():
    saved = RFAConfig().to_dict() | {"format_version": FORMAT_VERSION + 1}
    with pytest.raises(ConfigError, match=f"format version {FORMAT_VERSION + 1}; .* up to {FORMAT_VERSION}.* Upgrade"):
        RFAConfig.from_dict(saved)


def test_a_newer_format_is_refused_before_its_fields_are_judged():
    # The advice must be "upgrade", not "remove the fields".
    with pytest.raises(ConfigError, match="Upgrade"):
        RFAConfig.from_dict({"format_version": FORMAT_VERSION + 1, "field_of_the_future": 1})


@pytest.mark.parametrize("version", [None, 0, -1, "1", 1.0, True])
def test_a_damaged_format_version_is_refused(version):
    with pytest.raises(ConfigError, match="`format_version` must be a positive integer") as error:
        RFAConfig.from_dict(RFAConfig().to_dict() | {"format_version": version})
    assert f"Got {version!r}." in str(error.value)


def test_a_missing_format_version_is_refused():
    saved = RFAConfig().to_dict()
    del saved["format_version"]
    with pytest.raises(ConfigError, match="`format_version`"):
        RFAConfig.from_dict(saved)


def test_unknown_fields_are_refused():
    with pytest.raises(ConfigError, match=r"Unknown fields in the saved config: \['depth', 'windw'\].*'window'"):
        RFAConfig.from_dict(RFAConfig().to_dict() | {"windw": 32, "depth": 1})


def test_saved_values_are_validated_too():
    with pytest.raises(ConfigError, match=r"`num_features`.*Got 0\."):
        RFAConfig.from_dict(RFAConfig().to_dict() | {"num_features": 0})


def test_centroids_are_not_drawn():
    assert RFAConfig(feature_map="clustered").omega == "learned"
    for omega in ("gaussian", "orthogonal"):
        with pytest.raises(ConfigError, match="centroids of keys"):
            RFAConfig(feature_map="clustered", omega=omega)
