"""What `jitexport.build` is made of.

- `request`: what was asked for, checked
- `reference`: the model's own modules as a pipeline, and what engines are tried with
- `engines`, `comparing`: compiling and verifying
- `declaring`: weights, schedule and manifest as they are written
"""
