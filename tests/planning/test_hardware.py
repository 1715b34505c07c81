"""The catalogue of GPUs, and links by name and by number."""

from __future__ import annotations

import pytest

from open_mythos.planning.hardware import DEVICES, LINKS, links


@pytest.mark.parametrize(
    ("text", "inside", "between"),
    [
        ("", "nvlink4", "infiniband"),
        ("nvlink", "nvlink4", "infiniband"),
        ("ethernet", "nvlink4", "ethernet"),
        ("pcie,ethernet", "pcie", "ethernet"),
        ("ethernet, pcie", "pcie", "ethernet"),
    ],
)
def test_names_go_where_they_belong(text: str, inside: str, between: str) -> None:
    assert links(text, DEVICES["h100"]) == (LINKS[inside], LINKS[between])


def test_numbers_are_rates_between_machines_or_of_both() -> None:
    assert [link.rate for link in links("25", DEVICES["h100"])] == [450e9, 25e9]
    assert [link.rate for link in links("100,25", DEVICES["h100"])] == [100e9, 25e9]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nvlnk", "did you mean 'nvlink'?"),
        ("0", "give GB/s above 0"),
        ("nan", "give GB/s above 0"),
        ("a,b,c", "names 3 links"),
        ("nvlink", "this GPU has none; use pcie"),
    ],
)
def test_links_that_cannot_be(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="--interconnect") as error:
        links(text, DEVICES["rtx4090"])
    assert said in str(error.value)


def test_rates_are_of_the_order_that_data_sheets_print() -> None:
    """Dense rates: with sparsity they would be twice as many. A product of bytes read once takes 100 to 400 FLOPs."""
    for name, device in DEVICES.items():
        assert 70 < device.flops / device.bandwidth < 400, name
        assert device.link in LINKS and not LINKS[device.link].joins_machines
        assert device.memory < 2e11 and 300 <= device.watts <= 1000
