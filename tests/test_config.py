"""FFFConfig and the "fff" object of config.json."""

import dataclasses
import json
import re

import pytest

from hf_fff import FFFConfig
from hf_fff.config import (
    FORMAT_VERSION,
    MAX_DEPTH,
    MAX_TREES,
    as_config,
    layers_from_json,
    layers_to_json,
    resolve_layers,
)


@pytest.mark.parametrize(
    ("shorthand", "trees", "depth", "tree_nodes", "nodes", "active"),
    [
        ("1x11", 1, 11, 4095, 4095, 12),
        ("64x5", 64, 5, 63, 4032, 384),
        ("8x8", 8, 8, 511, 4088, 72),
        ("1x0", 1, 0, 1, 1, 1),
        ("512x2", 512, 2, 7, 3584, 1536),
    ],
)
def test_shorthand_and_sizes(shorthand, trees, depth, tree_nodes, nodes, active):
    config = FFFConfig.from_shorthand(shorthand)
    assert config == FFFConfig(n_trees=trees, depth=depth)
    assert (config.tree_nodes, config.nodes, config.active_nodes) == (tree_nodes, nodes, active)
    assert config.shorthand == shorthand
    assert FFFConfig.from_shorthand(f" {shorthand}\n") == config


def test_defaults_are_the_papers_activation_and_tree():
    config = FFFConfig(8, 8)
    assert (config.activation, config.kind) == ("gelu", "tree")


@pytest.mark.parametrize("text", ["8y8", "8x", "", "x8", "8", "-1x3", "8 x 8", "8x8x8", "1.5x3", "8X8", "8x-1", "8x+1"])
def test_bad_shorthand(text):
    with pytest.raises(ValueError, match="KxD") as caught:
        FFFConfig.from_shorthand(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(("text", "field"), [("0x3", "n_trees"), ("65537x3", "n_trees"), ("8x25", "depth")])
def test_shorthand_out_of_range(text, field):
    with pytest.raises(ValueError, match=f"{field}=.*allowed"):
        FFFConfig.from_shorthand(text)


@pytest.mark.parametrize("value", [0, -1, MAX_TREES + 1, 1.0, 2.5, "8", None, True, [8]])
def test_bad_n_trees(value):
    with pytest.raises(ValueError, match="n_trees=.*allowed: 1 to 65536") as caught:
        FFFConfig(n_trees=value, depth=3)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [-1, MAX_DEPTH + 1, 1.0, "8", None, False])
def test_bad_depth(value):
    with pytest.raises(ValueError, match="depth=.*allowed: 0 to 24"):
        FFFConfig(n_trees=1, depth=value)


def test_largest():
    assert FFFConfig(MAX_TREES, MAX_DEPTH).nodes == 65536 * (2**25 - 1)


@pytest.mark.parametrize("value", ["mish", "GELU", "", None, ["gelu"]])
def test_unknown_activation(value):
    with pytest.raises(ValueError, match="activation=.*is not known .*gelu, .*relu"):
        FFFConfig(1, 3, activation=value)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("gelu", "gelu"),
        ("gelu_new", "gelu_new"),
        ("gelu_pytorch_tanh", "gelu_new"),
        ("swish", "silu"),
        ("linear", "identity"),
    ],
)
def test_activation_names_of_transformers(name, stored):
    assert FFFConfig(1, 3, activation=name).activation == stored
    assert FFFConfig.from_shorthand("1x3", activation=name).activation == stored


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind='forest' is not known .*tree"):
        FFFConfig(1, 3, kind="forest")


@pytest.mark.parametrize("field", ["routing_gradient", "routing_temperature"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "3", None, True])
def test_bad_routing(field, value):
    with pytest.raises(ValueError, match=field):
        FFFConfig(1, 3, **{field: value})


def test_routing_may_be_off_but_its_temperature_not_zero():
    assert FFFConfig(1, 3, routing_gradient=0).routing_gradient == 0
    with pytest.raises(ValueError, match="routing_temperature=0 .*above 0"):
        FFFConfig(1, 3, routing_temperature=0)


