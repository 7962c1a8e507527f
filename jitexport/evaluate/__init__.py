"""Quality of bundles: images of the same prompts and seeds, compared with the ordinary sampler's.

- `prompts`: prompts, seeds and image folders; GenEval's and T2I-CompBench's formats
- `sources`: bundles and the reference, their images and latencies
- `metrics`, `statistics`, `demo`: scores and their intervals
- `scenes`, `finder`, `scene_scores`: pictures of known objects, what is in them, and whether that was asked for
- `evaluation`: all of it together
- `report`: tables, curves, contact sheets, one HTML file
"""

from jitexport.evaluate.evaluation import Evaluation, Row, compare, evaluate
from jitexport.evaluate.report import write_report

__all__ = ["Evaluation", "Row", "compare", "evaluate", "write_report"]
