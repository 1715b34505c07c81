"""A run as one page: its curves, and what each loop does to an example. One HTML file that needs nothing else."""

from open_mythos.report.data import gather as gather
from open_mythos.report.page import render as render