def test_frozen_and_hashable():
    config = FFFConfig(8, 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 3
    assert {config: 1}[FFFConfig(8, 8)] == 1
    assert dataclasses.replace(config, depth=3).shorthand == "8x3"


def test_dict_round_trip():
    config = FFFConfig(8, 3, "relu", routing_gradient=0.5, routing_temperature=2)
    assert FFFConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert FFFConfig.from_dict({"n_trees": 8, "depth": 3}) == FFFConfig(8, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_trees": 8, "depth": 3, "trees": 1}, "unknown fff field.*'trees'.*n_trees"),
        ({"n_trees": 8, "depth": 3, 0: "8x8"}, "unknown fff field.*0"),
        ({"n_trees": 8, "depth": 3, 0: "8x8", "a": 1}, "unknown fff field.*0.*'a'"),
        ({"depth": 3}, "'n_trees' missing"),
        ({}, "'n_trees', 'depth' missing"),
    ],
)
def test_bad_fields(values, message):
    with pytest.raises(ValueError, match=message):
        FFFConfig.from_dict(values)


def test_as_config():
    config = FFFConfig(8, 8, "relu")
    assert as_config(config, activation="silu") is config
    assert as_config("8x8", activation="relu") == config
    assert as_config({"n_trees": 8, "depth": 8}, activation="relu") == config
    assert as_config({"n_trees": 8, "depth": 8, "activation": "silu"}, activation="relu").activation == "silu"
    for value in (None, 8, ("8x8",)):
        with pytest.raises(ValueError, match='must be an FFFConfig, a string such as "8x8", or a dict'):
            as_config(value)


def test_resolve_layers():
    one, two = FFFConfig(8, 8), FFFConfig(1, 3)
    assert resolve_layers("8x8", 3) == {0: one, 1: one, 2: one}
    assert resolve_layers(one, 3, [2, 0, 2]) == {0: one, 2: one}
    assert list(resolve_layers(one, 3, iter([2, 0]))) == [0, 2]
    per_layer = resolve_layers({2: "1x3", 0: one}, 3, activation="relu")
    assert list(per_layer) == [0, 2]
    assert per_layer == {0: one, 2: dataclasses.replace(two, activation="relu")}


@pytest.mark.parametrize("layers", [[3], [-1], [0, 7], ["0"], [0.0], [True], [None]])
def test_layers_that_are_not_there(layers):
    with pytest.raises(ValueError, match="target_layers has .*layers 0 to 2"):
        resolve_layers("8x8", 3, layers)


def test_more_errors_of_layers():
    with pytest.raises(ValueError, match="target_layers is empty"):
        resolve_layers("8x8", 3, [])
    with pytest.raises(ValueError, match="config has 3; the model has layers 0 to 2"):
        resolve_layers({0: "8x8", 3: "8x8"}, 3)
    with pytest.raises(ValueError, match="twice"):
        resolve_layers({0: "8x8"}, 3, [0])
    with pytest.raises(ValueError, match="8y8"):
        resolve_layers({0: "8y8"}, 3)
    with pytest.raises(ValueError, match="missing"):
        resolve_layers({}, 3)


def json_round_trip(layers, num_layers):
    stored = json.loads(json.dumps(layers_to_json(layers, num_layers)))
    assert layers_from_json(stored, num_layers) == layers
    return stored


def test_uniform_json():
    stored = json_round_trip(resolve_layers(FFFConfig(8, 8, "relu"), 3), 3)
    assert stored == {
        "version": 1,
        "kind": "tree",
        "n_trees": 8,
        "depth": 8,
        "activation": "relu",
        "routing_gradient": 3.0,
        "routing_temperature": 1.0,
    }


def test_per_layer_json():
    stored = json_round_trip(resolve_layers({0: "8x8", 11: "1x3"}, 12), 12)
    assert set(stored) == {"version", "layers"} and list(stored["layers"]) == ["0", "11"]
    assert stored["layers"]["11"] == FFFConfig(1, 3).to_dict()
    assert set(json_round_trip(resolve_layers("8x8", 3, [0, 1]), 3)) == {"version", "layers"}
    assert json_round_trip({}, 3) == {"version": 1, "layers": {}}
    assert json_round_trip({}, 0) == {"version": 1, "layers": {}}


