"""Writes the model that sessions_test runs: one whole SplitQ layer, portable weights, wide enough for several threads.

python tests/cpp/sessions/make_model.py FILE
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from op_models import Case, build

from splitq_edge.exporters.nodes import SplitQLinearSpec

SPEC = SplitQLinearSpec(
    K=640,
    N=512,
    group_widths=(576, 32, 32),
    bits=4,
    activation_bits=8,
    cws_rank=12,
    mac_rank=20,
    mac_rows="all",
    channel_order=True,
    channel_scale=True,
    transforms=(True, True, True),
    packed=False,
)

Path(sys.argv[1]).write_bytes(build(Case(SPEC), np.random.default_rng(0)).model.SerializeToString())
