"""transformers' own common tests of models, run over the Fast classes; not a part of `make test`. CONTRIBUTING.md says how.

For each family there are two classes of tests: `Test<family>Fast`, and `Test<family>Dense` with transformers' own classes and the
same tiny config, which tells what transformers itself does not pass.
"""

import importlib
import os
import sys
import types
import unittest
from inspect import signature
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from hf_fff.models.classes import config_class, known_types, model_classes

if __name__ == "__main__":
    if len(sys.argv) < 2 or not Path(sys.argv[1], "tests", "test_modeling_common.py").is_file():
        sys.exit(
            f"usage: python {sys.argv[0]} FOLDER [options of pytest]; FOLDER holds transformers' source, with its tests"
        )
    os.environ["TRANSFORMERS_SOURCE"] = sys.argv[1]
    sys.exit(pytest.main([__file__, "-o", "addopts=", "-W", "ignore", *sys.argv[2:]]))  # their marks are not ours

SOURCE = Path(os.environ["TRANSFORMERS_SOURCE"])


def their_tests():
    """Their module of common tests. It imports two more, which a source distribution leaves out and an encoder does not need."""
    sys.path.insert(0, str(SOURCE))
    for path, mixin in (
        ("exporters/test_export", "ExportTesterMixin"),
        ("generation/test_utils", "GenerationTesterMixin"),
    ):
        if not (SOURCE / "tests" / f"{path}.py").is_file():
            package, name = (f"tests.{part.replace('/', '.')}" for part in (path.split("/")[0], path))
            sys.modules[package], sys.modules[name] = types.ModuleType(package), types.ModuleType(name)
            setattr(sys.modules[name], mixin, type(mixin, (), {}))
    return importlib.import_module("tests.test_modeling_common")


COMMON = their_tests()


def tell_names(family):
    """Their tests know by lists of names which class takes which labels."""
    for name, mapping in vars(modeling_auto).items():
        if name.endswith("MAPPING_NAMES") and isinstance(mapping.get(family), str):
            mapping[f"fast{family}"] = f"Fast{mapping[family]}"


class Tester:
    """What they want to know about a family: a tiny config, and inputs."""

    batch_size, seq_length, num_choices = 3, 8, 2
    is_training = True

    def __init__(self, family, fast):
        self.family, self.fast = family, fast
        fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        for name in fields:
            setattr(self, name, getattr(self.get_config(), name))

    def get_config(self):
        tiny = tiny_model(self.family, num_hidden_layers=2, n_layers=2).config.to_dict()
        fields = {k: v for k, v in tiny.items() if k != "model_type"}
        return config_class(self.family)(**fields, fff="2x3") if self.fast else CONFIG_MAPPING[self.family](**fields)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(5, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def suite_of(family, fast):
    def set_up(self):
        self.model_tester = Tester(family, fast)

    def prepare(self, inputs, model_class, return_labels=False):
        batch = super(tests, self)._prepare_for_class(inputs, model_class, return_labels)
        if return_labels and "ForPreTraining" in model_class.__name__:
            takes = signature(model_class.forward).parameters
            batch["labels"] = torch.zeros_like(batch["input_ids"])
            batch |= {k: batch["labels"][:, 0] for k in ("next_sentence_label", "sentence_order_label") if k in takes}
        return batch

    classes = model_classes(family)
    members = {
        "all_model_classes": tuple(classes.values() if fast else classes),
        "setUp": set_up,
        "_prepare_for_class": prepare,
        "test_can_init_all_missing_weights_before_2023": True,
    }
    name = f"Test{family.replace('-', '').replace('_', '')}{'Fast' if fast else 'Dense'}"
    tests = type(name, (COMMON.ModelTesterMixin, unittest.TestCase), members)
    return tests


for family in known_types():
    tell_names(family)
    for fast in (True, False):
        tests = suite_of(family, fast)
        globals()[tests.__name__] = tests
