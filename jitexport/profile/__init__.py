"""Where the time of an image goes, and how it compares with running the same model otherwise.

Everything that is compared is measured in one process, after warm-up, as medians over repeats, beside the rate of
matrix products that the same machine reaches in the same run.

- `measure`: clocks, ceilings, peak memory, the conditions to write beside a figure
- `phases`: a pipeline, phase by phase and step by step
- `peers`: the same model run in other ways
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
from jitexport.profile.peers import PEERS, diffusers_profile, measure_peer, model_folder, parse_peers, profile_bundle
from jitexport.profile.phases import Profile, Span, chrome_trace, engine_flops, profile_call, profile_pipeline

__all__ = [
    "PEERS",
    "PeakMemory",
    "Profile",
    "Span",
    "Timing",
    "chrome_trace",
    "conditions",
    "copy_rate",
    "diffusers_profile",
    "engine_flops",
    "matmul_rate",
    "measure_peer",
    "model_folder",
    "now",
    "parse_peers",
    "profile_bundle",
    "profile_call",
    "profile_pipeline",
]
