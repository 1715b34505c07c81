"""benchmarks/adaptive.py: all decoding methods give the same answers, and the table has every case."""

import json

import adaptive
import adaptive_ways
import pytest
import torch

from open_mythos import OpenMythos
from open_mythos.generation.native import build
from open_mythos.nn.exits import Gate


@pytest.mark.skipif(isinstance(build.library(), str), reason=str(build.library()))
@pytest.mark.parametrize("one_by_one", [True, False])
def test_all_decoding_methods_give_the_same_answers(one_by_one):
    model, case = OpenMythos.from_pretrained("parity-tiny").float(), adaptive.CASES["parity"]
    batch = case.made().mixed([8] * 3, torch.Generator().manual_seed(0))
    found = adaptive_ways.race(model, 12, batch, Gate(0.9), 1, one_by_one)
    expected = {"compiled"} if one_by_one else {"depth-batched", "compiled"}
    assert found["differing"] == dict.fromkeys(expected, 0.0)
    assert found["speedup"].keys() == expected | {"plain", "compiled fixed"}
    assert all(rate > 0 for rate in found["tokens_per_s"].values())


def test_the_table_has_a_row_for_every_case():
    results = json.loads((adaptive.ROOT / "results" / "adaptive.json").read_text())["results"]
    header, rule, *lines = adaptive.markdown(results).splitlines()
    assert [line.split(",")[0] for line in lines] == [f"| {name.split(',')[0]}" for name in adaptive.CASES]
    assert {line.count(" | ") for line in lines} == {header.count(" | ")} and rule.count("---") == header.count(
        " | "
    ) + 1
