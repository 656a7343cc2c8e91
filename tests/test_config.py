import pytest

from igpt.config import PRESETS, Config, preset


def test_round_trip():
    for config in PRESETS.values():
        assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: preset("huge"), "preset"),
        (lambda: preset("s", depth=3), "depth"),
        (lambda: Config(2, 64, 3), "heads"),
        (lambda: Config(2, 64, 2, objective="gan"), "objective"),
        (lambda: Config(0, 64, 2), "n_layer"),
        (lambda: Config.from_dict({"width": 3}), "missing"),
    ],
)
def test_bad_configurations_are_named(make, names):
    with pytest.raises(ValueError, match=names):
        make()
