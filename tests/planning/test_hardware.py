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
def test_link_names_apply_within_or_between_machines(text: str, inside: str, between: str) -> None:
    assert links(text, DEVICES["h100"]) == (LINKS[inside], LINKS[between])


def test_link_rates_apply_between_machines_or_to_both_links() -> None:
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
        ("25,pcie", "names two links within machines"),
        ("infiniband,ethernet", "names two links between machines"),
    ],
)
def test_invalid_links_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="--interconnect") as error:
        links(text, DEVICES["rtx4090"])
    assert said in str(error.value)


def test_device_rates_are_plausible() -> None:
    """FLOPs without sparsity, which would double them, are about 100 to 400 for each byte of memory bandwidth."""
    for name, device in DEVICES.items():
        assert 70 < device.flops / device.bandwidth < 400, name
        assert device.link in LINKS and not LINKS[device.link].joins_machines
        assert device.memory < 2e11 and 300 <= device.watts <= 1000
