"""A self-contained HTML report of a run: training curves, evaluation, and an example loop by loop."""

from open_mythos.report.data import gather as gather
from open_mythos.report.data import render as render
