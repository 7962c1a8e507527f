"""A prebuilt bundle as a pipeline: prompts in, images out. No compiling, no model code.

Importing this package imports torch and little else; in particular neither torch.export nor diffusers.

- `loading`: from a bundle to a pipeline
- `pipeline`: the call, its arguments and its result
- `phases`: the phases of a call, the loop as a graph
- `chunks`, `callbacks`: all phases, for as many images at a time as the engines take; what is called after every step
- `request`, `draws`: what a call asks for, and what is random in it
- `conditions`: what the stage engines read
- `changing`: adapters and other checkpoints
"""

from jitexport.runtime.callbacks import Callback
from jitexport.runtime.conditions import Condition, Guided
from jitexport.runtime.loading import EngineOpener, load
from jitexport.runtime.pipeline import OutputType, Pipeline, PipelineOutput

__all__ = [
    "Callback",
    "Condition",
    "EngineOpener",
    "Guided",
    "OutputType",
    "Pipeline",
    "PipelineOutput",
    "load",
]
