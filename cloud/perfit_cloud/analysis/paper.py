"""The paper's Tables 1 and 5: the smallest r that explains a share of the δ-vectors' squares, Llama-2-7B."""

from __future__ import annotations

__all__ = ["RANKS", "REMARK"]

# By LaMP's name, at 0.8, 0.85, 0.9 and 0.95.
RANKS = {
    "LaMP-2M": (1, 1, 3, 12),
    "LaMP-2N": (1, 2, 4, 20),
    "LaMP-3": (3, 7, 18, 93),
    "LaMP-4": (34, 91, 167, 368),
    "LaMP-5": (4, 14, 40, 203),
    "LaMP-7": (3, 10, 22, 177),
}
REMARK = (
    "The paper's columns are its Tables 1 and 5: Llama-2-7B, layer 16 of 32, d = 4,096, 274 to 19,899 users "
    "(829 for 2M, 274 for 2N, 1,543 for 4). For LaMP-7 at 0.9 Table 5 prints 22, the authors' page 32. Ranks "
    "grow with the number of users and the width of the model, so other sizes are no like for like."
)
