"""The trunk's sizes: what is refused, and the closed formula for the number of parameters."""

from __future__ import annotations

import pytest
import torch

from nexus.errors import ConfigError
from nexus.student.config import NexusStudentConfig, parameter_count
from nexus.student.core import NexusStudentCore

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2, "port_every": 1},
        {"num_hidden_layers": 3, "port_every": 1, "tie_word_embeddings": True},
        {"num_hidden_layers": 7, "port_every": 3, "num_key_value_heads": 4},
        {"num_hidden_layers": 4, "port_every": 2, "num_key_value_heads": 1, "head_dim": 6},
    ],
)
def test_parameter_count_is_that_of_the_built_trunk(changes: dict[str, int]) -> None:
    config = NexusStudentConfig(**{**SMALL, **changes})
    assert sum(parameter.numel() for parameter in NexusStudentCore(config).parameters()) == parameter_count(config)


def test_the_default_is_4096_wide_and_builds_on_meta_with_the_counted_parameters() -> None:
    config = NexusStudentConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (4096, 32, 14_336)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (32, 8, 151_936)
    with torch.device("meta"):
        core = NexusStudentCore(config)
    # 32 layers (41,943,040 attention + 176,160,768 feed-forward + 8,192 norms), 7 ports of 41,955,328, 2 embeddings, a norm.
    assert parameter_count(config) == 32 * 218_112_000 + 7 * 41_955_328 + 2 * 151_936 * 4096 + 4096
    assert sum(parameter.numel() for parameter in core.parameters()) == parameter_count(config)


def test_ports_stand_before_every_multiple_of_port_every_but_the_first_layer() -> None:
    assert NexusStudentConfig(**SMALL, num_hidden_layers=7, port_every=2).port_layers == (2, 4, 6)
    assert NexusStudentConfig(**SMALL, num_hidden_layers=2, port_every=1).port_layers == (1,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "multiple of num_attention_heads, found 32 and 3"),
        ({"intermediate_size": 0}, "intermediate_size above 0, found 0"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads, found 4 and 3"),
        ({"head_dim": 5}, "even head_dim, found 5"),
        ({"num_hidden_layers": 2, "port_every": 2}, "port_every below num_hidden_layers"),
    ],
)
def test_sizes_that_cannot_work_are_refused_with_their_values(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NexusStudentConfig(**{**SMALL, "num_hidden_layers": 4, "port_every": 1, **changes})
