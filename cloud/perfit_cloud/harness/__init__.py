"""General capabilities with a shift and without one, on the tasks of lm-eval-harness.

`adapter` is the model as that library asks it; `evaluate` runs tasks. The library comes with the extra
`capabilities`, and nothing else here imports it.
"""

__all__ = ["RESULTS_FILE"]

RESULTS_FILE = "capabilities.json"  # in a run's folder, where `lamp report` looks for it