TREE = {"n_trees": 8, "depth": 8}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({**TREE}, "fff.version=None"),
        ({**TREE, "version": None}, "fff.version=None"),
        ({**TREE, "version": True}, "fff.version=True"),
        ({**TREE, "version": "1"}, "fff.version='1'"),
        ({**TREE, "version": 1.0}, "fff.version=1.0"),
        ({**TREE, "version": 0}, "fff.version=0"),
        ({**TREE, "version": FORMAT_VERSION + 1}, f"fff.version={FORMAT_VERSION + 1} is newer.*update hf_fff"),
        ({**TREE, "version": 99, "forest": 1}, "fff.version=99 is newer"),
        ({**TREE, "version": 1, "forest": 1}, "unknown fff field.*'forest'"),
        ({"version": 1, "n_trees": 8}, "'depth' missing"),
        ({**TREE, "version": 1, "n_trees": 0}, "n_trees=0"),
        ({**TREE, "version": 1, "layers": {"0": TREE}}, "both 'layers' and 'depth', 'n_trees'.*contradict"),
        ({"version": 1, "layers": [TREE]}, "fff.layers must map"),
        ({"version": 1, "layers": None}, "fff.layers must map"),
        ({"version": 1, "layers": {"first": TREE}}, "fff.layers must map"),
        ({"version": 1, "layers": {"-1": TREE}}, "fff.layers must map"),
        ({"version": 1, "layers": {"3": TREE}}, "3; the model has layers 0 to 2"),
        ({"version": 1, "layers": {"0": {**TREE, "forest": 1}}}, "unknown fff field.*'forest'"),
        ({"version": 1, "layers": {"0": None}}, "fff=None must be"),
        ({"version": 1, "layers": {"1": TREE, "01": TREE}}, "fff.layers names layer 1 twice"),
    ],
)
def test_bad_json(value, message):
    with pytest.raises(ValueError, match=message):
        layers_from_json(value, 3)


# --- the other kinds ------------------------------------------------------------------------------------------------


def test_controls():
    mlp, none = FFFConfig.from_shorthand("mlp:72", activation="relu"), FFFConfig.from_shorthand("none")
    assert (mlp.kind, mlp.width, mlp.nodes, mlp.active_nodes, mlp.shorthand) == ("mlp", 72, 72, 72, "mlp:72")
    assert (none.kind, none.nodes, none.active_nodes, none.shorthand) == ("none", 0, 0, "none")
    both = FFFConfig.from_shorthand("4x8+mlp:36", activation="relu", routing_gradient=1.0)
    assert (both.kind, both.n_trees, both.depth, both.width) == ("tree+mlp", 4, 8, 36)
    assert (both.tree_nodes, both.nodes, both.active_nodes, both.shorthand) == (511, 2080, 72, "4x8+mlp:36")
    assert [part.shorthand for part in both.parts] == ["4x8", "mlp:36"]
    assert {(part.activation, part.routing_gradient) for part in both.parts} == {("relu", 1.0)}
    assert mlp.parts == (mlp,) and none.parts == () and FFFConfig(8, 8).parts == (FFFConfig(8, 8),)
    assert [c.has_trees for c in (both, FFFConfig(8, 8), mlp, none)] == [True, True, False, False]
    for config in (mlp, none, both):
        assert FFFConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "n_trees" not in mlp.to_dict() and "width" not in none.to_dict()
    assert "width" not in FFFConfig(8, 8).to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "mlp"}, "width=None is not an integer (allowed: 1 to 16777216)"),
        ({"kind": "mlp", "width": 0}, "width=0 is out of range (allowed: 1 to 16777216)"),
        ({"kind": "mlp", "width": 72, "depth": 3}, "depth=3 means nothing to kind='mlp'"),
        ({"kind": "none", "width": 72}, "width=72 means nothing to kind='none'"),
        ({"n_trees": 8, "depth": 8, "width": 72}, "width=72 means nothing to kind='tree'"),
        ({"kind": "tree+mlp", "n_trees": 8, "depth": 8}, "width=None is not an integer (allowed: 1 to 16777216)"),
        ({"kind": "tree+mlp", "width": 8, "depth": 8}, "n_trees=None is not an integer (allowed: 1 to 65536)"),
        ({"kind": ["mlp"]}, "kind=['mlp'] is not known (allowed: tree, mlp, tree+mlp, none)"),
    ],
)
def test_bad_controls(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FFFConfig(**fields)


@pytest.mark.parametrize(
    "text",
    [
        "mlp",
        "mlp:",
        "mlp:-3",
        "mlp:7.5",
        "MLP:72",
        "None",
        "mlp:7 2",
        "8x8mlp:3",
        "8x8+",
        "8x8+4",
        "+mlp:3",
        "mlp:3+8x8",
    ],
)
def test_bad_shorthand_of_controls(text):
    with pytest.raises(ValueError, match="is not of the form"):
        FFFConfig.from_shorthand(text)
