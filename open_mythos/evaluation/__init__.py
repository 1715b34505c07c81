"""Evaluation of models: accuracy, bits per byte and their dependence on depth."""

from open_mythos.evaluation.depth import accuracy_by_loops as accuracy_by_loops
from open_mythos.evaluation.grid import DepthGrid as DepthGrid
from open_mythos.evaluation.grid import combine as combine
from open_mythos.evaluation.grid import depth_grid as depth_grid
from open_mythos.evaluation.summary import Evaluation as Evaluation
from open_mythos.evaluation.summary import evaluate as evaluate
