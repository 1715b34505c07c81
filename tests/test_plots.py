"""Every plot is saved as a PNG and draws the given numbers, also at the extremes."""

import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from open_mythos import plots


@pytest.fixture
def drawn(monkeypatch):
    """The figures saved during the test."""
    figures, save = [], Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_accuracy_by_loops_draws_every_curve(tmp_path, drawn):
    curves = {"easy": {1: 0.5, 2: 0.9, 4: 1.0}, "hard": {4: 0.4, 1: 0.1}}
    plots.accuracy_by_loops(curves, tmp_path / "new" / "a.png", chance=0.1, trained_loops=2)
    assert is_png(tmp_path / "new" / "a.png")
    axes = drawn[0].axes[0]
    assert [line.get_label() for line in axes.lines] == ["easy", "hard", "guessing"]
    assert axes.lines[1].get_xydata().tolist() == [[1, 0.1], [4, 0.4]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4"]
    assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title(loc="left")


def test_titles_name_the_model_and_the_exit(tmp_path, drawn):
    plots.accuracy_by_loops({"hard": {1: 0.99, 2: 1.0}}, tmp_path / "a.png", title="parity-tiny, no early exit")
    plots.accuracy_grid([[0.9]], [8], [1], tmp_path / "g.png", exit="the exit gate loses up to 0.100")
    assert drawn[0].axes[0].get_title(loc="left") == "parity-tiny, no early exit"
    assert "the exit gate loses up to 0.100" in drawn[1].axes[0].get_title(loc="left")
    assert drawn[0].axes[0].get_ylim() == (0, 1), "a difference of 0.01 looks small"


def test_axis_limits_do_not_exaggerate_small_differences(tmp_path, drawn):
    near = {1: (0.612, 0.01), 2: (0.618, None)}
    far = {1: (2.31, None), 2: (2.17, None)}
    flat = {1: (21.71, 0.1), 2: (21.78, None)}
    plots.scores_by_loops({"acc": {"a": near}, "bits": {"b": far}, "ppl": {"c": flat}}, tmp_path / "s.png")
    shares, bits, perplexity = (axes.get_ylim() for axes in drawn[0].axes)
    assert shares == (0, 1), "an accuracy is drawn from 0 to 1"
    assert bits[1] - bits[0] == pytest.approx(0.231) and bits[0] < 2.17 < 2.31 < bits[1]
    assert perplexity[1] - perplexity[0] == pytest.approx(2.178)


def test_the_halting_map_hatches_halted_positions(tmp_path, drawn):
    gate = np.array([[0.1, 0.9], [0.2, 0.9], [0.9, 0.9]])
    plots.halting_map(gate, tmp_path / "h.png", ["a", "$b$"], used=[3, 1])
    axes = drawn[0].axes[0]
    cells = np.ma.filled(axes.collections[0].get_array(), np.nan).reshape(3, 2)
    np.testing.assert_allclose(cells, [[0.1, 0.9], [0.3, np.nan], [1, np.nan]], err_msg="cumulative probability")
    assert axes.patch.get_hatch() and "hatched: has halted" in axes.get_title(loc="left")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "$b$"], "a token is not a formula"


@pytest.mark.parametrize("shape", [(7,), (3, 7)])
@pytest.mark.parametrize("words", [None, list(range(7)), [f"word{i}" for i in range(7)]])
def test_the_halting_map_accepts_any_shape_and_labels(tmp_path, drawn, shape, words):
    plots.halting_map(torch.rand(shape), tmp_path / "h.png", words)
    assert is_png(tmp_path / "h.png")
    if words:
        assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == list(map(str, words))


def test_expert_load_is_drawn_in_percent_and_idle_loops_are_blank(tmp_path, drawn):
    plots.expert_load([[3, 1], [0, 0]], tmp_path / "e.png")
    assert is_png(tmp_path / "e.png")
    cells = np.ma.filled(drawn[0].axes[0].collections[0].get_array(), np.nan)
    np.testing.assert_array_equal(cells.reshape(2, 2), [[75, 25], [np.nan, np.nan]])


def test_state_change_leaves_out_positions_that_did_not_run(tmp_path, drawn):
    plots.state_change([[[0.4, 0.2]], [[0.1, 0.0]], [[0.0, 0.0]]], tmp_path / "s.png")
    assert is_png(tmp_path / "s.png")
    mean, moving = drawn[0].axes
    np.testing.assert_allclose(mean.lines[0].get_xydata(), [[1, 0.3], [2, 0.1]])
    assert "of the positions that move" in mean.get_title(loc="left")
    assert [bar.get_height() for bar in moving.patches] == [2, 1, 0], "positions in the mean at each loop"
    assert moving.get_ylim() == (0, 2)


def test_state_change_of_zeros_is_drawn(tmp_path):
    plots.state_change(np.zeros((2, 3)), tmp_path / "s.png")
    assert is_png(tmp_path / "s.png")


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[plots\]"'):
        plots.state_change([[0.1]], tmp_path / "s.png")


def test_accuracy_grid_draws_every_cell_and_outlines_training(tmp_path, drawn):
    accuracy = torch.tensor([[0.5, 0.75, 1.0], [0.5, 0.625, 0.999]])
    plots.accuracy_grid(accuracy, [24, 48], [1, 4, 16], tmp_path / "g.png", "bits", chance=0.5, trained=(24, 8))
    assert is_png(tmp_path / "g.png")
    axes = drawn[0].axes[0]
    np.testing.assert_allclose(axes.collections[0].get_array().reshape(2, 3), accuracy)
    assert axes.collections[0].get_clim() == (0.5, 1)
    assert [text.get_text() for text in axes.texts] == [".500", ".750", "1.000", ".500", ".625", ".999"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4", "16"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["24", "48"]
    outline = axes.lines[0].get_xydata()
    assert outline.min(0).tolist() == [-0.5, 0.5] and outline.max(0).tolist() == [1.5, 1.5], "24 bits, 1 and 4 loops"


def test_accuracy_grid_far_from_training_has_no_outline(tmp_path, drawn):
    plots.accuracy_grid([[1.0]], [96], [64], tmp_path / "g.png", trained=(24, 8))
    assert is_png(tmp_path / "g.png") and not drawn[0].axes[0].lines
