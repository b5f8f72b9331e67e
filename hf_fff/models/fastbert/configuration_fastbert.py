"""FastBERT's configuration, under the name by which it is imported elsewhere."""

from ..classes import FastBertConfig as FastBertConfig
