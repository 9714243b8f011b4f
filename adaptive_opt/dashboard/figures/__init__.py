"""Reports in, a Plotly figure out: pure, one figure a file. The page, the export and whoever logs figures use the same.

Every function takes a sequence of StepReports by step, as `read_reports` or `Run.reports` gives them, and returns a
`plotly.graph_objects.Figure`. What was not measured says so inside the figure.
"""

from adaptive_opt.dashboard.figures.compare import compare
from adaptive_opt.dashboard.figures.condition import condition
from adaptive_opt.dashboard.figures.cost import cost
from adaptive_opt.dashboard.figures.layers import layers
from adaptive_opt.dashboard.figures.lipschitz import lipschitz
from adaptive_opt.dashboard.figures.saddle import saddle
from adaptive_opt.dashboard.figures.sharpness import sharpness
from adaptive_opt.dashboard.figures.spectrum import spectrum
from adaptive_opt.dashboard.figures.training import training

__all__ = ["compare", "condition", "cost", "layers", "lipschitz", "saddle", "sharpness", "spectrum", "training"]
