"""Where the time of an image goes, and how it compares with running the same model otherwise.

Everything that is compared is measured in one process and in turns, after a warm-up, beside the rate of matrix products
that the same machine reaches in the same run.

- `measure`: clocks, ceilings, peak memory, the conditions to write beside a figure
- `phases`: a pipeline, phase by phase and step by step
- `rounds`: several ways in turns
- `peers`: bundles, and the same model run in other ways
- `timeline`: a profile as a picture
"""

from jitexport.profile.measure import (
    PeakMemory,
    Timing,
    conditions,
    copy_rate,
    matmul_rate,
    now,
)
from jitexport.profile.peers import PEERS, model_folder, parse_peers, peer_way, profile_bundles
from jitexport.profile.phases import Profile, Ratio, Span, chrome_trace, engine_flops
from jitexport.profile.rounds import CallWay, PipelineWay, Way, profile_pipeline, profile_ways

__all__ = [
    "PEERS",
    "CallWay",
    "PeakMemory",
    "PipelineWay",
    "Profile",
    "Ratio",
    "Span",
    "Timing",
    "Way",
    "chrome_trace",
    "conditions",
    "copy_rate",
    "engine_flops",
    "matmul_rate",
    "model_folder",
    "now",
    "parse_peers",
    "peer_way",
    "profile_bundles",
    "profile_pipeline",
    "profile_ways",
]
