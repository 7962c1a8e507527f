"""Model families: how a diffusers pipeline becomes fixed-shape modules. One file a family."""
